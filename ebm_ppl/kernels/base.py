"""The contract of a kernel, its targets, and several moves in a row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

Tuning = Any
"""What a kernel adapts: a tree of positive arrays, the batch shape at their left."""


class Space(Enum):
    """The kind of space that a kernel moves in."""

    REAL = "a continuous support"
    FINITE = "a finite support"


class KernelState(NamedTuple):
    """Position of every walker, with the potential there.

    ``grad`` is the potential's gradient, or empty for a kernel that asks for none;
    ``aux`` is any tree of per-walker values at the position, moved with the walker.
    """

    position: Array
    potential: Array
    grad: Any = ()
    aux: Any = ()


class KernelInfo(NamedTuple):
    """Log-weight increment and acceptance probability of a move, per walker."""

    log_weight: Array
    acceptance: Array


class Target(Protocol):
    """A density exp(−U), evaluated as far as a kernel asks for it."""

    def value(self, position: Array) -> KernelState:
        """U at every walker."""
        ...

    def value_and_grad(self, position: Array) -> KernelState:
        """U and its gradient: one forward and one backward pass."""
        ...


class Potential(NamedTuple):
    """The target of one function U of the positions."""

    potential: Callable[[Array], Array]

    def value(self, position: Array) -> KernelState:
        """U at every walker."""
        return KernelState(position, self.potential(position))

    def value_and_grad(self, position: Array) -> KernelState:
        """U and its gradient: one forward and one backward pass."""
        potential, pull = jax.vjp(self.potential, position)
        (grad,) = pull(jnp.ones_like(potential))
        return KernelState(position, potential, grad)


class Kernel(ABC):
    """A Markov kernel that knows the log weight of its moves.

    Kernels are frozen and hashable, and hold no arrays: what they learn on the way is
    the *tuning*, a tree that they are given.  Subclasses write :meth:`step`, and
    override what differs from a kernel that leaves exp(−U) invariant, asks for no
    gradient and adapts nothing.
    """

    space: ClassVar[Space] = Space.REAL
    uses_gradient: ClassVar[bool] = False
    """Whether a step reads the gradient of the potential."""
    is_exact: ClassVar[bool] = True
    """Whether a move leaves exp(−U) invariant, so that its log weight is 0."""

    @abstractmethod
    def step(
        self, rng_key: Array, state: KernelState, target: Target, tuning: Tuning
    ) -> tuple[KernelState, KernelInfo]:
        """Move every walker once.

        Args:
            rng_key: A JAX PRNG key.
            state: From :meth:`evaluate` or the last step.
            target: The density exp(−U).
            tuning: See :meth:`init_tuning`.
        """

    def evaluate(self, target: Target, position: Array) -> KernelState:
        """The potential at every walker, with its gradient where a step reads it."""
        if self.uses_gradient:
            return target.value_and_grad(position)
        return target.value(position)

    def init_tuning(self, dimension: int, batch_shape: tuple[int, ...]) -> Tuning:
        """The first tuning for events of ``dimension`` elements."""
        return ()

    def adapt(
        self, tuning: Tuning, acceptance: Array, gain: ArrayLike = 0.05
    ) -> Tuning:
        """The tuning after a step whose mean acceptance, ``batch``, is given."""
        return tuning

    def scaled(self, tuning: Tuning, factor: ArrayLike) -> Tuning:
        """The tuning of moves ``factor`` times as long, where they have a length."""
        return tuning

    def exactly(self) -> "Kernel":
        """This kernel, or the one next to it that leaves exp(−U) invariant."""
        return self


@dataclass(frozen=True)
class StepSizeKernel(Kernel):
    """A kernel whose tuning is a step size h, in squared units of the position.

    Args:
        step_size: The first h; None takes the optimal scaling of a standard normal.
        target_acceptance: h follows this acceptance rate; None keeps it fixed.
    """

    step_size: float | None = None
    target_acceptance: float | None = None

    def init_tuning(self, dimension: int, batch_shape: tuple[int, ...]) -> Array:
        """The step size of every batch element."""
        optimum = 1.36 * dimension ** (-1.0 / 3.0)
        return jnp.full(
            batch_shape, optimum if self.step_size is None else self.step_size
        )

    def adapt(self, tuning: Array, acceptance: Array, gain: ArrayLike = 0.05) -> Array:
        """One Robbins–Monro step of constant gain on ``log h``."""
        if self.target_acceptance is None:
            return tuning
        return tuning * jnp.exp(gain * (acceptance - self.target_acceptance))

    def scaled(self, tuning: Array, factor: ArrayLike) -> Array:
        """A step size of ``factor`` h."""
        return tuning * factor


def sum_event(value: Array, like: Array) -> Array:
    """Sum over the event dimensions, those that ``like`` does not have."""
    return jnp.sum(value, axis=tuple(range(like.ndim, value.ndim)))


def with_event_dims(value: Array, num_event_dims: int) -> Array:
    """The value with trailing dimensions of length 1."""
    return value.reshape(value.shape + (1,) * num_event_dims)


def choose(accept: Array, proposal: KernelState, state: KernelState) -> KernelState:
    """The proposal of the walkers that accept it, the state of the others."""
    return jax.tree.map(
        lambda x, y: jnp.where(with_event_dims(accept, y.ndim - accept.ndim), y, x),
        state,
        proposal,
    )


def move(
    kernel: Kernel,
    rng_key: Array,
    state: KernelState,
    target: Target,
    tuning: Tuning,
    num_steps: int,
) -> tuple[KernelState, KernelInfo]:
    """Apply ``kernel`` ``num_steps`` times; sum log weights, average acceptances."""
    if num_steps == 1:
        return kernel.step(rng_key, state, target, tuning)

    def body(
        carry: tuple[KernelState, KernelInfo], key: Array
    ) -> tuple[tuple[KernelState, KernelInfo], None]:
        current, total = carry
        current, info = kernel.step(key, current, target, tuning)
        return (
            current,
            KernelInfo(
                total.log_weight + info.log_weight, total.acceptance + info.acceptance
            ),
        ), None

    zeros = jnp.zeros_like(state.potential)
    (state, total), _ = lax.scan(
        body, (state, KernelInfo(zeros, zeros)), random.split(rng_key, num_steps)
    )
    return state, KernelInfo(total.log_weight, total.acceptance / num_steps)
