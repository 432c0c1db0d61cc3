"""Poles of an energy: points near which it falls like ``a log r``.

The mass within r of such a point scales as ``r^(d − a)`` in d dimensions: with a near d
walkers miss it, and with a over d the integral diverges.  Walkers come no nearer to the
point than a step length, and show no drift at the distances they visit.  Descending the
energy from the lowest walkers finds the point.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ebm_ppl.energy.start import potential_at, target_of
from ebm_ppl.kernels.base import KernelState, choose
from ebm_ppl.walkers.site import SiteAtParams

NUM_STARTS, NUM_STEPS, NUM_DIRECTIONS = 8, 200, 8

# Distances at which the energy is evaluated, in units of the walkers' spread, each a
# hundredth of the one before: a narrow well is flat at some of them, a pole at none.
RADII = (1e-1, 1e-3, 1e-5)


@jax.jit
def steepest_fall(site: SiteAtParams, position: Array) -> Array:
    """Nats that U falls per e-fold of distance to the lowest points nearby, ``batch``.

    This is a at a pole, and near 0 elsewhere.

    Args:
        site: The site.
        position: Walkers at the energy, ``(num_chains, num_walkers, *batch, *event)``.
    """
    # Lowest walkers
    flat = position.reshape(-1, *position.shape[2:])
    potential = potential_at(site.distribution, site.transform, flat)
    event_axes = tuple(range(potential.ndim, flat.ndim))
    lowest = jnp.argsort(potential, axis=0)[:NUM_STARTS]
    start = jnp.take_along_axis(flat, _with_event(lowest, event_axes), axis=0)
    spread = jnp.sqrt(
        jnp.mean(jnp.var(flat, axis=0), axis=tuple(axis - 1 for axis in event_axes))
    )

    # Descend
    centre = _descend(
        site, start, jnp.broadcast_to(RADII[0] * spread, lowest.shape), event_axes
    )

    # NumPy's generator: its numbers do not depend on JAX's dtypes or PRNG.
    numbers = np.random.default_rng(0).normal(
        size=(NUM_DIRECTIONS, *(flat.shape[axis] for axis in event_axes))
    )
    lengths = np.sqrt((numbers**2).sum(tuple(range(1, numbers.ndim)), keepdims=True))
    directions = jnp.asarray(numbers / lengths, flat.dtype)

    # Slope
    around = [
        _at_distance(site, centre, radius * spread, directions, event_axes)
        for radius in RADII
    ]
    falls = [
        (far - near) / math.log(RADII[0] / RADII[1])
        for far, near in itertools.pairwise(around)
    ]
    return jnp.max(jnp.minimum(*falls), axis=0)


def _with_event(values: Array, event_axes: tuple[int, ...]) -> Array:
    return values.reshape(values.shape + (1,) * len(event_axes))


def _descend(
    site: SiteAtParams, start: Array, step: Array, event_axes: tuple[int, ...]
) -> Array:
    """Gradient descent whose step grows on success and halves on failure."""
    target = target_of(site.distribution, site.transform)

    def body(_: int, carry: tuple[KernelState, Array]) -> tuple[KernelState, Array]:
        state, step = carry
        norm = jnp.sqrt(jnp.sum(state.grad**2, axis=event_axes))
        length = jnp.where(norm > 0, step / norm, 0.0)
        proposal = target.value_and_grad(
            state.position - _with_event(length, event_axes) * state.grad
        )

        is_lower = proposal.potential < state.potential
        step = step * jnp.where(is_lower, 1.5, 0.5)
        return choose(is_lower, proposal, state), step

    first = target.value_and_grad(start)
    return lax.fori_loop(0, NUM_STEPS, body, (first, step))[0].position


def _at_distance(
    site: SiteAtParams,
    centre: Array,
    radius: Array,
    directions: Array,
    event_axes: tuple[int, ...],
) -> Array:
    """Mean potential at points around each centre, ``(num_starts, *batch)``."""
    num_batch_dims = centre.ndim - 1 - len(event_axes)
    offsets = directions.reshape(
        len(directions), 1, *(1,) * num_batch_dims, *directions.shape[1:]
    )
    points = centre + _with_event(radius, event_axes) * offsets

    potential = potential_at(
        site.distribution, site.transform, points.reshape(-1, *points.shape[2:])
    )
    return jnp.mean(potential.reshape(points.shape[: 2 + num_batch_dims]), axis=0)
