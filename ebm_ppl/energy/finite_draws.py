"""Exact draws from energies on finite supports, by the weights of all states."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.nn import logsumexp

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.states import in_blocks, states_in_support
from ebm_ppl.energy.unnormalized import Unnormalized
from ebm_ppl.errors import at_site
from ebm_ppl.smc.resampling import invert_cdf

# Draws that are picked at once.
CHUNK = 1024


def draw_states(
    rng_key: Array,
    distribution: Unnormalized,
    sample_shape: tuple[int, ...],
    name: str | None = None,
) -> Array:
    """Independent draws, ``(*sample_shape, *batch_shape, *event_shape)``.

    Args:
        rng_key: A JAX PRNG key.
        distribution: An energy over a finite support.
        sample_shape: How many.
        name: The site's name, for messages.

    Raises:
        ValueError: The support is not finite, or has more than 2²² states.
    """
    every, inside = states_in_support(distribution.base, distribution.support, name)
    log_base = unchecked_log_prob(distribution.base, every)
    log_value = jnp.where(inside, log_base - distribution.energy(every), -jnp.inf)

    is_usable = jnp.isfinite(logsumexp(log_value, axis=0))
    if not isinstance(is_usable, jax.core.Tracer) and not bool(jnp.all(is_usable)):
        raise ValueError(
            f"The weights of the states of the energy{at_site(name)} have no finite sum "
            "that is over 0: check that the energy is a number, or +inf, at every state "
            "of its support, and finite at some."
        )
    return _drawn(rng_key, every, log_value, is_usable, sample_shape)


@partial(jax.jit, static_argnums=4)
def _drawn(
    rng_key: Array,
    every: Array,
    log_value: Array,
    is_usable: Array,
    sample_shape: tuple[int, ...],
) -> Array:
    batch_shape, count = log_value.shape[1:], math.prod(sample_shape)
    flat = jnp.moveaxis(log_value, 0, -1).reshape(-1, log_value.shape[0])
    keys = random.split(rng_key, flat.shape[0])
    picked = lax.map(lambda both: _picked(both[0], both[1], count), (keys, flat))
    picked = jnp.moveaxis(picked.reshape(*batch_shape, count), -1, 0)

    event_shape = every.shape[log_value.ndim :]
    indices = picked.reshape(picked.shape + (1,) * len(event_shape))
    draws = jnp.take_along_axis(every, indices, axis=0)
    # Inside a compiled program, what cannot be drawn is no state of any support.
    usable = is_usable.reshape(*batch_shape, *(1,) * len(event_shape))
    draws = jnp.where(usable, draws, _nowhere(draws.dtype))
    return draws.reshape(sample_shape + batch_shape + event_shape)


def _nowhere(dtype: jnp.dtype) -> Array:
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    return jnp.asarray(jnp.iinfo(dtype).min if is_whole else jnp.nan, dtype)


def _picked(rng_key: Array, log_value: Array, count: int) -> Array:
    """Indices by weight: a block of states first, then one of its states.

    A cumulative sum over all of up to 2²² states would lose the rare ones to rounding.
    """
    key_block, key_state = random.split(rng_key)
    blocks = in_blocks(log_value)
    uniforms = random.uniform(key_block, (count,), log_value.dtype)
    block = invert_cdf(logsumexp(blocks, axis=1), uniforms)

    def within(element: tuple[Array, Array]) -> Array:
        index, uniform = element
        return index * blocks.shape[1] + invert_cdf(blocks[index], uniform)

    uniforms = random.uniform(key_state, (count,), log_value.dtype)
    return lax.map(within, (block, uniforms), batch_size=CHUNK)
