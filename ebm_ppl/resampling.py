"""Resampling schemes: ``(rng_key, log_weights) -> ancestor indices``, sorted,
duplicates adjacent.

Any function of that signature can be given as ``resampling=``.  The indices' expected
counts must be proportional to the weights: then the estimate of Z stays unbiased.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, random


class Resampling(Protocol):
    """``(rng_key, log_weights) -> indices``, both of shape ``(num_walkers,)``."""

    def __call__(self, rng_key: Array, log_weights: Array) -> Array: ...  # noqa: D102


@jax.jit
def _invert_cdf(log_weights: Array, sorted_uniforms: Array) -> Array:
    # A parallel float32 cumsum is not monotone to the last bit, so a walker of zero
    # weight could own a sliver of [0, 1): give it its predecessor's value exactly, and
    # never step past the last walker of positive weight.
    weights = jnp.exp(log_weights - jnp.max(log_weights))
    alive = weights > 0
    cumulative = jnp.where(alive, jnp.cumsum(weights), -jnp.inf)
    cumulative = jnp.maximum.accumulate(cumulative)
    last_alive = log_weights.shape[0] - 1 - jnp.argmax(alive[::-1])
    indices = jnp.searchsorted(
        cumulative, sorted_uniforms * cumulative[-1], side="right"
    )
    return jnp.minimum(indices, last_alive)


def systematic(rng_key: Array, log_weights: Array) -> Array:
    """Systematic resampling (Carpenter, Clifford and Fearnhead 1999): one uniform, N
    evenly spaced points.

    Args:
        rng_key: A JAX PRNG key.
        log_weights: Unnormalised, shape ``(num_walkers,)``; −inf is never selected, in
            float32 either.

    Returns:
        Ancestor indices, shape ``(num_walkers,)``, sorted.
    """
    num = log_weights.shape[0]
    uniforms = (jnp.arange(num) + random.uniform(rng_key, (), log_weights.dtype)) / num
    return _invert_cdf(log_weights, uniforms)


def multinomial(rng_key: Array, log_weights: Array) -> Array:
    """Multinomial resampling: N independent draws, sorted.  Same arguments as :func:`systematic`."""
    uniforms = jnp.sort(random.uniform(rng_key, log_weights.shape, log_weights.dtype))
    return _invert_cdf(log_weights, uniforms)
