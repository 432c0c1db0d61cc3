"""The draws from which a VERA update takes ∇log Z."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.backends.vera.defensive import Defence, defended_draws
from ebm_ppl.backends.vera.reach import MIN_LOG_RATIO
from ebm_ppl.backends.vera.state import GeneratorProgress, VERAState
from ebm_ppl.backends.vera.steps import GeneratorInfo, running_mean
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.smc.weights import ess_fraction, log_mean_exp


class GradientDraws(NamedTuple):
    """Draws for the energy's step, and what they say of log Z.

    Attributes:
        weighed: Values and the log density that they come from, for weights exp(−U)
            over that; None for fresh draws of the generator with equal weights.
        log_normalizer: A running log Z: the bound, or of defensive draws the log of
            their mean weight, which knows of modes that the generator has dropped.
        defence: For the next state.
        diagnostics: Of defensive draws, by their keys in the history: that log Z, the
            weights' ESS fraction, and the share of the weight where no draw of the
            generator goes.
    """

    weighed: tuple[Array, Array] | None
    log_normalizer: Array
    defence: Defence | None
    diagnostics: dict[str, Array]


def gradient_draws(
    backend: Any,
    rng_key: Array,
    state: VERAState,
    energy: EnergyDistribution,
    progress: GeneratorProgress,
    found: GeneratorInfo,
) -> GradientDraws:
    """Fresh draws, the last step's with weights, or those with draws around rows.

    Args:
        backend: A :class:`VERA`.
        rng_key: A JAX PRNG key.
        state: The state before the update.
        energy: The energy at its parameters.
        progress: The generator after its steps.
        found: What its last step drew.
    """
    if state.defence is None:
        is_weighed = backend.importance_weights
        weighed = (found.values, found.log_density) if is_weighed else None
        return GradientDraws(weighed, progress.bound, None, {})

    drawn = defended_draws(
        rng_key,
        state.defence.kernels,
        state.coordinates,
        state.generator,
        progress.params,
        backend.score_of(state.generator),
        progress.score_state,
        backend.num_particles,
    )

    # Weights, and what only the draws around rows reach
    potential = energy.unchecked_potential(drawn.values)
    log_weight = -potential - drawn.log_density
    log_z = log_mean_exp(log_weight, axis=0)
    log_ratio = drawn.log_generator + potential + log_z
    unreached = jnp.sum(
        jnp.where(log_ratio < MIN_LOG_RATIO, jax.nn.softmax(log_weight), 0.0)
    )
    level = running_mean(state.defence.log_normalizer, log_z)
    defence = state.defence._replace(log_normalizer=level)
    diagnostics = {
        "log_normalizer_weighted": level,
        "gradient_ess": ess_fraction(log_weight),
        "unreached": unreached,
    }
    weighed = (drawn.values, drawn.log_density)
    return GradientDraws(weighed, level, defence, diagnostics)
