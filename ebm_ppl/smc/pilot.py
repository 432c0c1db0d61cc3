"""A short run that chooses temperatures and step sizes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.kernels.base import Kernel, KernelState, adapt_step_size
from ebm_ppl.smc.annealing import (
    NUM_SETTLING_MOVES,
    AnnealingOptions,
    advance,
    begin_climb,
)
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.smc.path import Ladder, Path, evaluate_path
from ebm_ppl.smc.weights import conditional_ess_fraction


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

    One body: the loop's state and its step belong together.

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
        ensemble, state, _ = advance(
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
