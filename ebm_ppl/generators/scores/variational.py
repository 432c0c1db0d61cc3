"""The paper's score, by a variational posterior of the latents."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random
from jax.nn import logsumexp

from ebm_ppl.generators.scores.base import Pair, ScoreInfo, self_normalized
from ebm_ppl.generators.scores.proposals import check_proposals, log_standard_normal


class VariationalState(NamedTuple):
    """Log η, the scale of proposals per latent, ``(L,)``, and its optimiser's state."""

    log_scale: Array
    optim_state: Any


@dataclass(frozen=True, eq=False)
class VariationalScore:
    """The paper's self-normalised importance sampling from N(z, diag η²).

    The ELBO teaches η.

    It is kept for comparison.  The z that made x is a draw of the posterior, not its
    centre, so the score is biased towards that z: with 32 latents its gradient of the
    entropy is half too large (see docs/design.md).

    Args:
        num_samples: Proposals per pair.
        init_scale: Initial η, in the latents' units.
        optim: An optax transformation for log η.

    Source: Grathwohl et al. (2021), section 3.1 and Algorithm 1.
    """

    num_samples: int = 20
    init_scale: float = 0.1
    optim: optax.GradientTransformation = field(
        default_factory=lambda: optax.adam(1e-2)
    )

    def __post_init__(self) -> None:
        check_proposals(self.num_samples, self.init_scale)

    def init(self, num_latents: int) -> VariationalState:
        """η = ``init_scale`` in every direction."""
        log_scale = jnp.full(num_latents, jnp.log(self.init_scale))
        return VariationalState(log_scale, self.optim.init(log_scale))

    def evaluate(
        self,
        rng_key: Array,
        state: VariationalState,
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, VariationalState]:
        """Score and log density at ``values``, and the state after one step of η."""
        num, num_latents = latents.shape
        noise = random.normal(
            rng_key, (num, self.num_samples, num_latents), latents.dtype
        )
        log_proposal = log_standard_normal(noise) - jnp.sum(state.log_scale)
        proposals = latents[:, None] + jnp.exp(state.log_scale) * noise

        def log_mean_weight(values: Array) -> tuple[Array, Array]:
            log_weight = (
                jax.vmap(jax.vmap(pair.log_joint, (0, None)))(proposals, values)
                - log_proposal
            )
            return logsumexp(log_weight, axis=1) - jnp.log(self.num_samples), log_weight

        info, _ = self_normalized(log_mean_weight, values)

        def negative_elbo(log_scale: Array) -> Array:
            proposals = latents + jnp.exp(log_scale) * noise[:, 0]
            return -jnp.mean(jax.vmap(pair.log_joint)(proposals, values)) - jnp.sum(
                log_scale
            )

        gradient = jax.grad(negative_elbo)(state.log_scale)
        update, optim_state = self.optim.update(
            gradient, state.optim_state, state.log_scale
        )
        return info, VariationalState(
            optax.apply_updates(state.log_scale, update), optim_state
        )
