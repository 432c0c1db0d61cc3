"""Placement of one site's walkers, at the start of a fit or for a refresh."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.jarzynski.warnings import warn_where_islands_disagree
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.walkers.placement import anneal_site
from ebm_ppl.walkers.site import SiteAtParams, coordinates_for
from ebm_ppl.walkers.state import Walkers, initial_gradient


def annealing_options(backend: Any) -> AnnealingOptions:
    """Those of a :class:`Jarzynski`."""
    return AnnealingOptions(
        backend.num_kernel_steps, backend.ess_threshold, backend.resampling
    )


def place_walkers(
    backend: Any,
    rng_key: Array,
    name: str,
    bound: BoundModel,
    params: Params,
    *,
    num_chains: int,
    num_temperatures: int | None,
    transform: Transform | None = None,
) -> Walkers:
    """Walkers of the energy at ``params``: draws of the start, annealed if needed.

    Settings are those of a :class:`Jarzynski`.  No initial gradient is computed where all
    islands are held out.
    """
    kernel, num_holdout_chains = backend.kernel, backend.num_holdout_chains
    site = _site(name, bound, params, kernel)
    if transform is not None:
        site = replace(site, transform=transform)

    # Kernels that are not exact would bias the first walkers.
    annealed = anneal_site(
        rng_key,
        site,
        kernel.exactly(),
        annealing_options(backend),
        num_chains=num_chains,
        num_walkers=backend.num_walkers,
        num_temperatures=num_temperatures,
    )
    ensemble, is_exact = annealed.ensemble, kernel.is_exact
    warn_where_islands_disagree(name, ensemble)

    tuning = annealed.ladder.tuning(-1) if is_exact else site.init_tuning(kernel)
    walkers = Walkers(ensemble, tuning, site.transform, None, num_holdout_chains)
    if ensemble.past.ndim == 1 and num_chains > num_holdout_chains:
        return replace(walkers, gradient=initial_gradient(site, walkers))
    return walkers


def _site(name: str, bound: BoundModel, params: Params, kernel: Kernel) -> SiteAtParams:
    distribution = bound.energies(params)[name]
    transform = coordinates_for(kernel, distribution, name, "placing walkers")
    return SiteAtParams(name, bound, params, transform)


def abstract_walkers(
    backend: Any, rng_key: Array, name: str, bound: BoundModel, params: Params
) -> Walkers:
    """Shapes of :func:`place_walkers`'s result for all islands."""
    site = _site(name, bound, params, backend.kernel)

    def walkers() -> Walkers:
        position = site.draw(rng_key, (backend.num_chains, backend.num_walkers))
        potential = site.path().start(position)
        zeros = jnp.zeros_like(potential)
        ensemble = Ensemble(position, potential, zeros, zeros[:, 0])
        gradient = site.params if zeros.ndim == 2 else None
        tuning = site.init_tuning(backend.kernel)
        num_holdout = backend.num_holdout_chains
        return Walkers(ensemble, tuning, site.transform, gradient, num_holdout)

    return jax.eval_shape(walkers)
