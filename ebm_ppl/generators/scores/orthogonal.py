"""Orthonormal columns of many small matrices, without LAPACK.

Batched QR decompositions and triangular solves inside a compiled loop are calls of
LAPACK, which on a machine of two cores can wait for one another for ever (JAX 0.10).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ebm_ppl.programs.products import einsum


class Orthonormal(NamedTuple):
    """``matrix = columns @ root``, root upper triangular with a positive diagonal.

    Attributes:
        columns: Orthonormal, ``(n, m, k)``.
        root: ``(n, k, k)``.
        inverse: Of ``root``.
    """

    columns: Array
    root: Array
    inverse: Array


def orthonormalized(matrix: Array) -> Orthonormal:
    """QR decompositions of ``(n, m, k)``, m ≥ k, and the inverses of the roots.

    Source: Gram and Schmidt, with every column made orthogonal twice, which is enough
    (Giraud, Langou and Rozložník 2005).  The identity goes through the same steps and
    becomes the inverse.
    """
    num, _, size = matrix.shape
    identity = jnp.eye(size, dtype=matrix.dtype)

    def add_column(k: Array, done: Orthonormal) -> Orthonormal:
        column, combination = matrix[:, :, k], identity[k]
        total = jnp.zeros((num, size), matrix.dtype)
        for _ in range(2):
            along = einsum("nmk,nm->nk", done.columns, column)
            column = column - einsum("nmk,nk->nm", done.columns, along)
            combination = combination - einsum("nlk,nk->nl", done.inverse, along)
            total += along

        length = jnp.sqrt(jnp.sum(column**2, axis=1, keepdims=True))
        return Orthonormal(
            done.columns.at[:, :, k].set(column / length),
            done.root.at[:, :, k].set(total.at[:, k].set(length[:, 0])),
            done.inverse.at[:, :, k].set(combination / length),
        )

    square = jnp.zeros((num, size, size), matrix.dtype)
    start = Orthonormal(jnp.zeros_like(matrix), square, square)
    return lax.fori_loop(0, size, add_column, start)
