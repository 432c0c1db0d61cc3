"""A short run that chooses temperatures, and tunes the kernel at each."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.kernels.base import Kernel, KernelState, Tuning
from ebm_ppl.smc.annealing import (
    NUM_SETTLING_MOVES,
    AnnealingOptions,
    advance,
    begin_annealing,
)
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.smc.path import AtTemperature, Ladder, Path, difference_at
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
    tuning: Tuning,
    options: AnnealingOptions,
    *,
    max_rungs: int,
    ess_target: float = 0.9,
) -> Pilot:
    """Choose temperatures by conditional ESS, and tune the kernel by acceptance.

    One body: the loop's state and its step belong together.

    Each temperature is found by bisection on β for the conditional ESS of the next step
    (Zhou, Johansen and Aston 2016, section 3.3).  With a batch shape the hardest
    element decides.

    Args:
        kernel: Any kernel; its own rule decides what adapts.
        rng_key: A JAX PRNG key.
        path: U_start and D.
        position: Pilot walkers drawn from the start, ``(num_chains, num_walkers,
            *batch, *event)``.
        tuning: The kernel's first tuning.
        options: See :class:`AnnealingOptions`.
        max_rungs: Largest number of rungs; where that is not enough,
            ``ladder.betas`` ends below 1.
        ess_target: Conditional ESS fraction of one step.
    """
    ensemble, state, _ = begin_annealing(kernel, path, position, jnp.zeros(()))

    def next_beta(ensemble: Ensemble, state: KernelState, beta: Array) -> Array:
        def enough(candidate: Array) -> Array:
            increments = -(candidate - beta) * difference_at(state)
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

    def is_below(carry: tuple) -> Array:
        rung, beta = carry[0], carry[1]
        return (rung < max_rungs) & (beta < 1.0)

    def settle(
        carry: tuple[KernelState, Tuning], key: Array, beta: Array
    ) -> tuple[tuple[KernelState, Tuning], None]:
        state, tuning = carry
        state, info = kernel.step(key, state, AtTemperature(path, beta), tuning)
        acceptance = jnp.mean(info.acceptance, axis=(0, 1))
        return (state, kernel.adapt(tuning, acceptance, gain=0.5)), None

    def next_rung(carry: tuple) -> tuple:
        rung, beta, tuning, rng_key, ensemble, state, ladder = carry
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
            tuning,
            options,
        )

        # Settle
        keys = random.split(key_settle, NUM_SETTLING_MOVES)
        (state, tuning), _ = lax.scan(
            partial(settle, beta=target), (state, tuning), keys
        )
        ensemble = ensemble._replace(position=state.position, potential=state.potential)

        # Record
        ladder = ladder._replace(
            betas=ladder.betas.at[rung].set(target),
            tunings=jax.tree.map(
                lambda all_rungs, here: all_rungs.at[rung].set(here),
                ladder.tunings,
                tuning,
            ),
        )
        return rung + 1, target, tuning, rng_key, ensemble, state, ladder

    dtype = state.potential.dtype
    tuning = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tuning)
    ladder = Ladder(
        jnp.zeros((), dtype),
        jnp.ones(max_rungs, dtype),
        jax.tree.map(lambda leaf: jnp.ones((max_rungs, *leaf.shape), dtype), tuning),
    )

    carry = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((), dtype),
        tuning,
        rng_key,
        ensemble,
        state,
        ladder,
    )

    rung, *_, state, ladder = lax.while_loop(is_below, next_rung, carry)
    return Pilot(ladder, rung, difference_at(state))


def refine_ladder(pilot: Pilot, num_temperatures: int) -> Ladder:
    """The pilot's protocol at ``num_temperatures`` rungs, ending exactly at β = 1.

    β, and the logarithms of the tuning, are interpolated as functions of the rung,
    which keeps the pilot's spacing.
    """
    rungs = pilot.num_rungs.astype(pilot.ladder.betas.dtype)
    places = rungs * jnp.arange(1, num_temperatures + 1) / num_temperatures
    known = jnp.arange(1, pilot.ladder.betas.shape[0] + 1, dtype=rungs.dtype)

    betas = jnp.interp(
        places,
        jnp.concatenate([jnp.zeros(1), known]),
        jnp.concatenate([jnp.zeros(1), pilot.ladder.betas]),
    )

    def refine(leaf: Array) -> Array:
        columns = jnp.log(leaf).reshape(known.shape[0], -1)
        refined = jax.vmap(
            lambda column: jnp.exp(jnp.interp(places, known, column)), 1, 1
        )(columns)
        return refined.reshape(num_temperatures, *leaf.shape[1:])

    tunings = jax.tree.map(refine, pilot.ladder.tunings)
    return Ladder(pilot.ladder.start, betas.at[-1].set(1.0), tunings)
