"""How much of a density lies where floating point cannot follow: beyond the last
numbers near a support's end.

``x = exp(u)`` ends at 1e-38 and 1e38, ``expit(u)`` at 1 − 1e-7.  Walkers take those for
the support's ends.  Where a density falls off towards them no faster than what is in
sight, the rest beyond them is not negligible.
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

from ebm_ppl.geometry import CholeskyAffine

# Two zones before an edge, each so wide in u, or in units of the edge's u where that is
# more (far edges matter where densities fall slowly): walkers in the inner over those
# in the outer say how the density falls.
ZONE, RELATIVE_ZONE = 4.0, 0.2
# Coordinates of a walker that are looked at, the largest in size.
NUM_COORDINATES = 8
# With fewer walkers in the inner zone nothing is extrapolated.
MIN_WALKERS = 5
MAX_FACTOR = 100.0


def has_edges(transform: Transform) -> bool:
    """Whether coordinates may leave the range of floating point before they are infinite themselves."""
    if isinstance(transform, IndependentTransform):
        return has_edges(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return any(has_edges(part) for part in transform.parts)
    return not isinstance(
        transform, IdentityTransform | AffineTransform | CholeskyAffine
    )


@partial(jax.jit, static_argnames="batch_ndims")
def share_beyond(transform: Transform, position: Array, batch_ndims: int) -> Array:
    """The share of the density that lies beyond the edges, extrapolated from walkers
    near them, ``batch``.

    With shares a and b of walkers in the inner and the outer zone a density that keeps
    falling like that has ``a ρ / (1 − ρ)``, ρ = a / b, beyond the edge.

    Args:
        transform: x = transform(u).
        position: Equally weighted u, ``(num_chains, num_walkers, *batch, *event)``.
        batch_ndims: How many batch dimensions there are.
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
    """How many coordinates of all walkers are within so many zones of an edge, ``batch``."""
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
        event_axes = tuple(range(len(lead), first.ndim))
        # Where x no longer follows u, or has become infinite, u is off the edge.
        return jnp.all(first == second, axis=event_axes) | ~jnp.all(
            jnp.isfinite(first), axis=event_axes
        )

    near = jax.vmap(is_near, in_axes=-1)(largest)
    return jnp.sum(near, axis=(0, 1, 2))


def _flushed(value: Array) -> Array:
    """Subnormal numbers as zeros, as processors treat them in some operations and not in others."""
    return jnp.where(jnp.abs(value) < jnp.finfo(value.dtype).tiny, 0.0, value)
