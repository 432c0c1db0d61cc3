"""The path between two potentials, and the temperatures along it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ebm_ppl.kernels.base import KernelState, Tuning


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
        tunings: The kernel's tuning at every temperature: its arrays with a leading
            axis ``num_temperatures``.
    """

    start: Array
    betas: Array
    tunings: Tuning

    @jax.jit
    def reverse(self) -> "Ladder":
        """The same temperatures in reverse order, ending at this ladder's start."""
        below = jnp.concatenate([self.start[None], self.betas[:-1]])
        tunings = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf[:1], leaf[:-1]])[::-1], self.tunings
        )
        return Ladder(self.betas[-1], below[::-1], tunings)

    def tuning(self, rung: ArrayLike) -> Tuning:
        """The kernel's tuning at one temperature."""
        return jax.tree.map(lambda leaf: leaf[rung], self.tunings)


class Stretched(NamedTuple):
    """A ladder with so many times its temperatures, for a number that is traced.

    Attributes:
        start: See :class:`Ladder`.
        betas: Temperatures between those of the ladder, ``times`` for each; 1 beyond.
        ladder: The ladder, whose tuning serves those up to each of its own.
        times: How many.
    """

    start: Array
    betas: Array
    ladder: Ladder
    times: Array

    def tuning(self, rung: ArrayLike) -> Tuning:
        """The kernel's tuning at one temperature."""
        return self.ladder.tuning(rung // self.times)


def stretch(ladder: Ladder, times: Array, most: int) -> Stretched:
    """The ladder with ``times`` as many temperatures, no more than ``most``."""
    size = ladder.betas.shape[0]
    places = jnp.arange(1, most * size + 1) / times
    known = jnp.concatenate([ladder.start[None], ladder.betas])
    betas = jnp.interp(places, jnp.arange(size + 1), known)
    return Stretched(ladder.start, betas.astype(known.dtype), ladder, times)


class AtTemperature(NamedTuple):
    """The target exp(−U_β) on a path.

    Kernel states keep U_start and D, and their gradients, in ``aux``: another
    temperature costs no evaluation.
    """

    path: Path
    beta: Array

    def value(self, position: Array) -> KernelState:
        """U_β at every walker."""
        aux = (self.path.start(position), self.path.difference(position))
        return self.recall(KernelState(position, aux[0], aux=aux))

    def value_and_grad(self, position: Array) -> KernelState:
        """U_β and its gradient: one forward and one backward pass."""
        start, start_pull = jax.vjp(self.path.start, position)
        difference, difference_pull = jax.vjp(self.path.difference, position)
        ones = jnp.ones_like(start)
        aux = (start, difference, start_pull(ones)[0], difference_pull(ones)[0])
        return self.recall(KernelState(position, start, aux[2], aux))

    def recall(self, state: KernelState) -> KernelState:
        """The walkers of another temperature under this one, without evaluation."""
        start, difference, *grads = state.aux
        potential = start + self.beta * difference
        if not grads:
            return state._replace(potential=potential)
        return state._replace(potential=potential, grad=grads[0] + self.beta * grads[1])


def difference_at(state: KernelState) -> Array:
    """D at the walkers of a kernel state on a path."""
    return state.aux[1]
