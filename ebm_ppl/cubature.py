"""Adaptive integration of a density over a box of one or two dimensions, with one Z per
batch element.

The box is a lattice of cells with 16 Gauss-Legendre nodes per dimension.  Each cell is
judged by the tail of its Legendre series, by whether its slopes integrate to its
differences, and at the data rows that lie in it; the cells that are worst off are
split, level by level.  Every size is fixed beforehand, so the same steps run on
numbers, where slopes are looked at from the start, and inside a compiled model.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import logsumexp
from numpy.polynomial.legendre import leggauss, legvander

NUM_NODES = 16
# Cells whose slopes are looked at before any is split: where numbers are at hand, those
# with the most mass.
NUM_CELLS_WITH_SLOPES = 128


class Density(NamedTuple):
    """A log density at points.

    Attributes:
        log_value: ``(num_points, batch)``; −inf where there is no mass.
        magnitude: Size of the numbers that it was summed from, by which it is rounded;
            like ``log_value``.
        slope: Its derivative by the coordinates, ``(num_points, batch, dims)``, or
            None.
    """

    log_value: Array
    magnitude: Array
    slope: Array | None = None


DensityAt = Callable[[Array, bool], Density]
"""Coordinates ``(num_points, batch, dims)``, and whether slopes are wanted."""


class Rows(NamedTuple):
    """Data rows: coordinates ``(num_rows, batch, dims)``, which of them count, and the density there."""

    position: Array
    is_valid: Array
    density: Density


class Cells(NamedTuple):
    """Boxes, and what was found in them; unused ones have no mass.

    Attributes:
        corner: Lower corner, ``(num_cells, batch, dims)``.
        width: ``(num_cells, batch)``, the same in each dimension.
        log_mass: log of the integral over the cell, like ``width``; so are the next
            two.
        log_error: log of what that may be off by.
        log_rounding: log of what the number format takes from it.
    """

    corner: Array
    width: Array
    log_mass: Array
    log_error: Array
    log_rounding: Array


class Effort(NamedTuple):
    """How often cells may be split, and how many at once."""

    num_levels: int
    num_splits: int


def _rule() -> tuple[np.ndarray, ...]:
    """Nodes and weights on [0, 1], values to Legendre coefficients, and slopes to antiderivatives, both at nodes."""
    nodes, weights = leggauss(NUM_NODES)
    weights = weights / 2
    degrees = np.arange(NUM_NODES)
    to_coefficients = (
        (2 * degrees[:, None] + 1) * weights * legvander(nodes, NUM_NODES - 1).T
    )
    values = legvander(nodes, NUM_NODES)
    integrals = np.zeros((NUM_NODES, NUM_NODES))
    integrals[:, 0] = (nodes + 1) / 2
    integrals[:, 1:] = (values[:, 2:] - values[:, :-2]) / (2 * degrees[1:] + 1) / 2
    return (nodes + 1) / 2, weights, to_coefficients, integrals @ to_coefficients


NODES, WEIGHTS, TO_COEFFICIENTS, ANTIDERIVATIVE = _rule()
# Where the nodes of a cell lie in it, (nodes, 1, dims).
OFFSETS = {
    dims: np.stack(np.meshgrid(*[NODES] * dims, indexing="ij"), axis=-1).reshape(
        -1, 1, dims
    )
    for dims in (1, 2)
}


@lru_cache(maxsize=8)
def _lattice(
    half_width: float, per_axis: int, dims: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners, widths and nodes of one element's lattice: numbers that every call shares."""
    width = 2 * half_width / per_axis
    ticks = -half_width + width * np.arange(per_axis)
    corners = np.stack(np.meshgrid(*[ticks] * dims, indexing="ij"), axis=-1).reshape(
        -1, 1, dims
    )
    nodes = corners[:, None] + width * OFFSETS[dims]
    widths = np.full(corners.shape[:2], width)
    return (
        corners.astype(dtype),
        widths.astype(dtype),
        nodes.reshape(-1, 1, dims).astype(dtype),
    )


def lattice(
    half_width: float, per_axis: int, batch: int, dims: int, dtype: Any
) -> tuple[Array, Array, Array]:
    """Corners, widths and nodes of equal cells over ``[−half_width, half_width]^dims``, the last axis fastest."""
    parts = _lattice(half_width, per_axis, dims, np.dtype(dtype).name)
    return tuple(  # type: ignore[return-value]
        jnp.asarray(
            part
            if batch == 1
            else np.broadcast_to(part, (len(part), batch, *part.shape[2:]))
        )
        for part in parts
    )


