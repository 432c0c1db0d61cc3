"""Whether a starting distribution's own density is normalised in single precision.

Annealing takes log Z = 0 at its start for granted, and quadrature's log Z contains the
base's constant.  NumPyro computes some constants by subtracting numbers that are nearly
equal: the mass between two bounds far out in a tail, or log-gamma functions of large
numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random

from ebm_ppl.energy.base_programs import draws_of, unchecked_log_prob
from ebm_ppl.energy.supports import is_improper
from ebm_ppl.energy.wrappers import innermost

NUM_DRAWS = 256

# Their constants are closed forms of one scale: nothing to check, and time saved.
WITHOUT_CANCELLATION = (
    dist.Cauchy,
    dist.Exponential,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.Laplace,
    dist.Logistic,
    dist.Normal,
    dist.Uniform,
)

# In nats: a tenth of what LOO over a hundred rows could tell.
MAX_ERROR = 1e-3


def normalization_error(start: dist.Distribution) -> np.ndarray:
    """Log of what the start's density integrates to, ``batch``; 0 where it is exact.

    The density is held against the same one in double precision, at draws of it.
    """
    zeros = np.zeros(start.batch_shape)
    if isinstance(innermost(start), WITHOUT_CANCELLATION):
        return zeros
    if is_improper(start) or jnp.result_type(float) == jnp.float64:
        return zeros

    try:
        draws = draws_of(start, random.key(0), NUM_DRAWS)
        single = np.asarray(unchecked_log_prob(start, draws), np.float64)
        with jax.enable_x64(True):
            double = np.asarray(unchecked_log_prob(_doubled(start), _doubled(draws)))
    except Exception:
        # A distribution of the user's that has no sampler, or works in one precision.
        return zeros

    is_known = np.isfinite(double)
    gap = np.where(is_known, single, 0.0) - np.where(is_known, double, 0.0)
    return np.median(np.where(np.isnan(gap), np.inf, gap), axis=0)


def _doubled(tree: Any) -> Any:
    def double(leaf: Any) -> Array:
        values = np.asarray(leaf)
        is_real = jnp.issubdtype(values.dtype, jnp.floating)
        return jnp.asarray(values.astype(np.float64) if is_real else values)

    return jax.tree.map(double, tree)


def not_normalized(error: float) -> str:
    """Flag for a start whose density is not normalised; ``{where}`` is left open."""
    return (
        "the density of the base (or start) itself integrates to "
        f"exp(±{error:.2g}) in single precision{{where}}, and log Z is off by that: "
        "choose a base whose constants are not differences of nearly equal numbers, or "
        "run in double precision (jax.config.update('jax_enable_x64', True))."
    )
