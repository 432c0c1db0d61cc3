"""Which energy a log Z belongs to: values of U = E − log base where it matters, kept beside the estimate."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax, random

from ebm_ppl.errors import at_site
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.supports import bijector_of, is_improper, unchecked_log_prob

# Relative to how far an energy is from its median over the points, and in nats.
TOLERANCE = 3e-4
# Of float rounding, in units of its precision at the size of E and of log base.
ROUNDING = 16.0
# Points are kept at several distances, in units of the base's spread, and on a grid in
# one or two dimensions.
DISTANCES = (1.0, 3.0, 10.0)
GRID_POINTS = {1: 257, 2: 25}
# Of each kind of points at most so many, and all together at most so many numbers.
MAX_POINTS = 64
MAX_NUMBERS = 2**20
# States of a finite support that are all kept.
MAX_STATES = 1024


class Fingerprint(NamedTuple):
    """Energies at points.

    Attributes:
        points: ``(num_points, *batch, *event)``.
        energy: E there, ``(num_points, *batch)``.
        log_base: log base there, same shape.
    """

    points: Array
    energy: Array
    log_base: Array


def fingerprint(distribution: Any, more: Array | None = None) -> Fingerprint:
    """E and log base at draws of the base, near its centre, far out, and at ``more``
    points.

    Args:
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.
        more: Points where the energy's mass or its data are, ``(num, *batch, *event)``.
    """
    points = _points(distribution)
    if more is not None:
        points = jnp.concatenate([points, more.astype(points.dtype)])

    return _evaluate(distribution, points)


def _evaluate(distribution: Any, points: Array) -> Fingerprint:
    energy = distribution.energy(points)
    log_base = jnp.broadcast_to(
        unchecked_log_prob(distribution.base, points), energy.shape
    )
    return Fingerprint(points, energy, log_base)


def points_kept(shape: tuple[int, ...]) -> int:
    """How many points of one kind are kept: fewer where a point, of this shape, holds many numbers."""
    return max(2, min(MAX_POINTS, MAX_NUMBERS // (8 * max(math.prod(shape), 1))))


def _points(distribution: Any) -> Array:
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

    # NumPy's numbers: the same whatever JAX's types and generators are.
    generator = np.random.default_rng(0)
    positions = [scale * generator.normal(size=(num, *shape)) for scale in DISTANCES]
    if num_dims in GRID_POINTS and num == MAX_POINTS:
        grid = _grid(num_batch_dims, shape[num_batch_dims:])
        positions.append(np.broadcast_to(grid, (len(grid), *shape)))

    points = [transform(jnp.asarray(np.concatenate(positions), jnp.result_type(float)))]
    points += [proper.sample(random.key(0), (num,)) for proper in named]
    return jnp.concatenate(points)


def _grid(num_batch_dims: int, event_shape: tuple[int, ...]) -> np.ndarray:
    """Finer near the centre, and as far out as the points drawn."""
    num_dims = math.prod(event_shape)
    edges = np.sinh(
        np.linspace(-1, 1, GRID_POINTS[num_dims]) * np.arcsinh(3 * DISTANCES[-1])
    )
    mesh = np.stack(np.meshgrid(*[edges] * num_dims, indexing="ij"), -1).reshape(
        -1, num_dims
    )
    return mesh.reshape(-1, *(1,) * num_batch_dims, *event_shape)


def _discrete_points(base: Any, num: int) -> Array:
    """All states of a small finite support; draws of the base and states taken evenly of any other."""
    points = [] if is_improper(base) else [base.sample(random.key(0), (num,))]

    element: Any = base
    while isinstance(
        element, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
    ):
        element = element.base_dist
    support = _states_of(element)
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

    return jnp.concatenate(points)


def _states_of(element: Any) -> Array | None:
    """The states that all elements have, where one list serves them all."""
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
    # All elements alike, too: far out for most energies.
    alike = np.unique(np.linspace(0, size - 1, min(size, num)).astype(int))
    digits[: len(alike)] = alike[:, None]
    return digits


def require_same_energy(
    name: str | None, distribution: Any, expected: Fingerprint
) -> Array | np.ndarray:
    """0 where a distribution has the energies of a fingerprint.

    Energies that depend on nothing traced are compared at once, inside a trace too.
    Others give NaN where they differ.

    Raises:
        ValueError: It is another energy.
    """
    batch_shape = distribution.batch_shape
    event_shape = batch_shape + distribution.event_shape
    fits = (
        expected.points.shape[1:] == event_shape
        and expected.energy.shape[1:] == batch_shape
    )

    with jax.ensure_compile_time_eval():
        if fits:
            found = _evaluate(distribution, expected.points)
            excess, difference = _compare(found, expected)
        else:
            excess = difference = jnp.array(jnp.inf)
        same = excess <= 0

    if isinstance(same, jax.core.Tracer):
        return lax.stop_gradient(jnp.where(same, 0.0, jnp.nan))
    if not bool(same):
        what = (
            f"by up to {float(difference):.3g} nats"
            if fits
            else f"in shape ({event_shape} here)"
        )
        raise ValueError(
            f"log_normalizer belongs to another energy than that{at_site(name)}: at "
            "the points that it was marked "
            f"with they differ {what}, although the parameters' names and values "
            "agree. Another base, other "
            "arguments of the model, or a changed net: estimate it for this very "
            "energy; "
            "log_normalizer.estimate[site] is the bare number."
        )
    # NumPy's number: JAX's would be traced here.
    return np.zeros(())


def _compare(found: Fingerprint, expected: Fingerprint) -> tuple[Array, Array]:
    """The largest difference over what rounding and another machine's arithmetic may make, and without that."""
    precision = float(jnp.finfo(expected.energy.dtype).eps)
    worst, largest = jnp.array(-jnp.inf), jnp.zeros(())

    for here, there in (
        (found.energy, expected.energy),
        (found.log_base, expected.log_base),
    ):
        size = jnp.abs(there)
        # How much E varies, not how large it is: an offset must not hide a difference.
        spread = jnp.abs(
            there
            - jnp.nanmedian(jnp.where(jnp.isfinite(there), there, jnp.nan), axis=0)
        )
        allowed = TOLERANCE * (1.0 + spread) + ROUNDING * precision * size
        difference = jnp.where(_identical(here, there), 0.0, jnp.abs(here - there))
        excess = jnp.where(_identical(here, there), -jnp.inf, difference - allowed)
        worst = jnp.maximum(
            worst, jnp.max(jnp.where(jnp.isnan(excess), jnp.inf, excess))
        )
        largest = jnp.maximum(
            largest, jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference))
        )

    return worst, largest


def _identical(one: Array, other: Array) -> Array:
    return (one == other) | (jnp.isnan(one) & jnp.isnan(other))
