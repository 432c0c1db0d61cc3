"""The choice of a score estimator for a generator, and its fit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array, lax, random

from ebm_ppl.generators.program import Generator, T
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.generators.scores.exact import ExactScore
from ebm_ppl.model.program import Params

# Evaluations over which a score estimator is fitted.
NUM_FITTING_STEPS = 150
# Draws per evaluation where nobody says otherwise.
NUM_FITTING_DRAWS = 64


def score_for(score: T, generator: Generator) -> T | ExactScore:
    """``score``, or the exact score where the generator has no latents."""
    return score if generator.latents else ExactScore()


def fit_score(
    score: Score,
    rng_key: Array,
    generator: Generator,
    params: Params,
    num_draws: int,
    tell: Callable[[Array, Array], Any],
) -> tuple[Any, Any]:
    """Fit a score estimator to a fixed generator.

    Returns:
        The estimator's state, and ``tell(values, log_density)`` at the draws of every
        evaluation, stacked.
    """
    pair = generator.pair(params)

    def evaluate(state: Any, rng_key: Array) -> tuple[Any, Any]:
        key_draw, key_score = random.split(rng_key)
        latents, values = generator.draws(params, random.split(key_draw, num_draws))
        found, state = score.evaluate(key_score, state, pair, latents, values)
        return state, tell(values, found.log_density)

    return lax.scan(
        evaluate,
        score.init(generator.num_latents),
        random.split(rng_key, NUM_FITTING_STEPS),
    )


@partial(jax.jit, static_argnums=0)
def fitted_score(
    score: Score, rng_key: Array, generator: Generator, params: Params
) -> Any:
    """The state of a score estimator, fitted to a fixed generator."""
    return fit_score(
        score, rng_key, generator, params, NUM_FITTING_DRAWS, lambda *_: None
    )[0]
