"""Resampling schemes: ``(rng_key, log_weights) -> ancestor indices``.

Indices are sorted, so duplicates are adjacent.  Any function of that signature can be
given as ``resampling=``.  The indices' expected counts must be proportional to the
weights, so that the estimate of Z stays unbiased.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, random


class Resampling(Protocol):
    """``(rng_key, log_weights) -> indices``, both of shape ``(num_walkers,)``."""

    def __call__(self, rng_key: Array, log_weights: Array) -> Array: ...  # noqa: D102


@jax.jit
def invert_cdf(log_weights: Array, uniforms: Array) -> Array:
    """Indices at which the distribution function passes the uniforms."""
    # A parallel float32 cumsum is not monotone to the last bit, so a walker of zero
    # weight could be selected.  It gets exactly its predecessor's value instead, and no
    # index exceeds the last walker of positive weight.
    weights = jnp.exp(log_weights - jnp.max(log_weights))
    alive = weights > 0
    cumulative = jnp.where(alive, jnp.cumsum(weights), -jnp.inf)
    cumulative = jnp.maximum.accumulate(cumulative)
    last_alive = log_weights.shape[0] - 1 - jnp.argmax(alive[::-1])
    indices = jnp.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
    return jnp.minimum(indices, last_alive)


def systematic(rng_key: Array, log_weights: Array) -> Array:
    """Systematic resampling: one uniform, N evenly spaced points.

    Source: Carpenter, Clifford and Fearnhead (1999).

    Args:
        rng_key: A JAX PRNG key.
        log_weights: Unnormalised, shape ``(num_walkers,)``; −inf is never selected, not
            even in float32.

    Returns:
        Ancestor indices, shape ``(num_walkers,)``, sorted.
    """
    num = log_weights.shape[0]
    uniforms = (jnp.arange(num) + random.uniform(rng_key, (), log_weights.dtype)) / num
    return invert_cdf(log_weights, uniforms)


def multinomial(rng_key: Array, log_weights: Array) -> Array:
    """Multinomial resampling: N independent draws, sorted.

    Arguments are those of :func:`systematic`.
    """
    uniforms = jnp.sort(random.uniform(rng_key, log_weights.shape, log_weights.dtype))
    return invert_cdf(log_weights, uniforms)


def residual(rng_key: Array, log_weights: Array) -> Array:
    """Residual resampling: ⌊N w⌋ copies of each walker, and the rest multinomial.

    Source: Liu and Chen (1998).  Arguments are those of :func:`systematic`.
    """
    num = log_weights.shape[0]
    expected = num * jax.nn.softmax(log_weights)
    copies = jnp.floor(expected)

    # Of the copies first, as many as there are, and then of the others.
    of_copies = jnp.repeat(
        jnp.arange(num), copies.astype(jnp.int32), total_repeat_length=num
    )
    num_copies = jnp.sum(copies).astype(jnp.int32)
    uniforms = random.uniform(rng_key, (num,), log_weights.dtype)
    of_others = invert_cdf(jnp.log(expected - copies), uniforms)
    return jnp.sort(jnp.where(jnp.arange(num) < num_copies, of_copies, of_others))
