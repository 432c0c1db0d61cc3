"""A generator's draws, weighted to be the model's."""

from functools import partial

import jax
from jax import Array, random

from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.normalizer.own_draws import OwnDraws

# Independent islands, from which Monte Carlo errors come, and draws in each.
NUM_CHAINS, NUM_DRAWS = 16, 256


@partial(jax.jit, static_argnames="score")
def weighted_draws(
    rng_key: Array, state: VERAState, distribution: EnergyDistribution, score: Score
) -> OwnDraws:
    """Draws with log weights ``−U − log q̂``."""
    generator, params = state.generator, state.generator_params
    pair = generator.pair(params)

    def island(rng_key: Array) -> tuple[Array, Array]:
        key_draws, key_score = random.split(rng_key)
        latents, values = generator.draws(params, random.split(key_draws, NUM_DRAWS))
        found, _ = score.evaluate(key_score, state.score_state, pair, latents, values)
        potential = distribution.unchecked_potential(values)
        return values, -potential - found.log_density

    return OwnDraws(*jax.lax.map(island, random.split(rng_key, NUM_CHAINS)))
