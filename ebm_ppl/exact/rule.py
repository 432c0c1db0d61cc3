"""Gauss–Legendre nodes of a cell, and what interpolates between them."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.polynomial.legendre import leggauss, legvander

from ebm_ppl.programs.products import matmul

NUM_NODES = 16


def _rule() -> tuple[np.ndarray, ...]:
    """Nodes and weights on [0, 1], and two matrices that act on values at the nodes.

    The first gives Legendre coefficients, the second antiderivatives at the nodes.
    """
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

# Positions of the nodes within a cell, (nodes, 1, dims).
OFFSETS = {
    dims: np.stack(np.meshgrid(*[NODES] * dims, indexing="ij"), axis=-1).reshape(
        -1, 1, dims
    )
    for dims in (1, 2)
}


def interpolation(position: Array) -> Array:
    """Weights of a cell's nodes that interpolate at a position in [0, 1].

    Their shape is ``(*position.shape, NUM_NODES)``.
    """
    x = 2 * position - 1
    terms = [jnp.ones_like(x), x]
    for k in range(1, NUM_NODES - 1):
        terms.append(((2 * k + 1) * x * terms[k] - k * terms[k - 1]) / (k + 1))
    return matmul(jnp.stack(terms, axis=-1), jnp.asarray(TO_COEFFICIENTS, x.dtype))
