"""The score of a generator without latents."""

from dataclasses import dataclass

import jax
from jax import Array

from ebm_ppl.generators.scores.base import Pair, ScoreInfo, self_normalized


@dataclass(frozen=True)
class ExactScore:
    """The score of a generator without latents, such as a flow: q(x | z) is q(x)."""

    def init(self, num_latents: int) -> tuple[()]:
        """An empty state."""
        return ()

    def evaluate(
        self,
        rng_key: Array,
        state: tuple[()],
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, tuple[()]]:
        """Score and log density at ``values``."""
        return self_normalized(
            lambda values: (jax.vmap(pair.log_joint)(latents, values), state), values
        )

    def log_density(
        self,
        rng_key: Array,
        state: tuple[()],
        pair: Pair,
        latents: Array,
        value: Array,
        lent: Array,
        *,
        is_drawn: bool = True,
    ) -> Array:
        """Log q(x), a scalar."""
        return pair.log_joint(latents, value)
