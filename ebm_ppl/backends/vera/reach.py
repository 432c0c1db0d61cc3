"""Data rows that a generator does not reach.

Where the generator is the model's, ``log q(x) = −U(x) − log Z`` at every row.  A mode
that no draw visits pulls nothing (the reverse Kullback–Leibler divergence), and there
log q stays far below.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.scipy.sparse.linalg import cg

from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.generators.fitting import fitted_score, score_for
from ebm_ppl.generators.scores.base import Pair, Score
from ebm_ppl.generators.scores.exact import ExactScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.proposals import linearized

# Latents among which every row finds the first guess of its own.
NUM_GUESSES = 512
# Of these, lent to all rows as draws of the prior.
NUM_LENT = 64
NUM_STEPS = 12
# Gauss–Newton steps are tried at these lengths; the best one is taken.
LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.0)


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
        latents = _latents_of(pair, guesses, row) if generator.latents else guesses[0]
        return score.log_density(
            key_noise, score_state, pair, latents, row, guesses[:NUM_LENT]
        )

    return lax.map(at_row, rows)


def _latents_of(pair: Pair, guesses: Array, row: Array) -> Array:
    """The likeliest z for a row, by Gauss–Newton steps from the best guess."""
    residuals = pair.residuals
    assert residuals is not None

    def joint(latents: Array) -> Array:
        return jnp.nan_to_num(pair.log_joint(latents, row), nan=-jnp.inf)

    def step(latents: Array, _: Any) -> tuple[Array, None]:
        residual, jacobian = linearized(residuals, latents, row)
        # Conjugate gradients need no factorisation, and L steps of them are exact.
        change, _ = cg(
            lambda z: jacobian.T @ (jacobian @ z),
            jacobian.T @ residual,
            maxiter=latents.size,
        )
        trials = latents - jnp.asarray(LENGTHS)[:, None] * change
        return trials[jnp.argmax(jax.vmap(joint)(trials))], None

    first = guesses[jnp.argmax(jax.vmap(joint)(guesses))]
    latents, _ = lax.scan(step, first, None, length=NUM_STEPS)
    return latents
