"""Points and energies in the precision that the package computes in."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ebm_ppl.errors import at_site


def as_points(value: ArrayLike, is_discrete: bool) -> Array:
    """Cast values to the dtype in which energies compute, of at least 32 bits.

    Integers become floats on continuous supports.  In the data's own small dtype an
    energy may overflow (int8) or have no derivative.
    """
    value = jnp.asarray(value)
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"Values are {dtype}; expected real numbers.")

    if jnp.issubdtype(dtype, jnp.floating):
        return value.astype(jnp.promote_types(dtype, jnp.float32))
    if not is_discrete:
        return value.astype(jnp.result_type(float))
    return value.astype(jnp.promote_types(dtype, jnp.int32))


def as_energy(energy: Any, name: str, site: str | None) -> Array:
    """Cast what an energy returned to floats of at least 32 bits."""
    dtype = jnp.result_type(energy)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(energy).astype(jnp.promote_types(dtype, jnp.float32))
    if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
        return jnp.asarray(energy).astype(jnp.result_type(float))

    raise TypeError(
        f"Energy factor '{name}'{at_site(site)} returned {dtype}; expected real "
        "numbers, one per event."
    )
