"""The contract of a kernel, its step size, and several moves in a row."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike


class KernelState(NamedTuple):
    """Position of every walker, with the potential and its gradient there.

    ``aux`` is any tree of per-walker values at the position, moved with the walker.
    """

    position: Array
    potential: Array
    grad: Array
    aux: Any = ()


Evaluate = Callable[[Array], KernelState]
"""Position to kernel state: one evaluation of the potential and its gradient."""


class KernelInfo(NamedTuple):
    """Log-weight increment and acceptance probability of a move, per walker."""

    log_weight: Array
    acceptance: Array


class Kernel(Protocol):
    """The contract of :class:`ULA` and :class:`MALA`."""

    @property
    def step_size(self) -> float | None: ...  # noqa: D102

    @property
    def target_acceptance(self) -> float | None: ...  # noqa: D102

    def step(  # noqa: D102
        self, rng_key: Array, state: KernelState, evaluate: Evaluate, step_size: Array
    ) -> tuple[KernelState, KernelInfo]: ...


def sum_event(value: Array, like: Array) -> Array:
    """Sum over the event dimensions, those that ``like`` does not have."""
    return jnp.sum(value, axis=tuple(range(like.ndim, value.ndim)))


def with_event_dims(value: Array, num_event_dims: int) -> Array:
    """The value with trailing dimensions of length 1."""
    return value.reshape(value.shape + (1,) * num_event_dims)


def initial_step_size(kernel: Kernel, dimension: int) -> float:
    """The kernel's step size, or the optimum for a standard normal of ``dimension``."""
    return (
        1.36 * dimension ** (-1.0 / 3.0)
        if kernel.step_size is None
        else kernel.step_size
    )


def adapt_step_size(
    kernel: Kernel, step_size: Array, acceptance: Array, gain: ArrayLike = 0.05
) -> Array:
    """One Robbins–Monro step of constant gain on ``log h`` to the target acceptance."""
    if kernel.target_acceptance is None:
        return step_size
    return step_size * jnp.exp(gain * (acceptance - kernel.target_acceptance))


def move(
    kernel: Kernel,
    rng_key: Array,
    state: KernelState,
    evaluate: Evaluate,
    step_size: Array,
    num_steps: int,
) -> tuple[KernelState, KernelInfo]:
    """Apply ``kernel`` ``num_steps`` times; sum log weights, average acceptances."""
    if num_steps == 1:
        return kernel.step(rng_key, state, evaluate, step_size)

    def body(
        carry: tuple[KernelState, KernelInfo], key: Array
    ) -> tuple[tuple[KernelState, KernelInfo], None]:
        current, total = carry
        current, info = kernel.step(key, current, evaluate, step_size)
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
