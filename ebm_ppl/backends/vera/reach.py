"""Data rows that a generator does not reach.

Where the generator is the model's, ``log q(x) = −U(x) − log Z`` at every row.  A mode
that no draw visits pulls nothing (the reverse Kullback–Leibler divergence), and there
log q stays far below.
"""

from functools import partial
from typing import Any

import jax
from jax import Array, lax, random

from ebm_ppl.backends.vera.inversion import log_density_at
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.generators.fitting import fitted_score, score_for
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.generators.scores.exact import ExactScore
from ebm_ppl.generators.scores.importance import ImportanceScore

# Latents among which every row finds the first guess of its own.
NUM_GUESSES = 256
# Of these, lent to all rows as draws of the prior.
NUM_LENT = 64
NUM_STEPS = 12
# log q̂ − log p under which no draw of the generator goes to a place.
MIN_LOG_RATIO = -3.0
# Rows whose latents are searched for side by side.
BATCH = 32


def log_ratios(
    rng_key: Array,
    state: VERAState,
    distribution: EnergyDistribution,
    score: Score,
    rows: Array,
) -> Array | None:
    """``log q̂(x) + U(x)`` plus the bound on log Z, at data rows.

    Args:
        rng_key: A JAX PRNG key.
        state: A state of VERA's.
        distribution: The energy at its parameters.
        score: The estimator that the state was trained with.
        rows: ``(num_rows, *event)``.

    Returns:
        ``(num_rows,)``, near 0 where generator and energy agree.  None for generators
        with latents that are not normal given them: their latents at a given x are not
        searched for.
    """
    generator = state.generator
    if generator.latents and not generator.is_normal:
        return None
    key_fit, key_rows = random.split(rng_key)
    if isinstance(score, ImportanceScore | ExactScore):
        fitted, score_state = score, state.score_state
    else:
        fitted = score_for(ImportanceScore(), generator)
        params = state.generator_params
        score_state = fitted_score(fitted, key_fit, generator, params)

    log_q = _log_density(key_rows, state, fitted, score_state, rows)
    return log_q + distribution.unchecked_potential(rows) + state.log_normalizer_bound


@partial(jax.jit, static_argnames="score")
def _log_density(
    rng_key: Array,
    state: VERAState,
    score: ImportanceScore | ExactScore,
    score_state: Any,
    rows: Array,
) -> Array:
    """Log q̂ at rows that the generator has not drawn."""
    key_guess, key_noise = random.split(rng_key)
    generator, params = state.generator, state.generator_params
    pair = generator.pair(params)
    guesses, _ = generator.draws(params, random.split(key_guess, NUM_GUESSES))

    def at_row(row: Array) -> Array:
        return log_density_at(
            score,
            key_noise,
            score_state,
            pair,
            guesses,
            row,
            num_steps=NUM_STEPS,
            num_lent=NUM_LENT,
        )

    return lax.map(at_row, rows, batch_size=BATCH)
