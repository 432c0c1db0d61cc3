"""log Z at many parameter values, each bridged from walkers at one reference value.

Posterior draws lie close together: a few temperatures carry the reference's walkers to any of them, and errors do
not pile up as they would along a path from draw to draw.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.annealing import AnnealingOptions, Ladder, Path, anneal
from ebm_ppl.certificate import Bridge, SiteCertificate, certify_bridges, pass_of
from ebm_ppl.distribution import potential_at
from ebm_ppl.kernels import Kernel
from ebm_ppl.model import Params
from ebm_ppl.placement import SiteAtParams

MAX_TEMPERATURES = 256


class Reference(NamedTuple):
    """Walkers at the reference parameters.

    Attributes:
        site: The energy site there.
        certificate: Its log Z.
        position: Equally weighted draws, ``(num_chains, num_walkers, *batch, *event)``.
        step_size: Of moves there, ``batch``.
    """

    site: SiteAtParams
    certificate: SiteCertificate
    position: Array
    step_size: Array


def bridge_to_draws(
    rng_key: Array, reference: Reference, draws: Params, kernel: Kernel, options: AnnealingOptions, tolerance: float
) -> tuple[SiteCertificate, int]:
    """Log Z at every parameter draw, the reference's uncertainty included.

    Args:
        rng_key: A JAX PRNG key.
        reference: Walkers and log Z at parameters in the midst of the draws.
        draws: Parameters with one leading axis.
        kernel: How walkers move.
        options: How many moves a temperature gets, and when islands resample.
        tolerance: Widest acceptable bracket, in nats.

    Returns:
        A certificate whose arrays lead with the draws' axis, and the number of energy evaluations.
    """
    site, position = reference.site, reference.position
    worst = float(jnp.max(_variances(site, position, draws)))
    # Steps whose log weights have variance 0.1 have a conditional ESS of 0.9.
    num_temperatures = 2
    while num_temperatures**2 < 10 * worst and num_temperatures < MAX_TEMPERATURES:
        num_temperatures *= 2
    islands = reference.certificate.log_normalizers
    bridges = _bridges(site, position, draws, reference.step_size, islands, rng_key, kernel, options, num_temperatures)
    num_draws = jax.tree.leaves(draws)[0].shape[0]
    per_draw = position.shape[0] * position.shape[1] * (1 + num_temperatures * options.num_kernel_steps)
    return certify_bridges(reference.certificate, bridges, tolerance), num_draws * per_draw


def _difference(site: SiteAtParams, params: Params, position: Array) -> Array:
    """U_θ − U_reference in the reference's coordinates."""
    there = site.bound.energies(params)[site.name]
    return potential_at(there, site.transform, position) - potential_at(site.distribution, site.transform, position)


@jax.jit
def _variances(site: SiteAtParams, position: Array, draws: Params) -> Array:
    """Variance over walkers of the log weights of one step to every draw, ``(num_draws, *batch)``."""
    return lax.map(lambda params: jnp.var(_difference(site, params, position), axis=(0, 1)), draws)


@partial(jax.jit, static_argnames=("kernel", "options", "num_temperatures"))
def _bridges(
    site: SiteAtParams,
    position: Array,
    draws: Params,
    step_size: Array,
    log_island_weights: Array,
    rng_key: Array,
    kernel: Kernel,
    options: AnnealingOptions,
    num_temperatures: int,
) -> Bridge:
    betas = jnp.arange(1, num_temperatures + 1) / num_temperatures
    ladder = Ladder(jnp.zeros(()), betas, jnp.broadcast_to(step_size, (num_temperatures, *step_size.shape)))

    def bridge(draw: tuple[Params, Array]) -> Bridge:
        params, key = draw
        path = Path(
            lambda u: potential_at(site.distribution, site.transform, u), lambda u: _difference(site, params, u)
        )
        ends = anneal(kernel, key, path, position, ladder, options)
        found, weighted = pass_of(*ends), pass_of(*ends, log_island_weights)
        # The tail is judged inside islands' terms: their weights, tied inside an island, would hide it.
        return Bridge(found.log_ratios, weighted.ess(), found.khat(), found.moves.acceptance)

    num_draws = jax.tree.leaves(draws)[0].shape[0]
    return lax.map(bridge, (draws, random.split(rng_key, num_draws)))