def nodes_of(corner: Array, width: Array) -> Array:
    """The nodes of cells, ``(num_cells · nodes, batch, dims)``."""
    offsets = jnp.asarray(OFFSETS[corner.shape[-1]], corner.dtype)
    points = corner[:, None] + width[:, None, :, None] * offsets
    return points.reshape(-1, *corner.shape[1:])


def log_weights(width: Array, dims: int) -> Array:
    """Log of the nodes' weights, ``(num_cells · nodes, batch)``."""
    weights = WEIGHTS if dims == 1 else np.multiply.outer(WEIGHTS, WEIGHTS).reshape(-1)
    logs = (
        jnp.asarray(np.log(weights), width.dtype)[:, None]
        + dims * jnp.log(width)[:, None]
    )
    return logs.reshape(-1, width.shape[-1])


@jax.jit
def judge(density: Density, corner: Array, width: Array, rows: Rows | None) -> Cells:
    """What the density at the nodes says about each cell."""
    num_cells, batch, dims = corner.shape
    shape = (num_cells, batch, *(NUM_NODES,) * dims)
    eps = jnp.finfo(width.dtype).eps
    axes = tuple(range(2, 2 + dims))
    log_value, magnitude = (
        _batch_first(values, num_cells).reshape(shape) for values in density[:2]
    )
    top = jnp.max(log_value, axis=axes)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Compiled code may evaluate the same density twice, and of 1e9 the last digit is
    # 128: over the top is at the top.
    value = jnp.exp(jnp.minimum(log_value - _beside(top, dims), 0.0))
    noise = eps * jnp.where(value > 0, value * magnitude, 0.0)
    floor = 4 * jnp.max(noise, axis=axes)

    # Series whose tail has not died away, and slopes that do not integrate to the
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

    # Where mass stops at an infinite energy, no grid places the edge, and derivatives
    # lack its motion.
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


def _batch_first(values: Array, num_cells: int) -> Array:
    """``(num_cells, batch, nodes, ...)`` from ``(num_cells · nodes, batch, ...)``."""
    return jnp.swapaxes(values.reshape(num_cells, -1, *values.shape[1:]), 1, 2)


def _beside(values: Array, dims: int) -> Array:
    return values.reshape(*values.shape, *(1,) * dims)


def _mean(values: Array, dims: int) -> Array:
    """Means over cells, by the rule's weights."""
    for _ in range(dims):
        values = values @ jnp.asarray(WEIGHTS, values.dtype)
    return values


def _tail(value: Array, axis: int) -> Array:
    """The largest of the last two Legendre coefficients along an axis, averaged over the lines of the other."""
    matrix = jnp.asarray(TO_COEFFICIENTS[-2:].T, value.dtype)
    largest = jnp.max(jnp.abs(jnp.moveaxis(value, axis, -1) @ matrix), axis=-1)
    return _mean(largest, largest.ndim - 2)


def _mismatch(value: Array, step: Array, axis: int) -> Array:
    """How far differences along an axis are from the integrals of the slopes, averaged likewise."""
    predicted = jnp.moveaxis(step, axis, -1) @ jnp.asarray(
        ANTIDERIVATIVE.T, value.dtype
    )
    difference = jnp.moveaxis(value, axis, -1) - predicted
    centre = difference @ jnp.asarray(WEIGHTS, value.dtype)
    largest = jnp.max(jnp.abs(difference - centre[..., None]), axis=-1)
    return _mean(largest, largest.ndim - 2)


def _error_at_rows(
    value: Array, top: Array, floor: Array, corner: Array, width: Array, rows: Rows
) -> Array:
    """How far the density at a cell's rows is from what its nodes interpolate, the worst row of each, over e^top."""
    _, batch, dims = corner.shape
    local = (rows.position - corner[:, None]) / width[:, None, :, None]
    inside = jnp.all((local >= 0) & (local < 1), axis=-1) & rows.is_valid
    cell = jnp.argmax(inside, axis=0)
    element = jnp.broadcast_to(jnp.arange(batch), cell.shape)
    position = (rows.position - corner[cell, element]) / width[cell, element][..., None]

    predicted = value[cell, element]
    for axis in reversed(range(dims)):
        predicted = jnp.einsum(
            "rb...j,rbj->rb...", predicted, _interpolation(position[..., axis])
        )
    # A row far above every node of its cell is enough said; it must not overflow.
    found = jnp.exp(jnp.minimum(rows.density.log_value - top[cell, element], 80.0))
    noise = jnp.finfo(width.dtype).eps * jnp.where(
        found > 0, found * rows.density.magnitude, 0.0
    )
    error = jnp.maximum(
        jnp.abs(found - predicted) - 4 * (floor[cell, element] + noise), 0.0
    )
    return (
        jnp.zeros_like(width)
        .at[cell, element]
        .max(jnp.where(jnp.any(inside, axis=0), error, 0.0))
    )


