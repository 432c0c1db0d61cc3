"""Share of a density that lies beyond the range of floating point.

``x = exp(u)`` ends at 1e-38 and 1e38, ``expit(u)`` at 1 − 1e-7.  For walkers these are
the ends of the support.  Where a density decays slowly towards them, the mass beyond
them is not negligible.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IdentityTransform,
    IndependentTransform,
    Transform,
)

from ebm_ppl.energy.coordinates import CholeskyAffine

# Width of each of two zones before an edge: absolute in u, or relative to the edge's u
# where that is more (distant edges matter where densities decay slowly).  The ratio of
# the numbers of walkers in the inner and in the outer zone estimates the decay.
ZONE, RELATIVE_ZONE = 4.0, 0.2

# Number of coordinates per walker that are checked, the largest in absolute value.
NUM_COORDINATES = 8

# With fewer walkers than this in the inner zone nothing is extrapolated.
MIN_WALKERS = 5

MAX_FACTOR = 100.0


def has_edges(transform: Transform) -> bool:
    """Whether x can leave the range of floating point while u is still finite."""
    if isinstance(transform, IndependentTransform):
        return has_edges(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return any(has_edges(part) for part in transform.parts)
    return not isinstance(
        transform, IdentityTransform | AffineTransform | CholeskyAffine
    )


@partial(jax.jit, static_argnames="batch_ndims")
def share_beyond(transform: Transform, position: Array, batch_ndims: int) -> Array:
    """Share of the density beyond the edges, ``batch``, from the walkers near them.

    With shares a and b of walkers in the inner and the outer zone, and geometric decay,
    the share beyond the edge is ``a ρ / (1 − ρ)``, ρ = a / b.

    Args:
        transform: x = transform(u).
        position: Equally weighted u, ``(num_chains, num_walkers, *batch, *event)``.
        batch_ndims: Number of batch dimensions.
    """
    inner, both = (
        _count_near(transform, position, batch_ndims, zones) for zones in (1, 2)
    )
    ratio = (inner + 0.5) / (both - inner + 1.0)
    factor = jnp.where(
        ratio < 1.0, ratio / jnp.maximum(1.0 - ratio, 1.0 / MAX_FACTOR), MAX_FACTOR
    )
    share = inner / (position.shape[0] * position.shape[1])
    return jnp.minimum(jnp.where(inner >= MIN_WALKERS, share * factor, share), 1.0)


def _count_near(
    transform: Transform, position: Array, batch_ndims: int, num_zones: int
) -> Array:
    """Number of walkers' coordinates within ``num_zones`` of an edge, ``batch``."""
    lead = position.shape[: 2 + batch_ndims]
    flat = position.reshape(*lead, -1)
    num_looked_at = min(NUM_COORDINATES, flat.shape[-1])
    _, largest = lax.top_k(jnp.abs(flat), num_looked_at)

    def is_near(which: Array) -> Array:
        here = jnp.arange(flat.shape[-1]) == which[..., None]
        outwards = jnp.where(here, jnp.where(flat < 0, -1.0, 1.0), 0.0)
        step = jnp.maximum(
            num_zones * ZONE,
            jnp.abs(flat) * (1.0 / (1.0 - num_zones * RELATIVE_ZONE) - 1.0),
        )

        farther = flat + step * outwards
        first, second = (
            _flushed(transform(u.reshape(position.shape)))
            for u in (farther, farther + outwards)
        )

        # Where x no longer changes with u, or is infinite, u is beyond the edge.
        event_axes = tuple(range(len(lead), first.ndim))
        return jnp.all(first == second, axis=event_axes) | ~jnp.all(
            jnp.isfinite(first), axis=event_axes
        )

    near = jax.vmap(is_near, in_axes=-1)(largest)
    return jnp.sum(near, axis=(0, 1, 2))


def _flushed(value: Array) -> Array:
    """Subnormal numbers as zeros; processors flush them in some operations only."""
    return jnp.where(jnp.abs(value) < jnp.finfo(value.dtype).tiny, 0.0, value)
