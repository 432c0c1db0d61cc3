"""Losses of score matching, of every row of one energy."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import potential_at
from ebm_ppl.energy.supports import bijector_of

RowsLoss = Callable[[Array], Array]
"""From rows ``(num_rows, *batch_shape, *event_shape)`` to their losses."""


def exact_loss(energy: EnergyDistribution) -> RowsLoss:
    r"""``½‖∇U‖² − tr ∇²U`` in coordinates u, by one Hessian product per element.

    Source: Hyvärinen (2005), equation 4.
    """
    transform, gradient = in_coordinates(energy)

    def loss(rows: Array) -> Array:
        position = transform.inv(rows)
        slope, product = jax.linearize(gradient, position)
        return 0.5 * _dot(slope, slope, energy) - _trace(product, position, energy)

    return loss


def sliced_loss(
    energy: EnergyDistribution, rng_key: Array, num_slices: int
) -> RowsLoss:
    r"""The same with ``vᵀ∇²U v``, averaged over random signs v, for the trace.

    Source: Song, Garg, Shi and Ermon (2019), equation 8 (its variance reduced).
    """
    transform, gradient = in_coordinates(energy)

    def loss(rows: Array) -> Array:
        position = transform.inv(rows)
        slope, product = jax.linearize(gradient, position)
        shape = (num_slices, *position.shape)
        signs = random.rademacher(rng_key, shape, position.dtype)

        def curvature(sign: Array) -> Array:
            return _dot(sign, product(sign), energy)

        laplacian = jnp.mean(jax.vmap(curvature)(signs), axis=0)
        return 0.5 * _dot(slope, slope, energy) - laplacian

    return loss


def denoising_loss(
    energy: EnergyDistribution, rng_key: Array, noise_scale: float
) -> RowsLoss:
    r"""``½‖ε − σ∇U(u + σε)‖²``, for normal ε: the score of the data with noise.

    Source: Vincent (2011), equation 9, times σ² as in Song and Ermon (2019).
    """
    transform, gradient = in_coordinates(energy)

    def loss(rows: Array) -> Array:
        position = transform.inv(rows)
        noise = random.normal(rng_key, position.shape, position.dtype)
        slope = gradient(position + noise_scale * noise)
        error = noise - noise_scale * slope
        return 0.5 * _dot(error, error, energy)

    return loss


def in_coordinates(
    energy: EnergyDistribution,
) -> tuple[Transform, Callable[[Array], Array]]:
    """The map from coordinates u of the whole space to values, and ∇U of u.

    They are the values themselves where the support is the whole space, and their logs,
    logits or the like elsewhere: the density of u vanishes at the ends, as score
    matching needs.
    """
    transform = bijector_of(energy.base)

    def gradient(position: Array) -> Array:
        potential, pull = jax.vjp(partial(potential_at, energy, transform), position)
        (slope,) = pull(jnp.ones_like(potential))
        return slope

    return transform, gradient


def laplacian_of(
    gradient: Callable[[Array], Array], position: Array, energy: EnergyDistribution
) -> Array:
    """``tr ∇²U`` at positions, ``(num_rows, *batch_shape)``."""
    _, product = jax.linearize(gradient, position)
    return _trace(product, position, energy)


def _trace(
    product: Callable[[Array], Array], position: Array, energy: EnergyDistribution
) -> Array:
    """The trace of a Hessian, by its product with every direction."""
    shape = position.shape[1 + len(energy.batch_shape) :]
    size = math.prod(shape)
    directions = jnp.eye(size, dtype=position.dtype).reshape(size, *shape)

    # One direction after another, computed again on the way back: all at once, or kept,
    # they take as many times the memory, and on a CPU twice the time.
    @jax.checkpoint
    def curvature(direction: Array) -> Array:
        along = jnp.broadcast_to(direction, position.shape)
        return _dot(along, product(along), energy)

    return jnp.sum(lax.map(curvature, directions), axis=0)


def _dot(one: Array, other: Array, energy: EnergyDistribution) -> Array:
    """Inner products over the event."""
    first = 1 + len(energy.batch_shape)
    return jnp.sum(one * other, axis=tuple(range(first, one.ndim)))
