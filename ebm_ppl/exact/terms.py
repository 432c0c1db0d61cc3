"""The terms that an unnormalised log density is the sum of."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.jit
def summed(energies: tuple[Array, ...], log_base: Array) -> tuple[Array, Array]:
    """``log base − ΣE``, and the size of its terms, which sets its rounding."""
    log_value = log_base - sum(energies)
    size = sum(jnp.abs(energy) for energy in energies) + jnp.abs(log_base)
    return log_value, jnp.broadcast_to(size, log_value.shape)
