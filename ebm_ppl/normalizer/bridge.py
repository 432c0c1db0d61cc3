"""log Z at many parameter values, each bridged from walkers at one reference value.

Posterior draws lie close together: a few temperatures carry the reference's walkers to
any of them, and errors do not accumulate as they would along a path from draw to draw.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from ebm_ppl.energy.log_normalizer import SiteCertificate
from ebm_ppl.energy.start import potential_at, starting_coordinates
from ebm_ppl.kernels.base import Kernel, Tuning
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.certify import certify, disagreement
from ebm_ppl.normalizer.certify_draws import certify_bridges
from ebm_ppl.normalizer.findings import Bridge
from ebm_ppl.normalizer.passes import Plan, run_passes
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.passes import pass_of
from ebm_ppl.smc.path import Ladder, Path
from ebm_ppl.walkers.site import SiteAtParams

MAX_TEMPERATURES = 256

NUM_ROWS = 256


class Reference(NamedTuple):
    """Walkers at the reference parameters.

    Attributes:
        site: The energy site at the reference parameters.
        certificate: Its log Z.
        position: Equally weighted walkers, ``(num_chains, num_walkers, *batch,
            *event)``.
        tuning: Tuning of the kernel that moves them.
    """

    site: SiteAtParams
    certificate: SiteCertificate
    position: Array
    tuning: Tuning


def bridge_to_draws(
    rng_key: Array,
    reference: Reference,
    draws: Params,
    plan: Plan,
    tolerance: float,
    rows: Array | None,
) -> tuple[SiteCertificate, int]:
    """Log Z at every parameter draw, the reference's uncertainty included.

    The reference's walkers miss modes that have almost no mass at the reference.  So
    the few draws that differ most from it are annealed to on their own, in both
    directions and with the data rows, and the results are compared.

    Args:
        rng_key: A JAX PRNG key.
        reference: Walkers and log Z at parameters near the middle of the draws.
        draws: Parameters with one leading axis.
        plan: Settings of the moves, and of annealing to single draws.
        tolerance: Widest acceptable bracket, in nats.
        rows: Data rows of the site, ``(num_rows, *batch, *event)``.

    Returns:
        A certificate whose arrays have the draws' axis first, and the number of energy
        evaluations.
    """
    key_bridge, key_alone = random.split(rng_key)

    # Temperatures
    site, position, options = reference.site, reference.position, plan.options
    level, variance = _level_and_variance(site, position, draws)
    worst = float(jnp.max(variance))
    # Steps whose log weights have variance 0.1 have a conditional ESS of 0.9.
    num_temperatures = 2
    while num_temperatures**2 < 10 * worst and num_temperatures < MAX_TEMPERATURES:
        num_temperatures *= 2

    # Bridge
    islands = reference.certificate.log_normalizers - reference.certificate.estimate
    bridges = _bridges(
        site,
        position,
        draws,
        level,
        reference.tuning,
        islands,
        key_bridge,
        plan.kernel,
        options,
        num_temperatures,
    )

    num_draws = jax.tree.leaves(draws)[0].shape[0]
    per_draw = (
        position.shape[0]
        * position.shape[1]
        * (1 + num_temperatures * options.num_kernel_steps)
    )
    certificate = certify_bridges(reference.certificate, bridges, tolerance)

    # Compare
    unlike = _draws_unlike(reference, draws, variance, certificate, rows)
    flags, spent = certificate.flags, num_draws * per_draw
    for index, how in unlike.items():
        alone, more = _alone(
            random.fold_in(key_alone, index), site, draws, index, plan, tolerance, rows
        )
        # Flags of one draw come before those of all.
        flags = disagreement(certificate, index, alone, len(unlike), how) + flags
        spent += more

    return certificate._replace(flags=flags), spent


def _alone(
    rng_key: Array,
    site: SiteAtParams,
    draws: Params,
    index: int,
    plan: Plan,
    tolerance: float,
    rows: Array | None,
) -> tuple[SiteCertificate, int]:
    """Log Z at one draw by annealing to it, and the energy evaluations spent."""
    # The site, in the coordinates of its own start
    params = jax.tree.map(lambda leaf: leaf[index], draws)
    there = replace(site, params=params, reference=None)
    there = replace(
        there,
        transform=starting_coordinates(there.distribution, site.name),
    )

    found = run_passes(rng_key, there, plan, None, rows)
    return certify(found.findings, tolerance), found.num_evaluations


def _draws_unlike(
    reference: Reference,
    draws: Params,
    variance: Array,
    bridged: SiteCertificate,
    rows: Array | None,
) -> dict[int, str]:
    """Indices of the draws least like the reference, each with the reason."""
    num_draws = variance.shape[0]
    distance = np.asarray(_distances(draws, reference.site.params))
    chosen: dict[int, str] = {}

    def choose(score: Array | np.ndarray, how: str) -> None:
        flat = np.asarray(score).reshape(num_draws, -1)
        flat = np.where(np.isnan(flat), np.inf, flat).max(axis=1)
        # A draw equal to the reference has nothing to compare.
        flat[distance == 0] = -np.inf
        if np.max(flat) > -np.inf:
            chosen.setdefault(int(np.argmax(flat)), how)

    choose(variance, "the energy differs most from that in the middle")
    choose(distance, "farthest from the draw in the middle")

    if rows is not None:
        even = np.unique(np.linspace(0, rows.shape[0] - 1, NUM_ROWS).astype(int))
        gain = (
            -_mean_potential(
                reference.site, reference.site.transform.inv(rows[even]), draws
            )
            - bridged.estimate
        )
        choose(gain, "the highest likelihood, unless its log Z is too small")

    nearest = [distance] + [
        _distances(draws, jax.tree.map(lambda leaf, i=i: leaf[i], draws))
        for i in chosen
    ]
    choose(
        np.min(np.stack([np.asarray(d) for d in nearest]), axis=0),
        "far from all others that were looked at",
    )

    return chosen


@jax.jit
def _distances(draws: Params, params: Params) -> Array:
    """Squared distance of every draw from one point, ``(num_draws,)``.

    Coordinates are in units of their spread over the draws.
    """

    def distance(leaf: Array, centre: Array) -> Array:
        flat = leaf.reshape(leaf.shape[0], -1)
        spread = jnp.std(flat, axis=0)
        return jnp.sum(
            ((flat - jnp.ravel(centre)) / jnp.where(spread > 0, spread, 1.0)) ** 2,
            axis=1,
        )

    return sum(jax.tree.leaves(jax.tree.map(distance, draws, params)))  # type: ignore[return-value]


@jax.jit
def _mean_potential(site: SiteAtParams, position: Array, draws: Params) -> Array:
    """Mean of U over data rows at every draw, ``(num_draws, *batch)``."""

    def at(params: Params) -> Array:
        return jnp.mean(
            potential_at(
                site.bound.energies(params)[site.name], site.transform, position
            ),
            axis=0,
        )

    return lax.map(at, draws)


def _difference(site: SiteAtParams, params: Params, position: Array) -> Array:
    """U_θ − U_reference in the reference's coordinates."""
    there = site.bound.energies(params)[site.name]
    return potential_at(there, site.transform, position) - potential_at(
        site.distribution, site.transform, position
    )


