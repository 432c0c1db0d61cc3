"""Test for drift: walkers at equilibrium keep their statistics as they move further.

Moves under the energy leave it invariant, so the expectations of walkers at equilibrium
do not change.  Means are insensitive to a few walkers, so the *shares* of walkers in
both tails of many statistics are compared too: in a narrow neck or well that moves have
just found, the gradient is large, the energy low, and some coordinate extreme.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ebm_ppl.energy.start import target_of
from ebm_ppl.programs.products import matmul
from ebm_ppl.walkers.site import SiteAtParams

# The share of walkers in either tail.
TAIL = 0.05

NUM_DIRECTIONS = 4


def changes(site: SiteAtParams, before: Array, after: Array) -> Array:
    """Changes of statistics per island, zero in expectation at equilibrium.

    Args:
        site: The site whose energy the moves leave invariant.
        before: Positions, ``(num_chains, num_walkers, *batch, *event)``.
        after: Positions of the same walkers after the moves.

    Returns:
        ``(num_chains, num_statistics, *batch)``: the changes of mean ``|u|²`` and
        ``|u|``, then of the shares in both tails of ``|u|``, of U, of ``|∇U|``, of
        every coordinate and of some random directions.
    """
    position = jnp.stack([before, after])
    return _changes(position, *_potential_and_grad(site, position))


@jax.jit
def _potential_and_grad(site: SiteAtParams, position: Array) -> tuple[Array, Array]:
    """U and its gradient, with one more leading axis than walkers have."""
    target = target_of(site.distribution, site.transform)
    state = target.value_and_grad(position.reshape(-1, *position.shape[2:]))
    shape = (*position.shape[:2], *state.potential.shape[1:])
    return state.potential.reshape(shape), state.grad.reshape(position.shape)


@jax.jit
def _changes(position: Array, potential: Array, grad: Array) -> Array:
    """The statistics, whose program serves all energies of the same shapes."""
    # Means
    event_axes = tuple(range(potential.ndim, position.ndim))
    radius = jnp.sqrt(jnp.sum(position**2, axis=event_axes))
    steepness = jnp.sum(grad**2, axis=event_axes)
    means = jnp.stack([jnp.mean(r[1] - r[0], axis=1) for r in (radius**2, radius)])

    # Tail shares
    statistics = [radius[None], potential[None], steepness[None]]
    if event_axes:
        statistics.append(_projections(position.reshape(*potential.shape, -1)))
    else:
        statistics.append(position[None])

    shares = jnp.concatenate([_tail_shares(values) for values in statistics])
    return jnp.moveaxis(jnp.concatenate([means, shares]), 0, 1)


def _projections(flat: Array) -> Array:
    """Every coordinate and some random directions, as ``(num_projections, ...)``.

    Directions are taken of the coordinates in units of their spread; ``...`` is
    ``flat.shape[:-1]``.
    """
    coordinates = jnp.moveaxis(flat, -1, 0)
    num_coordinates = coordinates.shape[0]
    if num_coordinates == 1:
        return coordinates

    spread = jnp.std(flat, axis=(0, 1, 2))
    # NumPy's generator: its numbers do not depend on JAX's dtypes or PRNG.
    numbers = np.random.default_rng(0).normal(size=(num_coordinates, NUM_DIRECTIONS))
    directions = jnp.asarray(numbers / np.linalg.norm(numbers, axis=0), flat.dtype)
    directed = matmul(flat / jnp.where(spread > 0, spread, 1.0), directions)
    return jnp.concatenate([coordinates, jnp.moveaxis(directed, -1, 0)])


def _tail_shares(values: Array) -> Array:
    """Changes of the shares of walkers below and above the pooled quantiles.

    ``values`` is ``(k, 2, num_chains, num_walkers, *batch)``, before and after; the
    result is ``(2 k, num_chains, *batch)``.
    """
    low, high = jnp.quantile(
        values,
        jnp.array([TAIL, 1.0 - TAIL], values.dtype),
        axis=(1, 2, 3),
        keepdims=True,
    )

    def change(inside: Array) -> Array:
        share = jnp.mean(inside, axis=3, dtype=values.dtype)
        return share[:, 1] - share[:, 0]

    return jnp.concatenate([change(values < low), change(values > high)])
