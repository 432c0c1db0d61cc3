"""Moves and resampling of the walkers of all sites."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import target_of
from ebm_ppl.kernels.base import Kernel, KernelInfo, KernelState, move
from ebm_ppl.smc.ensemble import Ensemble, resample_islands
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
    moved_share: float = 1.0,
) -> tuple[dict[str, Walkers], dict[str, Array]]:
    """Move walkers under their energies; tunings follow the training islands alone.

    Args:
        kernel: The Markov kernel.
        rng_key: A JAX PRNG key.
        energies: By site.
        walkers: By site.
        evaluated: Their kernel states, islands merged.
        num_kernel_steps: Moves of every walker.
        moved_share: Share of an island's walkers that move, chosen at random.

    Returns:
        The walkers, and the training islands' mean acceptance, by site.
    """
    moved, acceptance = {}, {}
    for index, (name, site) in enumerate(walkers.items()):
        key = random.fold_in(rng_key, index)
        target = target_of(energies[name], site.transform)
        chosen, before = None, evaluated[name]
        if moved_share < 1.0:
            key, key_choice = random.split(key)
            chosen = _chosen(key_choice, site.log_weight.shape[1], moved_share)
            position = site.ensemble.position[:, chosen]
            before = kernel.evaluate(target, position.reshape(-1, *position.shape[2:]))

        # Move
        after, info = move(kernel, key, before, target, site.tuning, num_kernel_steps)
        num_chains = len(site.log_weight)
        after, info = jax.tree.map(
            lambda v, n=num_chains: v.reshape(n, -1, *v.shape[1:]), (after, info)
        )

        # Adapt
        training = info.acceptance[: site.num_training_chains]
        acceptance[name] = jnp.mean(training, axis=(0, 1))
        tuning = kernel.adapt(site.tuning, acceptance[name])

        ensemble = _with_moves(site.ensemble, after, info, chosen)
        moved[name] = replace(site, ensemble=ensemble, tuning=tuning)

    return moved, acceptance


def _chosen(rng_key: Array, num_walkers: int, share: float) -> Array:
    """Indices of the walkers that move; whatever they are, so the choice is no bias."""
    num_moved = max(1, round(share * num_walkers))
    return random.permutation(rng_key, num_walkers)[:num_moved]


def _with_moves(
    ensemble: Ensemble, after: KernelState, info: KernelInfo, chosen: Array | None
) -> Ensemble:
    """Walkers after their moves; all but the chosen ones stay, where any were."""
    if chosen is None:
        return ensemble._replace(
            position=after.position,
            potential=after.potential,
            log_weight=ensemble.log_weight + info.log_weight,
        )
    return ensemble._replace(
        position=ensemble.position.at[:, chosen].set(after.position),
        potential=ensemble.potential.at[:, chosen].set(after.potential),
        log_weight=ensemble.log_weight.at[:, chosen].add(info.log_weight),
    )


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
