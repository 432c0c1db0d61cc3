"""Annealed sequential Monte Carlo from a tractable distribution to an energy.

The path is ``U_β = U_start + β D`` with ``D = U − U_start``, β from 0 to 1, in the
walkers' coordinates u.  A *pilot* ensemble chooses the temperatures and the step sizes;
fresh islands then follow that fixed protocol.  So each island's Ẑ is unbiased, with its
ESS-triggered resampling too (Neal 2001; Del Moral, Doucet and Jasra 2006).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

from ebm_ppl.kernels.base import Kernel, KernelState, Tuning, move
from ebm_ppl.smc.ensemble import (
    Ensemble,
    Moves,
    ancestors_where,
    of_ancestors,
    resampled_where,
)
from ebm_ppl.smc.path import (
    AtTemperature,
    Ladder,
    Path,
    Stretched,
    difference_at,
)
from ebm_ppl.smc.resampling import Resampling
from ebm_ppl.smc.weights import ess_fraction

# Pilot moves per temperature: enough to stay near equilibrium and to settle the step
# size.
NUM_SETTLING_MOVES = 20


def _reweight(ensemble: Ensemble, state: KernelState, beta_step: Array) -> Ensemble:
    # A difference of +inf (outside the energy's domain) means weight zero; 0 · inf must
    # not become NaN.
    return ensemble._replace(
        log_weight=ensemble.log_weight
        - jnp.where(beta_step != 0, beta_step * difference_at(state), 0.0)
    )


class Annealing(NamedTuple):
    """State of a run along a ladder between two temperatures.

    Attributes:
        ensemble: The walkers and their weights.
        state: Their kernel state under the temperature reached.
        moves: Sums of the statistics over the temperatures so far.
    """

    ensemble: Ensemble
    state: KernelState
    moves: Moves


def begin_annealing(
    kernel: Kernel, path: Path, position: Array, beta: Array
) -> Annealing:
    """Equally weighted walkers at ``position`` under U_β.

    ``position`` is ``(num_chains, num_walkers, *batch, *event)``.
    """
    state = kernel.evaluate(AtTemperature(path, beta), position)
    zeros = jnp.zeros_like(state.potential)
    return Annealing(
        Ensemble(position, state.potential, zeros, zeros[:, 0]),
        state,
        Moves(zeros[0, 0], zeros[0, 0]),
    )


def advance(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    ensemble: Ensemble,
    state: KernelState,
    beta: Array,
    beta_step: Array,
    tuning: Tuning,
    options: "AnnealingOptions",
) -> tuple[Ensemble, KernelState, Moves]:
    """Resample where the ESS is low, reweight, and move under U_β.

    Resampling comes first: after the last temperature it would only replace weights by
    duplicate walkers.
    """
    key_resample, key_move = random.split(rng_key)
    target = AtTemperature(path, beta)

    # Resample
    low = ess_fraction(ensemble.log_weight, axis=1) < options.ess_threshold

    def resample() -> tuple[Ensemble, KernelState]:
        ancestors = ancestors_where(
            key_resample, ensemble.log_weight, low, options.resampling
        )
        picked = jax.tree.map(lambda leaf: of_ancestors(leaf, ancestors), state)
        return resampled_where(low, ensemble, ancestors), picked

    ensemble, state = lax.cond(jnp.any(low), resample, lambda: (ensemble, state))

    # Reweight
    state = target.recall(state)
    ensemble, before = _reweight(ensemble, state, beta_step), state.position

    # Move
    state, info = move(
        kernel, key_move, state, target, tuning, options.num_kernel_steps
    )
    ensemble = ensemble._replace(
        position=state.position,
        potential=state.potential,
        # A walker of weight zero stays at zero, wherever it moves.
        log_weight=jnp.where(
            ensemble.log_weight == -jnp.inf,
            -jnp.inf,
            ensemble.log_weight + info.log_weight,
        ),
    )

    return (
        ensemble,
        state,
        Moves(jnp.mean(info.acceptance, axis=(0, 1)), _turnover(before, state)),
    )


def _turnover(before: Array, state: KernelState) -> Array:
    """Mean squared jump over the walkers' variance, ``batch``; 0 if nothing moves."""
    event_axes = tuple(range(state.potential.ndim - 2, state.position.ndim - 2))
    jump = jnp.sum(
        jnp.mean((state.position - before) ** 2, axis=(0, 1)), axis=event_axes
    )
    spread = jnp.sum(jnp.var(state.position, axis=(0, 1)), axis=event_axes)
    return jnp.where(jump > 0, jump / spread, 0.0)


class AnnealingOptions(NamedTuple):
    """Moves per temperature, and when and how islands resample."""

    num_kernel_steps: int
    ess_threshold: float
    resampling: Resampling


def follow_rungs(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    annealing: Annealing,
    ladder: Ladder | Stretched,
    options: AnnealingOptions,
    first: ArrayLike,
    last: ArrayLike,
) -> Annealing:
    """Carry walkers over the temperatures ``first`` to ``last − 1`` of a fixed ladder.

    Args:
        kernel: Any kernel; its own log weights are added.
        rng_key: A JAX PRNG key, the same for all pieces of one run.
        path: U_start and D.
        annealing: From :func:`begin_annealing` with exact draws at ``ladder.start``, or
            returned by the previous piece.
        ladder: From :func:`refine_ladder`, or its reverse.
        options: See :class:`AnnealingOptions`.
        first: Index of the first temperature; may be traced.
        last: Index after the last temperature; may be traced.
    """
    steps = jnp.diff(ladder.betas, prepend=ladder.start)

    def body(rung: Array, annealing: Annealing) -> Annealing:
        ensemble, state, moves = advance(
            kernel,
            random.fold_in(rng_key, rung),
            path,
            annealing.ensemble,
            annealing.state,
            ladder.betas[rung],
            steps[rung],
            ladder.tuning(rung),
            options,
        )
        return Annealing(ensemble, state, jax.tree.map(jnp.add, annealing.moves, moves))

    return lax.fori_loop(first, last, body, annealing)


def anneal(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    position: Array,
    ladder: Ladder | Stretched,
    options: AnnealingOptions,
    num_temperatures: ArrayLike | None = None,
) -> tuple[Ensemble, Moves]:
    """Carry walkers along a whole ladder with :func:`follow_rungs`.

    ``position`` holds exact draws at ``ladder.start``; of a ladder that is longer than
    it needs to be, ``num_temperatures`` rungs are followed.

    Returns:
        The ensemble at the ladder's end and the statistics of the moves.
    """
    if num_temperatures is None:
        num_temperatures = ladder.betas.shape[0]
    start = begin_annealing(kernel, path, position, ladder.start)
    end = follow_rungs(
        kernel, rng_key, path, start, ladder, options, 0, num_temperatures
    )

    return end.ensemble, end.moves._replace(
        acceptance=end.moves.acceptance / num_temperatures
    )