def _interpolation(position: Array) -> Array:
    """Weights of a cell's nodes for the value at a position in [0, 1], ``(*position.shape, NUM_NODES)``."""
    x = 2 * position - 1
    terms = [jnp.ones_like(x), x]
    for k in range(1, NUM_NODES - 1):
        terms.append(((2 * k + 1) * x * terms[k] - k * terms[k - 1]) / (k + 1))
    return jnp.stack(terms, axis=-1) @ jnp.asarray(TO_COEFFICIENTS, x.dtype)


def relative_error(cells: Cells) -> Array:
    """All errors over all mass, ``(batch,)``."""
    total = logsumexp(cells.log_mass, axis=0)
    return jnp.exp(logsumexp(cells.log_error, axis=0) - total)


# What a jump looks like (a kink straightens out in small cells): splitting has made a
# cell so much smaller, the density in it is more than exp(-14) of its largest, and its
# series still does not end.
SMALL, LOG_DENSE, LOG_JUMP = 2.0**-4, -14.0, -7.0


def has_jump(cells: Cells, width: Array) -> Array:
    """Whether the density jumps where there is mass, ``(batch,)``; ``width`` is that of
    the lattice's cells.

    In two dimensions no splitting resolves a jump along a curve: it is an error of the
    integral already.
    """
    if cells.corner.shape[-1] > 1:
        return jnp.zeros(cells.width.shape[1], bool)
    log_density = cells.log_mass - cells.corner.shape[-1] * jnp.log(cells.width)
    is_dense = log_density > jnp.max(log_density, axis=0) + LOG_DENSE
    is_small = cells.width < SMALL * jnp.max(width)
    return jnp.any(
        is_dense & is_small & (cells.log_error - cells.log_mass > LOG_JUMP), axis=0
    )


@jax.jit
def is_open(cells: Cells, tolerance: float) -> Array:
    """Whether any element's error is over the tolerance; NaN is nothing that splitting could mend."""
    return jnp.any(relative_error(cells) > tolerance)


@partial(jax.jit, static_argnums=1)
def _worst(cells: Cells, num_splits: int) -> tuple[Array, Array, Array]:
    """Indices of the cells to split, and the corners and widths of what they become."""
    _, index = lax.top_k(cells.log_error.T, num_splits)
    element = jnp.arange(cells.width.shape[1])
    dims = cells.corner.shape[-1]
    half = cells.width[index.T, element] / 2
    offsets = np.stack(
        np.meshgrid(*[[0.0, 1.0]] * dims, indexing="ij"), axis=-1
    ).reshape(-1, 1, 1, dims)
    corner = cells.corner[index.T, element] + half[..., None] * jnp.asarray(
        offsets, half.dtype
    )
    width = jnp.broadcast_to(half, corner.shape[:-1])
    return (
        index.T,
        corner.reshape(-1, *corner.shape[2:]),
        width.reshape(-1, width.shape[-1]),
    )


@jax.jit
def _replace(cells: Cells, index: Array, children: Cells, start: Array) -> Cells:
    """Take the mass of split cells out and write their children from ``start`` on."""
    element = jnp.arange(cells.width.shape[1])
    logs = ("log_mass", "log_error", "log_rounding")
    # Where fewer cells are open than a step splits, the others stay what they are.
    is_open = jnp.isfinite(cells.log_error[index, element])
    num_copies = children.width.shape[0] // index.shape[0]
    is_new = jnp.tile(is_open, (num_copies, 1))
    children = children._replace(
        **{
            column: jnp.where(is_new, getattr(children, column), -jnp.inf)
            for column in logs
        }
    )
    emptied = cells._replace(
        **{
            column: getattr(cells, column)
            .at[index, element]
            .set(jnp.where(is_open, -jnp.inf, getattr(cells, column)[index, element]))
            for column in logs
        }
    )
    return jax.tree.map(
        lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, start, 0),
        emptied,
        children,
    )


@partial(jax.jit, static_argnums=1)
def with_room(cells: Cells, num_more: int) -> Cells:
    """The same cells and unused ones behind them."""

    def pad(values: Array, fill: float) -> Array:
        return jnp.pad(
            values,
            ((0, num_more), *((0, 0),) * (values.ndim - 1)),
            constant_values=fill,
        )

    fills = Cells(0.0, 1.0, -jnp.inf, -jnp.inf, -jnp.inf)  # type: ignore[arg-type]
    return jax.tree.map(pad, cells, fills)


