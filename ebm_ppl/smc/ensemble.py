"""Weighted walkers in islands, and their resampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.smc.resampling import Resampling
from ebm_ppl.smc.weights import log_mean_exp


class Ensemble(NamedTuple):
    """Weighted walkers and the log normalisers of their islands' past resamplings.

    Attributes:
        position: Walkers in base-standard coordinates, ``(num_chains, num_walkers,
            *batch, *event)``.
        potential: Potential U of the walkers, ``(num_chains, num_walkers, *batch)``.
        log_weight: Log weights A, same shape.
        past: Sum of the log-mean-exps at past resamplings, ``(num_chains, *batch)``.
    """

    position: Array
    potential: Array
    log_weight: Array
    past: Array

    @property
    def log_normalizers(self) -> Array:
        """``log Ẑ_c`` of every island, ``(num_chains, *batch)``."""
        return self.past + log_mean_exp(self.log_weight, axis=1)


def resample_islands(
    rng_key: Array, ensemble: Ensemble, low: Array, resampling: Resampling
) -> Ensemble:
    """Resample the islands (and batch elements) where ``low``; keep the others.

    ``low`` is boolean, ``(num_chains, *batch)``.
    """
    ancestors = ancestors_where(rng_key, ensemble.log_weight, low, resampling)
    return resampled_where(low, ensemble, ancestors)


def resampled_where(low: Array, ensemble: Ensemble, ancestors: Array) -> Ensemble:
    """Copies of ``ancestors`` with equal weights; their islands' Ẑ so far in ``past``."""
    return Ensemble(
        position=of_ancestors(ensemble.position, ancestors),
        potential=of_ancestors(ensemble.potential, ancestors),
        log_weight=jnp.where(low[:, None], 0.0, ensemble.log_weight),
        past=jnp.where(low, ensemble.log_normalizers, ensemble.past),
    )


def ancestors_where(
    rng_key: Array, log_weight: Array, low: Array, resampling: Resampling
) -> Array:
    """The walker that each one becomes a copy of, itself where not ``low``."""
    flat = jnp.moveaxis(log_weight, 1, -1).reshape(-1, log_weight.shape[1])
    picked = jax.vmap(resampling)(random.split(rng_key, flat.shape[0]), flat)
    picked = jnp.moveaxis(picked.reshape((*low.shape, log_weight.shape[1])), -1, 1)
    stay = jnp.arange(log_weight.shape[1]).reshape(
        (1, -1) + (1,) * (log_weight.ndim - 2)
    )
    return jnp.where(low[:, None], picked, stay)


def of_ancestors(value: Array, ancestors: Array) -> Array:
    """Values ``(num_chains, num_walkers, *batch, ...)`` of the walkers' ancestors."""

    def gather(value: Array, indices: Array) -> Array:
        return value.at[indices].get(mode="promise_in_bounds")

    # One index gathers a whole event; take_along_axis would build an index for every
    # element.
    for _ in range(ancestors.ndim - 2):
        gather = jax.vmap(gather, (1, 1), 1)
    return jax.vmap(gather)(value, ancestors)


class Moves(NamedTuple):
    """Statistics of the moves along a ladder, each of the batch shape.

    Attributes:
        acceptance: Mean acceptance.
        turnover: Mean squared jump over the walkers' variance, summed over
            temperatures; about 1 when walkers have moved as far as they are spread.
    """

    acceptance: Array
    turnover: Array


def unmoved(like: Array) -> Moves:
    """Statistics where no move was needed: acceptance 1, infinite turnover."""
    return Moves(jnp.ones_like(like), jnp.full_like(like, jnp.inf))
