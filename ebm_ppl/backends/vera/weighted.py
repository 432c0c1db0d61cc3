"""The draws that a run took gradients from, weighted to be the model's."""

from functools import partial

import jax
from jax import Array, random

from ebm_ppl.backends.vera.defensive import defended_draws
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.normalizer.own_draws import OwnDraws

# Independent islands, from which Monte Carlo errors come, and draws in each.
NUM_CHAINS, NUM_DRAWS = 16, 512


@partial(jax.jit, static_argnames="score")
def weighted_draws(
    rng_key: Array, state: VERAState, bound: BoundModel, score: Score
) -> OwnDraws:
    """Draws with log weights −U minus the log density that they come from."""
    generator, params = state.generator, state.generator_params
    pair = generator.pair(params)
    distribution = bound.energies(state.params)[generator.name]

    def defended(rng_key: Array) -> tuple[Array, Array]:
        assert state.defence is not None
        drawn = defended_draws(
            rng_key,
            state.defence.kernels,
            state.coordinates,
            generator,
            params,
            score,  # type: ignore[arg-type]
            state.score_state,
            NUM_DRAWS // 2,
        )
        return drawn.values, drawn.log_density

    def plain(rng_key: Array) -> tuple[Array, Array]:
        key_draws, key_score = random.split(rng_key)
        latents, values = generator.draws(params, random.split(key_draws, NUM_DRAWS))
        found, _ = score.evaluate(key_score, state.score_state, pair, latents, values)
        return values, found.log_density

    draw = plain if state.defence is None else defended

    def island(rng_key: Array) -> OwnDraws:
        values, log_density = draw(rng_key)
        return OwnDraws(values, -distribution.unchecked_potential(values) - log_density)

    return jax.lax.map(island, random.split(rng_key, NUM_CHAINS))