def split_worst(
    density_at: DensityAt,
    cells: Cells,
    start: Array,
    rows: Rows | None,
    num_splits: int,
) -> Cells:
    """Split the cells that are worst off in each batch element."""
    index, corner, width = _worst(cells, num_splits)
    children = judge(density_at(nodes_of(corner, width), True), corner, width, rows)
    return _replace(cells, index, children, start)


@partial(jax.jit, static_argnums=1)
def heaviest(cells: Cells, num_cells: int) -> tuple[Array, Cells]:
    """The cells with the most mass in each batch element, and where they are, ``(num_cells, batch)``."""
    _, index = lax.top_k(cells.log_mass.T, min(num_cells, cells.width.shape[0]))
    element = jnp.arange(cells.width.shape[1])
    return index.T, jax.tree.map(lambda column: column[index.T, element], cells)


@jax.jit
def _overwrite(cells: Cells, index: Array, others: Cells) -> Cells:
    element = jnp.arange(cells.width.shape[1])
    return jax.tree.map(lambda old, new: old.at[index, element].set(new), cells, others)


def look_at_slopes(density_at: DensityAt, cells: Cells, rows: Rows | None) -> Cells:
    """Judge the cells with the most mass by their slopes too."""
    index, (corner, width, *_) = heaviest(cells, NUM_CELLS_WITH_SLOPES)
    return _overwrite(
        cells,
        index,
        judge(density_at(nodes_of(corner, width), True), corner, width, rows),
    )


def refine(
    density_at: DensityAt,
    cells: Cells,
    rows: Rows | None,
    tolerance: float,
    effort: Effort,
    is_traced: bool,
) -> Cells:
    """Split until the errors are under ``tolerance`` of the mass, or nothing more may be spent."""
    if not is_traced and not bool(is_open(cells, tolerance)):
        return cells
    size, dims = cells.width.shape[0], cells.corner.shape[-1]
    num_children = min(effort.num_splits, size) * 2**dims
    room = with_room(cells, effort.num_levels * num_children)

    def step(state: tuple[Array, Cells]) -> tuple[Array, Cells]:
        level, cells = state
        start = size + level * num_children
        return level + 1, split_worst(
            density_at, cells, start, rows, num_children // 2**dims
        )

    state = (jnp.asarray(0), room)
    if is_traced:
        return lax.while_loop(
            lambda s: (s[0] < effort.num_levels) & is_open(s[1], tolerance), step, state
        )[1]
    for _ in range(effort.num_levels):
        if not bool(is_open(state[1], tolerance)):
            break
        state = step(state)
    return state[1]


@partial(jax.jit, static_argnums=(1, 2))
def log_share_beyond(
    log_value: Array, per_axis: int, dims: int, width: Array, steepening: float
) -> Array:
    """Log of the mass beyond the ends of the lattice, if every end goes on falling as
    between its last two nodes.

    ``steepening``: 0 where tails are powers of u, which are exponentials of t; 1 where
    they are exponentials of u.
    """
    log_value = log_value.reshape(*(per_axis,) * dims, *(NUM_NODES,) * dims, -1)
    gap = width * (NODES[1] - NODES[0])
    missed = []
    for axis in range(dims):
        for cell, nodes in ((0, [0, 1]), (-1, [-1, -2])):
            line = jnp.take(
                jnp.take(log_value, cell, axis=axis),
                np.array(nodes),
                axis=dims - 1 + axis,
            )
            if dims == 2:
                # Marginal over the other axis: its cells come first, its nodes after or
                # before the two.
                line = jnp.moveaxis(line, 1 + axis, -1)
                line = line + (
                    jnp.asarray(np.log(WEIGHTS), line.dtype) + jnp.log(width)
                ).reshape(-1, 1, 1)
                line = logsumexp(line, axis=(0, 1)).T
            rate = (line[1] - line[0]) / gap + steepening
            # From the box's end on: what lies between it and the last node is its
            # cell's.
            beyond = (
                line[0]
                - (rate - steepening) * width * NODES[0]
                - jnp.log(jnp.where(rate > 0, rate, 1.0))
            )
            missed.append(
                jnp.where(
                    rate > 0,
                    beyond,
                    jnp.where(jnp.isneginf(line[0]), -jnp.inf, jnp.inf),
                )
            )
    return logsumexp(jnp.stack(missed), axis=0)
