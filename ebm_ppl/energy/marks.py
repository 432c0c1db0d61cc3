"""Points at which an energy is recorded."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from ebm_ppl.energy.base_programs import draws_of
from ebm_ppl.energy.coordinates import standardizing_transform
from ebm_ppl.energy.supports import bijector_of, is_improper
from ebm_ppl.energy.wrappers import innermost

# Points are kept at several distances, in units of the base's spread, and on a grid in
# one or two dimensions.
DISTANCES = (1.0, 3.0, 10.0)

GRID_POINTS = {1: 257, 2: 25}

# At most this many points of each kind, and numbers in all points together.
MAX_POINTS = 64

MAX_NUMBERS = 2**20

# Finite supports of at most this many states are kept whole.
MAX_STATES = 1024


def points_kept(shape: tuple[int, ...]) -> int:
    """Number of points of one kind to keep: fewer if a point's ``shape`` is large."""
    return max(2, min(MAX_POINTS, MAX_NUMBERS // (8 * max(math.prod(shape), 1))))


def points_of(distribution: Any) -> Array:
    """Points at which a distribution's energy is recorded."""
    base, num = (
        distribution.base,
        points_kept(distribution.batch_shape + distribution.event_shape),
    )
    if base.support.is_discrete:
        return _discrete_points(base, num)

    named = [
        d for d in (base, distribution.start) if d is not None and not is_improper(d)
    ]
    transform = standardizing_transform(named[0]) if named else bijector_of(base)
    shape = transform.inverse_shape(base.batch_shape + base.event_shape)
    num_batch_dims = len(base.batch_shape)
    num_dims = math.prod(shape[num_batch_dims:])

    # NumPy draws do not depend on JAX's precision or random generator.
    generator = np.random.default_rng(0)
    positions = [scale * generator.normal(size=(num, *shape)) for scale in DISTANCES]
    if num_dims in GRID_POINTS and num == MAX_POINTS:
        grid = _grid(num_batch_dims, shape[num_batch_dims:])
        positions.append(np.broadcast_to(grid, (len(grid), *shape)))

    points = [transform(jnp.asarray(np.concatenate(positions), jnp.result_type(float)))]
    points += [draws_of(proper, random.key(0), num) for proper in named]
    return jnp.concatenate(points)


def _grid(num_batch_dims: int, event_shape: tuple[int, ...]) -> np.ndarray:
    """Grid points, finer near the centre, that reach as far as the random points."""
    num_dims = math.prod(event_shape)
    edges = np.sinh(
        np.linspace(-1, 1, GRID_POINTS[num_dims]) * np.arcsinh(3 * DISTANCES[-1])
    )
    mesh = np.stack(np.meshgrid(*[edges] * num_dims, indexing="ij"), -1).reshape(
        -1, num_dims
    )
    return mesh.reshape(-1, *(1,) * num_batch_dims, *event_shape)


def _discrete_points(base: Any, num: int) -> Array:
    """Draws of a discrete base, and states of a finite support.

    A small support gives all its states, a larger one a uniform sample of them.
    """
    points = [] if is_improper(base) else [draws_of(base, random.key(0), num)]

    support = _states_of(innermost(base))
    if support is not None:
        digits = _digits(len(support), math.prod(base.event_shape), num)
        states = support[digits].reshape(
            -1, *(1,) * len(base.batch_shape), *base.event_shape
        )
        points.append(
            jnp.broadcast_to(
                states, (len(digits), *base.batch_shape, *base.event_shape)
            )
        )

    # A masked base has no total mass, but draws.
    return jnp.concatenate(points or [draws_of(base, random.key(0), num)])


def _states_of(element: Any) -> Array | None:
    """The states of one element if all elements have the same, otherwise None."""
    if not element.has_enumerate_support or element.event_shape:
        return None
    try:
        return jnp.ravel(element.enumerate_support(expand=False))
    except NotImplementedError:  # unequal bounds
        return None


def _digits(size: int, num_elements: int, num: int) -> np.ndarray:
    if num_elements * math.log(size) <= math.log(min(MAX_STATES, 16 * num)):
        return np.indices((size,) * num_elements).reshape(num_elements, -1).T

    digits = np.random.default_rng(0).integers(size, size=(4 * num, num_elements))
    # Also states whose elements are all equal: extreme for most energies.
    alike = np.unique(np.linspace(0, size - 1, min(size, num)).astype(int))
    digits[: len(alike)] = alike[:, None]
    return digits
