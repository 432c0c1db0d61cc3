"""Checks of random keys."""

from typing import Any

import jax
import numpy as np


def require_key(rng_key: Any) -> None:
    """Refuse what is no JAX PRNG key.

    Raises:
        TypeError: It is something else, such as an integer, or several keys.
    """
    if isinstance(rng_key, jax.Array | np.ndarray):
        if jax.dtypes.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
            is_key = rng_key.ndim == 0
        else:
            is_key = rng_key.dtype == np.uint32 and rng_key.ndim == 1
        if is_key:
            return
        found = f"an array of {rng_key.dtype} and shape {rng_key.shape}"
    else:
        found = f"a {type(rng_key).__name__}"
    raise TypeError(
        f"rng_key is {found}; expected one JAX PRNG key, the first argument: "
        "jax.random.key(0)."
    )
