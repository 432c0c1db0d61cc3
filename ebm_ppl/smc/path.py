"""The path between two potentials, and the temperatures along it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.kernels.base import KernelState


class Path(NamedTuple):
    """``start(u) = U_start`` and ``difference(u) = U − U_start``.

    Both return ``(num_chains, num_walkers, *batch)``.
    """

    start: Callable[[Array], Array]
    difference: Callable[[Array], Array]


class Ladder(NamedTuple):
    """A fixed annealing protocol that begins at ``start``.

    Attributes:
        start: Inverse temperature at which walkers begin, a scalar.
        betas: Inverse temperatures, ``(num_temperatures,)``.
        step_sizes: Step size at every temperature, ``(num_temperatures, *batch)``.
    """

    start: Array
    betas: Array
    step_sizes: Array

    def reverse(self) -> "Ladder":
        """The same temperatures in reverse order, ending at this ladder's start."""
        below = jnp.concatenate([self.start[None], self.betas[:-1]])
        step_sizes = jnp.concatenate([self.step_sizes[:1], self.step_sizes[:-1]])
        return Ladder(self.betas[-1], below[::-1], step_sizes[::-1])


def evaluate_path(path: Path, position: Array, beta: Array) -> KernelState:
    """Potential and gradient under U_β; those of U_start and D are kept in ``aux``."""
    start, start_pull = jax.vjp(path.start, position)
    difference, difference_pull = jax.vjp(path.difference, position)
    ones = jnp.ones_like(start)
    aux = (start, difference, start_pull(ones)[0], difference_pull(ones)[0])
    return at_temperature(KernelState(position, start, aux[2], aux), beta)


def at_temperature(state: KernelState, beta: Array) -> KernelState:
    """The same walkers under U_β, computed from ``state.aux`` without evaluation."""
    start, difference, grad_start, grad_difference = state.aux
    return state._replace(
        potential=start + beta * difference, grad=grad_start + beta * grad_difference
    )
