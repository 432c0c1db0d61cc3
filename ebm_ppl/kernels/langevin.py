"""Langevin kernels and the log weights of their moves.

A kernel moves walkers in coordinates u under a potential U(u) and returns the
log-weight increment that keeps ``E[exp(A) f(u)]`` proportional to the integral of ``f
exp(−U)``.  Shapes: potential ``(*walkers, *batch)``; position and gradient carry the
event dimensions to the right of that; step size ``batch`` or ``()``.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.kernels.base import (
    Kernel,
    KernelInfo,
    KernelState,
    StepSizeKernel,
    Target,
    choose,
    sum_event,
    with_event_dims,
)


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
    h = with_event_dims(step_size, step.ndim - current.potential.ndim)
    inner = 0.5 * step * (current.grad + proposal.grad) + 0.25 * h * (
        current.grad**2 - proposal.grad**2
    )
    return current.potential - proposal.potential + sum_event(inner, current.potential)


class Langevin(StepSizeKernel):
    """What the Langevin kernels share: the proposal, from the gradient."""

    uses_gradient: ClassVar[bool] = True

    def _propose(
        self, rng_key: Array, state: KernelState, target: Target, step_size: Array
    ) -> KernelState:
        # Drawn flat: the generator computes one index per dimension of the shape that
        # it is given.
        noise = random.normal(
            rng_key, (state.position.size,), state.position.dtype
        ).reshape(state.position.shape)
        h = with_event_dims(step_size, state.position.ndim - state.potential.ndim)
        position = state.position - h * state.grad + jnp.sqrt(2.0 * h) * noise
        return self.evaluate(target, position)


@dataclass(frozen=True)
class ULA(Langevin):
    """Unadjusted Langevin: ``y = x − h ∇U(x) + √(2h) ξ``.

    The kernel of Carbone et al. (2023), Algorithm 1.  Its bias is corrected by the
    weights, ``A += α(x, y) − α(y, x)``, so expectations are taken over *weighted*
    walkers.

    Args:
        step_size: h, in squared units of the base-standard coordinates.  Kept fixed.
    """

    is_exact: ClassVar[bool] = False

    step_size: float | None = 0.01
    target_acceptance: None = None

    def exactly(self) -> Kernel:
        """The same proposals, accepted or rejected."""
        return MALA(self.step_size)

    def step(
        self, rng_key: Array, state: KernelState, target: Target, tuning: Array
    ) -> tuple[KernelState, KernelInfo]:
        """Move every walker once; see the module's shapes."""
        proposal = self._propose(rng_key, state, target, tuning)
        log_weight = log_transition_difference(state, proposal, tuning)
        return proposal, KernelInfo(log_weight, jnp.ones_like(log_weight))


@dataclass(frozen=True)
class MALA(Langevin):
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
        self, rng_key: Array, state: KernelState, target: Target, tuning: Array
    ) -> tuple[KernelState, KernelInfo]:
        """Move every walker once; see the module's shapes."""
        # Propose
        key_proposal, key_accept = random.split(rng_key)
        proposal = self._propose(key_proposal, state, target, tuning)
        log_ratio = log_transition_difference(state, proposal, tuning)
        log_ratio = jnp.where(jnp.isfinite(proposal.potential), log_ratio, -jnp.inf)

        # Accept
        log_uniform = jnp.log1p(
            -random.uniform(key_accept, log_ratio.shape, log_ratio.dtype)
        )
        accept = log_uniform < log_ratio  # False for NaN
        moved = choose(accept, proposal, state)

        acceptance = jnp.where(
            jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0))
        )
        return moved, KernelInfo(jnp.zeros_like(log_ratio), acceptance)
