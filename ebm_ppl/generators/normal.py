"""The conditional distribution of x given z for generators with normal noise."""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from ebm_ppl.energy.coordinates import standardizing_transform


def standardized_normal(
    base: dist.Distribution, loc: Array, scale: Array | float
) -> dist.Distribution:
    """``T(N(loc, scale²))``, T the map from base-standard coordinates to x.

    Generators draw x given z from it.

    Every base then sees the same generator: a net that returns 0 is at the base's
    centre, ``scale`` is in units of its spread, and draws stay in its support.

    Args:
        base: The energy's base, or any proper distribution of its shape; without a
            batch shape.
        loc: A net's output at z, of the shape of the coordinates (for a base on the
            whole space, its event shape).
        scale: Standard deviation in base-standard units, scalar or like ``loc``.

    Returns:
        A distribution of the base's event shape, with reparametrised draws and a
        density.
    """
    transform = standardizing_transform(base)
    noise = dist.Normal(loc, scale).to_event(jnp.ndim(loc))
    return dist.TransformedDistribution(noise, transform)
