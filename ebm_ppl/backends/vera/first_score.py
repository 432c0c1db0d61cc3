"""The score's estimator, fitted to the first generator before any update."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.backends.vera.steps import BOUND_MEMORY
from ebm_ppl.generators.fitting import fit_score
from ebm_ppl.generators.program import Generator
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.smc.weights import log_mean_exp


@partial(jax.jit, static_argnames=("score", "num_particles"))
def fit_first_score(
    score: Score,
    num_particles: int,
    rng_key: Array,
    bound: BoundModel,
    generator: Generator,
    params: Params,
    generator_params: Params,
) -> tuple[Any, Array, Array]:
    """Fit the score's estimator to the first generator, and find two bounds on log Z.

    Then no gradient rests on an estimator that was not fitted.  The bounds are
    ``E_q[−U] + H(q)`` and the log of the draws' mean weight.
    """
    distribution = bound.energies(params)[generator.name]

    def bounds_of(values: Array, log_density: Array) -> tuple[Array, Array]:
        log_weight = -distribution.unchecked_potential(values) - log_density
        return jnp.mean(log_weight), log_mean_exp(log_weight, axis=0)

    state, bounds = fit_score(
        score, rng_key, generator, generator_params, num_particles, bounds_of
    )
    elbo, weighted = (jnp.mean(bound[-BOUND_MEMORY:]) for bound in bounds)
    return state, elbo, weighted
