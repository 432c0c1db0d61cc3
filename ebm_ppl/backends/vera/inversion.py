"""Latents, and densities, of values that the generator has not drawn."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.sparse.linalg import cg

from ebm_ppl.generators.scores.base import Pair
from ebm_ppl.generators.scores.exact import ExactScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.proposals import linearized
from ebm_ppl.programs.products import matmul

# Gauss–Newton steps are tried at these lengths; the best one is taken.
LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.0)


def log_density_at(
    score: ImportanceScore | ExactScore,
    rng_key: Array,
    score_state: Any,
    pair: Pair,
    guesses: Array,
    value: Array,
    *,
    num_steps: int,
    num_lent: int,
) -> Array:
    """Log q̂ at a value, a scalar.

    Args:
        score: The estimator.
        rng_key: A JAX PRNG key.
        score_state: Its state, fitted to this generator.
        pair: The density of a pair.
        guesses: Draws of the prior of z, ``(num_guesses, L)``; L may be 0.
        value: x, of the event shape.
        num_steps: Gauss–Newton steps to its latents.
        num_lent: Guesses that serve as samples of the prior too.
    """
    latents = guesses[0]
    if latents.size:
        latents = latents_of(pair, guesses, value, num_steps)
    return score.log_density(
        rng_key,
        score_state,
        pair,
        latents,
        value,
        guesses[:num_lent],
        is_drawn=False,
    )


def latents_of(pair: Pair, guesses: Array, value: Array, num_steps: int) -> Array:
    """The likeliest z for a value, by Gauss–Newton steps from the best guess.

    Args:
        pair: The density of a pair, normal given z.
        guesses: ``(num_guesses, L)``.
        value: x, of the event shape.
        num_steps: Number of steps.

    Returns:
        ``(L,)``.
    """
    residuals = pair.residuals
    assert residuals is not None

    def joint(latents: Array) -> Array:
        return jnp.nan_to_num(pair.log_joint(latents, value), nan=-jnp.inf)

    def step(latents: Array, _: Any) -> tuple[Array, None]:
        residual, jacobian = linearized(residuals, latents, value)
        # Conjugate gradients need no factorisation, and L steps of them are exact.
        change, _ = cg(
            lambda z: matmul(jacobian.T, matmul(jacobian, z)),
            matmul(jacobian.T, residual),
            maxiter=latents.size,
        )
        trials = latents - jnp.asarray(LENGTHS)[:, None] * change
        return trials[jnp.argmax(jax.vmap(joint)(trials))], None

    first = guesses[jnp.argmax(jax.vmap(joint)(guesses))]
    latents, _ = lax.scan(step, first, None, length=num_steps)
    return latents
