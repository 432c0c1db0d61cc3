"""Equal cells over a box, and the nodes of any cell."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ebm_ppl.exact.rule import OFFSETS, WEIGHTS


@lru_cache(maxsize=8)
def _lattice(
    half_width: float, per_axis: int, dims: int, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners, widths and nodes of one batch element's lattice, cached."""
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
    """Corners, widths and nodes of equal cells, the last axis fastest.

    The cells cover ``[−half_width, half_width]^dims``.
    """
    parts = _lattice(half_width, per_axis, dims, np.dtype(dtype).name)
    return tuple(  # type: ignore[return-value]
        jnp.asarray(
            part
            if batch == 1
            else np.broadcast_to(part, (len(part), batch, *part.shape[2:]))
        )
        for part in parts
    )


@jax.jit
def nodes_of(corner: Array, width: Array) -> Array:
    """The nodes of cells, ``(num_cells · nodes, batch, dims)``."""
    offsets = jnp.asarray(OFFSETS[corner.shape[-1]], corner.dtype)
    points = corner[:, None] + width[:, None, :, None] * offsets
    return points.reshape(-1, *corner.shape[1:])


@partial(jax.jit, static_argnums=1)
def log_weights(width: Array, dims: int) -> Array:
    """Log of the nodes' weights, ``(num_cells · nodes, batch)``."""
    weights = WEIGHTS if dims == 1 else np.multiply.outer(WEIGHTS, WEIGHTS).reshape(-1)
    logs = (
        jnp.asarray(np.log(weights), width.dtype)[:, None]
        + dims * jnp.log(width)[:, None]
    )
    return logs.reshape(-1, width.shape[-1])
