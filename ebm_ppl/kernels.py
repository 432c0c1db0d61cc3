"""Langevin kernels and the log weights of their moves.

A kernel moves walkers in coordinates u under a potential U(u) and returns the
log-weight increment that keeps ``E[exp(A) f(u)]`` proportional to the integral of ``f
exp(−U)``.  Shapes: potential ``(*walkers, *batch)``; position and gradient carry the
event dimensions to the right of that; step size ``batch`` or ``()``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
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


def _sum_event(value: Array, like: Array) -> Array:
    return jnp.sum(value, axis=tuple(range(like.ndim, value.ndim)))


def _with_event_dims(value: Array, num_event_dims: int) -> Array:
    return value.reshape(value.shape + (1,) * num_event_dims)


def log_transition_difference(
    current: KernelState, proposal: KernelState, step_size: Array
) -> Array:
    """Log Metropolis–Hastings ratio ``α(x, y) − α(y, x)`` of a Langevin step.

    This is the log of ``exp(−U(y)) q(y→x) / exp(−U(x)) q(x→y)``, with ``α(x, y) = U(x)
    + ½ (y − x)·∇U(x) + ¼ h ‖∇U(x)‖²`` (Carbone et al. 2023, Algorithm 1).

    Args:
        current: x with its potential and gradient.
        proposal: y with its potential and gradient.
        step_size: h, in squared units of the position.
    """
    step = proposal.position - current.position
    h = _with_event_dims(step_size, step.ndim - current.potential.ndim)
    inner = 0.5 * step * (current.grad + proposal.grad) + 0.25 * h * (
        current.grad**2 - proposal.grad**2
    )
    return current.potential - proposal.potential + _sum_event(inner, current.potential)


def _langevin_proposal(
    rng_key: Array, state: KernelState, evaluate: Evaluate, step_size: Array
) -> KernelState:
    # Drawn flat: the generator computes one index per dimension of the shape that it is
    # given.
    noise = random.normal(
        rng_key, (state.position.size,), state.position.dtype
    ).reshape(state.position.shape)
    h = _with_event_dims(step_size, state.position.ndim - state.potential.ndim)
    position = state.position - h * state.grad + jnp.sqrt(2.0 * h) * noise
    return evaluate(position)


@dataclass(frozen=True)
class ULA:
    """Unadjusted Langevin: ``y = x − h ∇U(x) + √(2h) ξ``.

    The kernel of Carbone et al. (2023), Algorithm 1.  Its bias is corrected by the
    weights, ``A += α(x, y) − α(y, x)``, so expectations are taken over *weighted*
    walkers.

    Args:
        step_size: h, in squared units of the base-standard coordinates.  Kept fixed.
    """

    step_size: float | None = 0.01
    target_acceptance: None = None

    def step(
        self, rng_key: Array, state: KernelState, evaluate: Evaluate, step_size: Array
    ) -> tuple[KernelState, KernelInfo]:
        """Move every walker once; see the module's shapes."""
        proposal = _langevin_proposal(rng_key, state, evaluate, step_size)
        log_weight = log_transition_difference(state, proposal, step_size)
        return proposal, KernelInfo(log_weight, jnp.ones_like(log_weight))


@dataclass(frozen=True)
class MALA:
    """Metropolis-adjusted Langevin: the proposal of :class:`ULA`, accepted or rejected.

    The acceptance probability is ``min(1, exp(α(x, y) − α(y, x)))``.  The kernel leaves
    exp(−U) invariant, so a move does not change the weights.  A proposal whose
    potential is not finite is rejected.

    Args:
        step_size: Initial h, in squared units of the base-standard coordinates.  None
            takes the optimal scaling of a standard normal of the same dimension, ``h =
            1.36 d^(−1/3)`` (Roberts and Rosenthal 1998).
        target_acceptance: The step size is adapted towards this acceptance rate, on
            training islands only; None keeps it fixed.  0.574 is asymptotically optimal
            (Roberts and Rosenthal 1998).
    """

    step_size: float | None = None
    target_acceptance: float | None = 0.574

    def step(
        self, rng_key: Array, state: KernelState, evaluate: Evaluate, step_size: Array
    ) -> tuple[KernelState, KernelInfo]:
        """Move every walker once; see the module's shapes."""
        # Propose
        key_proposal, key_accept = random.split(rng_key)
        proposal = _langevin_proposal(key_proposal, state, evaluate, step_size)
        log_ratio = log_transition_difference(state, proposal, step_size)
        log_ratio = jnp.where(jnp.isfinite(proposal.potential), log_ratio, -jnp.inf)

        # Accept
        log_uniform = jnp.log1p(
            -random.uniform(key_accept, log_ratio.shape, log_ratio.dtype)
        )
        accept = log_uniform < log_ratio  # False for NaN
        moved = jax.tree.map(
            lambda x, y: jnp.where(
                _with_event_dims(accept, y.ndim - accept.ndim), y, x
            ),
            state,
            proposal,
        )

        acceptance = jnp.where(
            jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0))
        )
        return moved, KernelInfo(jnp.zeros_like(log_ratio), acceptance)


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
