"""Moves and resampling of the walkers of all sites."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import target_of
from ebm_ppl.kernels.base import Kernel, KernelState, move
from ebm_ppl.smc.ensemble import resample_islands
from ebm_ppl.smc.resampling import Resampling
from ebm_ppl.smc.weights import ess_fraction
from ebm_ppl.walkers.state import Walkers


def move_walkers(
    kernel: Kernel,
    rng_key: Array,
    energies: dict[str, EnergyDistribution],
    walkers: dict[str, Walkers],
    evaluated: dict[str, KernelState],
    num_kernel_steps: int,
) -> tuple[dict[str, Walkers], dict[str, Array]]:
    """Move walkers under their energies; tunings follow the training islands alone.

    Args:
        kernel: The Markov kernel.
        rng_key: A JAX PRNG key.
        energies: By site.
        walkers: By site.
        evaluated: Their kernel states, islands merged.
        num_kernel_steps: Moves of every walker.

    Returns:
        The walkers, and the training islands' mean acceptance, by site.
    """
    moved, acceptance = {}, {}
    for index, (name, site) in enumerate(walkers.items()):
        # Move
        kernel_state, info = move(
            kernel,
            random.fold_in(rng_key, index),
            evaluated[name],
            target_of(energies[name], site.transform),
            site.tuning,
            num_kernel_steps,
        )
        islands = site.log_weight.shape[:2]
        kernel_state, info = jax.tree.map(
            lambda v, n=islands: v.reshape(*n, *v.shape[1:]), (kernel_state, info)
        )

        # Adapt
        training = info.acceptance[: site.num_training_chains]
        acceptance[name] = jnp.mean(training, axis=(0, 1))
        tuning = kernel.adapt(site.tuning, acceptance[name])

        ensemble = site.ensemble._replace(
            position=kernel_state.position,
            potential=kernel_state.potential,
            log_weight=site.log_weight + info.log_weight,
        )
        moved[name] = replace(site, ensemble=ensemble, tuning=tuning)

    return moved, acceptance


def resample_or_return(
    rng_key: Array,
    all_finite: Array,
    walkers: dict[str, Walkers],
    previous: dict[str, Walkers],
    ess_threshold: float,
    resampling: Resampling,
) -> tuple[dict[str, Walkers], dict[str, Array]]:
    """Resample islands whose own ESS is low, or return to the previous ensembles.

    One ``lax.switch`` of three branches: a ``jnp.where`` between old and new walkers
    would read and write both in full at every step.

    Returns:
        The walkers, and the number of islands resampled, by site.
    """
    kept, resampled = {}, {}
    for index, (name, site) in enumerate(walkers.items()):
        ensemble, key = site.ensemble, random.fold_in(rng_key, index)
        low = ess_fraction(ensemble.log_weight, axis=1) < ess_threshold
        branch = jnp.where(all_finite, jnp.any(low).astype(jnp.int32), 2)

        ensemble = lax.switch(
            branch,
            [
                lambda old, new, key, low: new,
                lambda old, new, key, low: resample_islands(key, new, low, resampling),
                lambda old, new, key, low: old,
            ],
            previous[name].ensemble,
            ensemble,
            key,
            low,
        )
        kept[name] = replace(site, ensemble=ensemble)
        resampled[name] = jnp.sum(low)

    return kept, resampled
