"""Adaptive integration of a density over a box, with one Z per batch element.

The box has one or two dimensions and is a lattice of cells with 16 Gauss-Legendre nodes
per dimension.  Each cell is judged by the tail of its Legendre series, by whether its
slopes integrate to its differences, and at the data rows that lie in it; the cells with
the largest errors are split, level by level.  All sizes are fixed beforehand, so the
same steps run on concrete values, where slopes are used from the start, and inside a
compiled model.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import logsumexp

from ebm_ppl.exact.judge import NUM_CELLS_WITH_SLOPES, Cells, DensityAt, Rows, judge
from ebm_ppl.exact.lattice import nodes_of
from ebm_ppl.exact.rule import NODES, NUM_NODES, WEIGHTS


class Effort(NamedTuple):
    """Number of levels of splitting, and of cells split per level."""

    num_levels: int
    num_splits: int


def relative_error(cells: Cells) -> Array:
    """Total error over total mass, ``(batch,)``."""
    total = logsumexp(cells.log_mass, axis=0)
    return jnp.exp(logsumexp(cells.log_error, axis=0) - total)


# Signs of a jump (a kink straightens out in small cells): a cell has less than SMALL of
# the lattice's width, its density is more than exp(LOG_DENSE) of the largest, and its
# relative error is still over exp(LOG_JUMP).
SMALL, LOG_DENSE, LOG_JUMP = 2.0**-4, -14.0, -7.0


def has_jump(cells: Cells, width: Array) -> Array:
    """Whether the density jumps where there is mass, ``(batch,)``.

    ``width`` is that of the lattice's cells.  In two dimensions no splitting resolves a
    jump along a curve, so it already counts as an error of the integral.
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
    """Whether any batch element's error exceeds the tolerance.

    NaN does not count: splitting cannot repair it.
    """
    return jnp.any(relative_error(cells) > tolerance)


@partial(jax.jit, static_argnums=1)
def _worst(cells: Cells, num_splits: int) -> tuple[Array, Array, Array]:
    """Indices of the cells to split, and corners and widths of their children."""
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
    """Remove the mass of split cells and write their children from ``start`` on."""
    element = jnp.arange(cells.width.shape[1])
    logs = ("log_mass", "log_error", "log_rounding")

    # If fewer cells are open than a step splits, the others stay unchanged.
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
    """The same cells followed by ``num_more`` unused ones."""

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
    """Split the cells with the largest errors in each batch element."""
    index, corner, width = _worst(cells, num_splits)
    children = judge(density_at(nodes_of(corner, width), True), corner, width, rows)
    return _replace(cells, index, children, start)


@partial(jax.jit, static_argnums=1)
def heaviest(cells: Cells, num_cells: int) -> tuple[Array, Cells]:
    """Indices ``(num_cells, batch)`` and cells of the most mass per batch element."""
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
    """Split cells until the relative error is below ``tolerance`` or effort ends."""
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
    """Log of the mass beyond the ends of the lattice.

    Every end is assumed to keep falling as between its last two nodes.  ``steepening``:
    0 where tails are powers of u, which are exponentials of t; 1 where they are
    exponentials of u.
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
                # Marginalise over the other axis; the two nodes move to the end.
                line = jnp.moveaxis(line, 1 + axis, -1)
                line = line + (
                    jnp.asarray(np.log(WEIGHTS), line.dtype) + jnp.log(width)
                ).reshape(-1, 1, 1)
                line = logsumexp(line, axis=(0, 1)).T

            rate = (line[1] - line[0]) / gap + steepening
            # Counted from the box's end: mass between it and the last node is the
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