@jax.jit
def _level_and_variance(
    site: SiteAtParams, position: Array, draws: Params
) -> tuple[Array, Array]:
    """Median and variance over walkers of U_θ − U_reference.

    Both are ``(num_draws, *batch)``.  The negative difference is the log weight of one
    step from the reference to a draw.
    """

    def at(params: Params) -> tuple[Array, Array]:
        difference = _difference(site, params, position)
        level = jnp.median(difference, axis=(0, 1))
        level = jnp.where(jnp.isfinite(level), level, 0.0)
        return level, jnp.var(difference - level, axis=(0, 1))

    return lax.map(at, draws)


@partial(jax.jit, static_argnames=("kernel", "options"))
def _bridges(
    site: SiteAtParams,
    position: Array,
    draws: Params,
    levels: Array,
    tuning: Tuning,
    log_island_weights: Array,
    rng_key: Array,
    kernel: Kernel,
    options: AnnealingOptions,
    num_temperatures: int,
) -> Bridge:
    # One program for any number of temperatures
    betas = jnp.minimum(jnp.arange(1, MAX_TEMPERATURES + 1) / num_temperatures, 1.0)
    ladder = Ladder(
        jnp.zeros(()),
        betas,
        jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (MAX_TEMPERATURES, *leaf.shape)), tuning
        ),
    )

    def bridge(draw: tuple[Params, Array, Array]) -> Bridge:
        params, level, key = draw
        path = Path(
            lambda u: potential_at(site.distribution, site.transform, u),
            lambda u: _difference(site, params, u) - level,
        )
        ends = anneal(kernel, key, path, position, ladder, options, num_temperatures)
        found, weighted = pass_of(*ends), pass_of(*ends, log_island_weights)

        # k̂ is taken without the island weights, which are equal within an island and
        # would hide the tail.
        return Bridge(
            found.log_ratios,
            weighted.ess(),
            found.khat(),
            found.moves.acceptance,
            level,
        )

    num_draws = jax.tree.leaves(draws)[0].shape[0]
    return lax.map(bridge, (draws, levels, random.split(rng_key, num_draws)))
