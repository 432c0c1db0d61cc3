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


@partial(jax.jit, static_argnames=("score", "num_particles"))
def fit_first_score(
    score: Score,
    num_particles: int,
    rng_key: Array,
    bound: BoundModel,
    generator: Generator,
    params: Params,
    generator_params: Params,
) -> tuple[Any, Array]:
    """Fit the score's estimator to the first generator, and find the bound on log Z.

    Then no gradient rests on an estimator that was not fitted.  The bound is
    ``E_q[−U] + H(q)``.
    """
    distribution = bound.energies(params)[generator.name]

    def elbo(values: Array, log_density: Array) -> Array:
        return -jnp.mean(distribution.unchecked_potential(values) + log_density)

    state, bounds = fit_score(
        score, rng_key, generator, generator_params, num_particles, elbo
    )
    return state, jnp.mean(bounds[-BOUND_MEMORY:])
