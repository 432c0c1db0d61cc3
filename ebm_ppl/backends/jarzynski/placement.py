"""Placement of one site's walkers, at the start of a fit or for a refresh."""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.jarzynski.warnings import warn_where_islands_disagree
from ebm_ppl.energy.start import starting_coordinates
from ebm_ppl.kernels.base import Kernel, initial_step_size
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.walkers.placement import anneal_site
from ebm_ppl.walkers.site import SiteAtParams
from ebm_ppl.walkers.state import Walkers, initial_gradient


def place_walkers(
    rng_key: Array,
    name: str,
    bound: BoundModel,
    params: Params,
    kernel: Kernel,
    options: AnnealingOptions,
    *,
    num_chains: int,
    num_walkers: int,
    num_holdout_chains: int,
    num_temperatures: int | None,
    transform: Transform | None = None,
) -> Walkers:
    """Walkers of the energy at ``params``: draws of the start, annealed if needed.

    No initial gradient is computed where all islands are held out.
    """
    if transform is None:
        distribution = bound.energies(params)[name]
        transform = starting_coordinates(distribution, name)
    site = SiteAtParams(name, bound, params, transform)

    # Kernels without an accept step would bias the first walkers.
    is_exact = kernel.target_acceptance is not None
    annealed = anneal_site(
        rng_key,
        site,
        kernel if is_exact else MALA(kernel.step_size),
        options,
        num_chains=num_chains,
        num_walkers=num_walkers,
        num_temperatures=num_temperatures,
    )
    ensemble, step_size = annealed.ensemble, annealed.ladder.step_sizes[-1]
    warn_where_islands_disagree(name, ensemble)

    if not is_exact:
        step_size = jnp.full_like(step_size, initial_step_size(kernel, site.dimension))
    walkers = Walkers(ensemble, step_size, transform, None, num_holdout_chains)
    if ensemble.log_normalizer.ndim == 1 and num_chains > num_holdout_chains:
        return replace(walkers, gradient=initial_gradient(site, walkers))
    return walkers
