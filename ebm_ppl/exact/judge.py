"""How far the integral over a cell may be off."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp

from ebm_ppl.exact.rule import (
    ANTIDERIVATIVE,
    NUM_NODES,
    TO_COEFFICIENTS,
    WEIGHTS,
    interpolation,
)
from ebm_ppl.programs.products import einsum, matmul

# Cells judged by their slopes before any is split: those with the most mass. Concrete
# values only.
NUM_CELLS_WITH_SLOPES = 128


class Density(NamedTuple):
    """A log density at points.

    Attributes:
        log_value: ``(num_points, batch)``; −inf where there is no mass.
        magnitude: Size of the terms that it is the sum of, which sets its rounding;
            like ``log_value``.
        slope: Its derivative in the coordinates, ``(num_points, batch, dims)``, or
            None.
    """

    log_value: Array
    magnitude: Array
    slope: Array | None = None


DensityAt = Callable[[Array, bool], Density]
"""Coordinates ``(num_points, batch, dims)``, and whether slopes are wanted."""


class Rows(NamedTuple):
    """Points near which no mass is to be overlooked.

    Attributes:
        position: Coordinates, ``(num_rows, batch, dims)``.
        is_valid: Whether they lie in the support, ``(num_rows, batch)``.
        density: The density there.
        slack: Relative error of the density that does not count, ``(num_rows,)``.
    """

    position: Array
    is_valid: Array
    density: Density
    slack: Array


class Cells(NamedTuple):
    """Boxes and the integrals over them; unused boxes have no mass.

    Attributes:
        corner: Lower corner, ``(num_cells, batch, dims)``.
        width: ``(num_cells, batch)``, the same in each dimension.
        log_mass: log of the integral over the cell, shaped like ``width``, as are the
            next two.
        log_error: log of the integral's possible error.
        log_rounding: log of its rounding error.
    """

    corner: Array
    width: Array
    log_mass: Array
    log_error: Array
    log_rounding: Array


@jax.jit
def judge(density: Density, corner: Array, width: Array, rows: Rows | None) -> Cells:
    """Mass, error and rounding of each cell, from the density at its nodes."""
    num_cells, batch, dims = corner.shape
    shape = (num_cells, batch, *(NUM_NODES,) * dims)
    eps = jnp.finfo(width.dtype).eps
    axes = tuple(range(2, 2 + dims))
    log_value, magnitude = (
        _batch_first(values, num_cells).reshape(shape) for values in density[:2]
    )

    value, top = _relative(log_value, axes)
    noise = eps * jnp.where(value > 0, value * magnitude, 0.0)
    floor = 4 * jnp.max(noise, axis=axes)

    # Legendre series that have not converged, and slopes that do not integrate to the
    # differences.
    error = jnp.zeros_like(width)
    for axis in axes:
        error += _tail(value, axis)

    if density.slope is not None:
        step = _beside(width, dims)[..., None] * _batch_first(
            density.slope, num_cells
        ).reshape(*shape, dims)
        step = jnp.where(value[..., None] > 0, value[..., None] * step, 0.0)
        floor += 4 * eps * jnp.max(jnp.abs(step), axis=(*axes, -1))
        for axis in axes:
            error += _mismatch(value, step[..., axis - 2], axis)

    error = jnp.maximum(error - floor, 0.0)
    mass, rounding = _mean(value, dims), _mean(noise, dims)

    # No grid locates the edge where an infinite energy cuts the mass off, and
    # derivatives lack its motion.
    is_cut = jnp.any(jnp.isneginf(log_value), axis=axes) & (mass > 0)
    error = jnp.maximum(error, jnp.where(is_cut, 1.0 / width, 0.0))
    if rows is not None:
        error = jnp.maximum(
            error, _error_at_rows(value, top, floor, corner, width, rows)
        )

    log_size = top + dims * jnp.log(width)
    return Cells(
        corner, width, *(jnp.log(part) + log_size for part in (mass, error, rounding))
    )


def _relative(log_value: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Each cell's density divided by its largest, e^top, and top."""
    top = jnp.max(log_value, axis=axes)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Compiled code may evaluate the same density twice with different rounding (about
    # 100 nats at 1e9 in float32): clip values over the maximum.
    return jnp.exp(jnp.minimum(log_value - _beside(top, len(axes)), 0.0)), top


def _batch_first(values: Array, num_cells: int) -> Array:
    """``(num_cells, batch, nodes, ...)`` from ``(num_cells · nodes, batch, ...)``."""
    return jnp.swapaxes(values.reshape(num_cells, -1, *values.shape[1:]), 1, 2)


def _beside(values: Array, dims: int) -> Array:
    return values.reshape(*values.shape, *(1,) * dims)


def _mean(values: Array, dims: int) -> Array:
    """Means over cells, by the rule's weights."""
    for _ in range(dims):
        values = matmul(values, jnp.asarray(WEIGHTS, values.dtype))
    return values


def _tail(value: Array, axis: int) -> Array:
    """The larger of the last two Legendre coefficients along an axis.

    Averaged over the lines of the other axis.
    """
    matrix = jnp.asarray(TO_COEFFICIENTS[-2:].T, value.dtype)
    largest = jnp.max(jnp.abs(matmul(jnp.moveaxis(value, axis, -1), matrix)), axis=-1)
    return _mean(largest, largest.ndim - 2)


def _mismatch(value: Array, step: Array, axis: int) -> Array:
    """Largest gap between differences along an axis and the integrals of the slopes.

    Averaged over the lines of the other axis.
    """
    predicted = matmul(
        jnp.moveaxis(step, axis, -1), jnp.asarray(ANTIDERIVATIVE.T, value.dtype)
    )
    difference = jnp.moveaxis(value, axis, -1) - predicted
    centre = matmul(difference, jnp.asarray(WEIGHTS, value.dtype))
    largest = jnp.max(jnp.abs(difference - centre[..., None]), axis=-1)
    return _mean(largest, largest.ndim - 2)


def _error_at_rows(
    value: Array, top: Array, floor: Array, corner: Array, width: Array, rows: Rows
) -> Array:
    """Interpolation error at the worst row of each cell, divided by e^top."""
    at = _interpolate(value, top, floor, corner, width, rows)
    size = jnp.abs(at.found) + jnp.abs(at.predicted)
    error = jnp.maximum(at.error - rows.slack[:, None] * size, 0.0)
    return jnp.zeros_like(width).at[at.cell, at.element].max(error)


class Interpolated(NamedTuple):
    """The density at rows and by the polynomials of their cells, divided by e^top.

    Attributes:
        cell: Index of each row's cell, ``(num_rows, batch)``.
        element: Index of its batch element, likewise.
        found: The density; 0 in no cell, like the next two.
        predicted: By interpolation.
        error: Their difference beyond rounding.
    """

    cell: Array
    element: Array
    found: Array
    predicted: Array
    error: Array


def _interpolate(
    value: Array, top: Array, floor: Array, corner: Array, width: Array, rows: Rows
) -> Interpolated:
    _, batch, dims = corner.shape
    local = (rows.position - corner[:, None]) / width[:, None, :, None]
    inside = jnp.all((local >= 0) & (local < 1), axis=-1) & rows.is_valid
    cell = jnp.argmax(inside, axis=0)
    element = jnp.broadcast_to(jnp.arange(batch), cell.shape)
    position = (rows.position - corner[cell, element]) / width[cell, element][..., None]

    predicted = value[cell, element]
    for axis in reversed(range(dims)):
        predicted = einsum(
            "rb...j,rbj->rb...", predicted, interpolation(position[..., axis])
        )
    # The density at a row far above every node of its cell must not overflow.
    found = jnp.exp(jnp.minimum(rows.density.log_value - top[cell, element], 80.0))
    noise = jnp.finfo(width.dtype).eps * jnp.where(
        found > 0, found * rows.density.magnitude, 0.0
    )

    error = jnp.maximum(
        jnp.abs(found - predicted) - 4 * (floor[cell, element] + noise), 0.0
    )
    # Beyond its cell a polynomial is soon infinite.
    is_inside = jnp.any(inside, axis=0)
    found, predicted, error = (
        jnp.where(is_inside, part, 0.0) for part in (found, predicted, error)
    )
    return Interpolated(cell, element, found, predicted, error)


@jax.jit
def log_overlooked(
    log_value: Array, cells: Cells, draws: Rows, log_start: Array
) -> Array:
    """Log of the mass between the nodes that the cells' polynomials do not know.

    Draws of the start, density s, estimate the integral of ``|f − f̂|`` as a mean of
    ``|f − f̂| / s``; they must not have guided the splitting.

    Args:
        log_value: log f at the cells' nodes, ``(num_points, batch)``.
        cells: Cells; those without mass, such as cells that were split, are ignored.
        draws: Draws of the start.
        log_start: log s at the draws, ``(num_draws, batch)``.
    """
    num_cells, _, dims = cells.corner.shape
    shape = (num_cells, -1, *(NUM_NODES,) * dims)
    log_value = _batch_first(log_value, num_cells).reshape(shape)
    value, top = _relative(log_value, tuple(range(2, 2 + dims)))

    is_used = cells.log_mass > -jnp.inf
    corner = jnp.where(is_used[..., None], cells.corner, jnp.inf)
    no_floor = jnp.zeros_like(top)
    at = _interpolate(value, top, no_floor, corner, cells.width, draws)
    log_error = jnp.log(at.error) + top[at.cell, at.element] - log_start
    return logsumexp(log_error, axis=0) - jnp.log(len(log_start))
