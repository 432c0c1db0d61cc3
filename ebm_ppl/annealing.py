"""Annealed sequential Monte Carlo from a tractable distribution to an energy.

The path is ``U_β = U_start + β D`` with ``D = U − U_start``, β from 0 to 1, in the
walkers' coordinates u.  A *pilot* ensemble chooses the temperatures and the step sizes;
fresh islands then follow that fixed protocol.  So each island's Ẑ is unbiased, with its
ESS-triggered resampling too (Neal 2001; Del Moral, Doucet and Jasra 2006).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike

from ebm_ppl.kernels import Kernel, KernelState, adapt_step_size, move
from ebm_ppl.resampling import Resampling
from ebm_ppl.weights import conditional_ess_fraction, ess_fraction, log_mean_exp

# Pilot moves per temperature: enough to stay near equilibrium and to settle the step
# size.
NUM_SETTLING_MOVES = 20


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


class Pilot(NamedTuple):
    """Result of the pilot run.

    Attributes:
        ladder: The protocol, padded to the largest number of rungs.
        num_rungs: Number of rungs in use.
        difference: D at the pilot's final walkers, ``(num_chains, num_walkers,
            *batch)``.
    """

    ladder: Ladder
    num_rungs: Array
    difference: Array


class Ensemble(NamedTuple):
    """Weighted walkers and the log normalisers of their islands' past resamplings.

    Attributes:
        position: Walkers in base-standard coordinates, ``(num_chains, num_walkers,
            *batch, *event)``.
        potential: Potential U of the walkers, ``(num_chains, num_walkers, *batch)``.
        log_weight: Log weights A, same shape.
        log_normalizer: Sum of the log-mean-exps at past resamplings, ``(num_chains,
            *batch)``.
    """

    position: Array
    potential: Array
    log_weight: Array
    log_normalizer: Array

    @property
    def log_normalizers(self) -> Array:
        """``log Ẑ_c`` of every island, ``(num_chains, *batch)``."""
        return self.log_normalizer + log_mean_exp(self.log_weight, axis=1)


def resample_islands(
    rng_key: Array, ensemble: Ensemble, low: Array, resampling: Resampling
) -> Ensemble:
    """Resample the islands (and batch elements) where ``low``; keep the others.

    ``low`` is boolean, ``(num_chains, *batch)``.
    """
    # Ancestors
    log_weight = ensemble.log_weight
    flat = jnp.moveaxis(log_weight, 1, -1).reshape(-1, log_weight.shape[1])
    picked = jax.vmap(resampling)(random.split(rng_key, flat.shape[0]), flat)
    picked = jnp.moveaxis(picked.reshape((*low.shape, log_weight.shape[1])), -1, 1)
    stay = jnp.arange(log_weight.shape[1]).reshape(
        (1, -1) + (1,) * (log_weight.ndim - 2)
    )
    ancestors = jnp.where(low[:, None], picked, stay)

    def gather(value: Array, indices: Array) -> Array:
        return value.at[indices].get(mode="promise_in_bounds")

    # One index gathers a whole event; take_along_axis would build an index for every
    # element.
    for _ in range(log_weight.ndim - 2):
        gather = jax.vmap(gather, (1, 1), 1)
    gather = jax.vmap(gather)

    return Ensemble(
        position=gather(ensemble.position, ancestors),
        potential=gather(ensemble.potential, ancestors),
        log_weight=jnp.where(low[:, None], 0.0, log_weight),
        log_normalizer=jnp.where(
            low, ensemble.log_normalizers, ensemble.log_normalizer
        ),
    )


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


def _reweight(ensemble: Ensemble, state: KernelState, beta_step: Array) -> Ensemble:
    # A difference of +inf (outside the energy's domain) means weight zero; 0 · inf must
    # not become NaN.
    return ensemble._replace(
        log_weight=ensemble.log_weight
        - jnp.where(beta_step != 0, beta_step * state.aux[1], 0.0)
    )


class Moves(NamedTuple):
    """Statistics of the moves along a ladder, each of the batch shape.

    Attributes:
        acceptance: Mean acceptance.
        turnover: Mean squared jump over the walkers' variance, summed over
            temperatures; about 1 when walkers have moved as far as they are spread.
    """

    acceptance: Array
    turnover: Array


def unmoved(like: Array) -> Moves:
    """Statistics where no move was needed: acceptance 1, infinite turnover."""
    return Moves(jnp.ones_like(like), jnp.full_like(like, jnp.inf))


class Climb(NamedTuple):
    """State of a run along a ladder between two temperatures.

    Attributes:
        ensemble: The walkers and their weights.
        state: Their potentials and gradients, those of U_start and D in ``aux``.
        moves: Sums of the statistics over the temperatures so far.
    """

    ensemble: Ensemble
    state: KernelState
    moves: Moves


def begin_climb(path: Path, position: Array, beta: Array) -> Climb:
    """Equally weighted walkers at ``position`` under U_β.

    ``position`` is ``(num_chains, num_walkers, *batch, *event)``.
    """
    state = evaluate_path(path, position, beta)
    zeros = jnp.zeros_like(state.potential)
    return Climb(
        Ensemble(position, state.potential, zeros, zeros[:, 0]),
        state,
        Moves(zeros[0, 0], zeros[0, 0]),
    )


def _advance(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    ensemble: Ensemble,
    state: KernelState,
    beta: Array,
    beta_step: Array,
    step_size: Array,
    options: "AnnealingOptions",
) -> tuple[Ensemble, KernelState, Moves]:
    """Resample where the ESS is low, reweight, and move under U_β.

    Resampling comes first: after the last temperature it would only replace weights by
    duplicate walkers.
    """
    key_resample, key_move = random.split(rng_key)
    evaluate = partial(evaluate_path, path, beta=beta)

    # Resample
    low = ess_fraction(ensemble.log_weight, axis=1) < options.ess_threshold

    def resample() -> tuple[Ensemble, KernelState]:
        resampled = resample_islands(key_resample, ensemble, low, options.resampling)
        return resampled, evaluate(resampled.position)

    ensemble, state = lax.cond(
        jnp.any(low), resample, lambda: (ensemble, at_temperature(state, beta))
    )

    # Reweight
    ensemble, before = _reweight(ensemble, state, beta_step), state.position

    # Move
    state, info = move(
        kernel, key_move, state, evaluate, step_size, options.num_kernel_steps
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


def run_pilot(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    position: Array,
    step_size: Array,
    options: AnnealingOptions,
    *,
    max_rungs: int,
    ess_target: float = 0.9,
) -> Pilot:
    """Choose temperatures by conditional ESS, and step sizes by acceptance.

    Each temperature is found by bisection on β for the conditional ESS of the next step
    (Zhou, Johansen and Aston 2016, section 3.3).  With a batch shape the hardest
    element decides.

    Args:
        kernel: Its ``target_acceptance`` decides whether step sizes adapt.
        rng_key: A JAX PRNG key.
        path: U_start and D.
        position: Pilot walkers drawn from the start, ``(num_chains, num_walkers,
            *batch, *event)``.
        step_size: Initial step size, ``batch``.
        options: See :class:`AnnealingOptions`.
        max_rungs: Largest number of rungs; where that is not enough,
            ``ladder.betas`` ends below 1.
        ess_target: Conditional ESS fraction of one step.
    """
    ensemble, state, _ = begin_climb(path, position, jnp.zeros(()))

    def next_beta(ensemble: Ensemble, state: KernelState, beta: Array) -> Array:
        def enough(candidate: Array) -> Array:
            increments = -(candidate - beta) * state.aux[1]
            return (
                jnp.min(conditional_ess_fraction(ensemble.log_weight, increments))
                >= ess_target
            )

        def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            ok = enough(middle)
            return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

        one = jnp.ones_like(beta)
        low, high = lax.fori_loop(0, 24, bisect, (beta, one))
        # β must increase: where no step was accepted, take the bracket's upper end,
        # about one ulp above β.
        return jnp.where(enough(one), one, jnp.where(low > beta, low, high))

    def climbing(carry: tuple) -> Array:
        rung, beta = carry[0], carry[1]
        return (rung < max_rungs) & (beta < 1.0)

    def settle(
        carry: tuple[KernelState, Array], key: Array, beta: Array
    ) -> tuple[tuple[KernelState, Array], None]:
        state, step_size = carry
        state, info = kernel.step(
            key, state, partial(evaluate_path, path, beta=beta), step_size
        )
        return (
            state,
            adapt_step_size(
                kernel, step_size, jnp.mean(info.acceptance, axis=(0, 1)), gain=0.5
            ),
        ), None

    def climb(carry: tuple) -> tuple:
        rung, beta, step_size, rng_key, ensemble, state, ladder = carry
        rng_key, key, key_settle = random.split(rng_key, 3)

        # Temperature
        target = next_beta(ensemble, state, beta)
        ensemble, state, _ = _advance(
            kernel,
            key,
            path,
            ensemble,
            state,
            target,
            target - beta,
            step_size,
            options,
        )

        # Settle
        keys = random.split(key_settle, NUM_SETTLING_MOVES)
        (state, step_size), _ = lax.scan(
            partial(settle, beta=target), (state, step_size), keys
        )
        ensemble = ensemble._replace(position=state.position, potential=state.potential)

        # Record
        ladder = ladder._replace(
            betas=ladder.betas.at[rung].set(target),
            step_sizes=ladder.step_sizes.at[rung].set(step_size),
        )
        return rung + 1, target, step_size, rng_key, ensemble, state, ladder

    dtype = state.potential.dtype
    step_size = jnp.asarray(step_size, dtype)
    ladder = Ladder(
        jnp.zeros((), dtype),
        jnp.ones(max_rungs, dtype),
        jnp.ones((max_rungs, *step_size.shape), dtype),
    )
    carry = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((), dtype),
        step_size,
        rng_key,
        ensemble,
        state,
        ladder,
    )

    rung, *_, state, ladder = lax.while_loop(climbing, climb, carry)
    return Pilot(ladder, rung, state.aux[1])


def refine_ladder(pilot: Pilot, num_temperatures: int) -> Ladder:
    """The pilot's protocol at ``num_temperatures`` rungs, ending exactly at β = 1.

    β and log h are interpolated as functions of the rung, which keeps the pilot's
    spacing.
    """
    rungs = pilot.num_rungs.astype(pilot.ladder.betas.dtype)
    places = rungs * jnp.arange(1, num_temperatures + 1) / num_temperatures
    known = jnp.arange(1, pilot.ladder.betas.shape[0] + 1, dtype=rungs.dtype)

    betas = jnp.interp(
        places,
        jnp.concatenate([jnp.zeros(1), known]),
        jnp.concatenate([jnp.zeros(1), pilot.ladder.betas]),
    )

    log_h = jnp.log(pilot.ladder.step_sizes).reshape(known.shape[0], -1)
    step_sizes = jax.vmap(
        lambda column: jnp.exp(jnp.interp(places, known, column)), 1, 1
    )(log_h)
    step_sizes = step_sizes.reshape(
        num_temperatures, *pilot.ladder.step_sizes.shape[1:]
    )

    return Ladder(pilot.ladder.start, betas.at[-1].set(1.0), step_sizes)


def climb(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    climb: Climb,
    ladder: Ladder,
    options: AnnealingOptions,
    first: ArrayLike,
    last: ArrayLike,
) -> Climb:
    """Carry walkers over the temperatures ``first`` to ``last − 1`` of a fixed ladder.

    Args:
        kernel: Any kernel; its own log weights are added.
        rng_key: A JAX PRNG key, the same for all pieces of one run.
        path: U_start and D.
        climb: From :func:`begin_climb` with exact draws at ``ladder.start``, or
            returned by the previous piece.
        ladder: From :func:`refine_ladder`, or its reverse.
        options: See :class:`AnnealingOptions`.
        first: Index of the first temperature; may be traced.
        last: Index after the last temperature; may be traced.
    """
    steps = jnp.diff(ladder.betas, prepend=ladder.start)

    def body(rung: Array, climb: Climb) -> Climb:
        ensemble, state, moves = _advance(
            kernel,
            random.fold_in(rng_key, rung),
            path,
            climb.ensemble,
            climb.state,
            ladder.betas[rung],
            steps[rung],
            ladder.step_sizes[rung],
            options,
        )
        return Climb(ensemble, state, jax.tree.map(jnp.add, climb.moves, moves))

    return lax.fori_loop(first, last, body, climb)


def anneal(
    kernel: Kernel,
    rng_key: Array,
    path: Path,
    position: Array,
    ladder: Ladder,
    options: AnnealingOptions,
) -> tuple[Ensemble, Moves]:
    """Carry walkers along a whole ladder with :func:`climb`.

    ``position`` holds exact draws at ``ladder.start``.

    Returns:
        The ensemble at the ladder's end and the statistics of the moves.
    """
    start, num_temperatures = (
        begin_climb(path, position, ladder.start),
        ladder.betas.shape[0],
    )
    end = climb(kernel, rng_key, path, start, ladder, options, 0, num_temperatures)

    return end.ensemble, end.moves._replace(
        acceptance=end.moves.acceptance / num_temperatures
    )
