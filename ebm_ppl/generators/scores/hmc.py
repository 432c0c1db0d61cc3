"""The score by chains over the latents."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.generators.scores.base import Pair, ScoreInfo
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.proposals import ImportanceState


class HMCState(NamedTuple):
    """Log step size of the chains, a scalar, and the density estimator's state."""

    log_step_size: Array
    density: ImportanceState


@dataclass(frozen=True, eq=False)
class HMCScore:
    """Averages over Hamiltonian Monte Carlo chains on z given x: the costly reference.

    Every chain starts at the z that made x, so it is at equilibrium from the first
    step; ``num_warmup`` transitions are for forgetting it, since the z that made x is
    not independent of the noise that the score is paired with.  Every transition
    shortens its step by a random factor in [½, 1]: a fixed path length may come round
    to its start.

    Args:
        num_warmup: Transitions that are discarded.
        num_samples: Transitions that the score is averaged over.
        num_steps: Leapfrog steps per transition.
        step_size: Initial step, in the latents' units; adapted towards
            ``target_acceptance``.
        target_acceptance: Acceptance rate to adapt to.
        density: Estimator of the log density, which chains do not give.

    Source: Dieng, Ruiz, Blei and Titsias (2019), the method that Grathwohl et al.
    (2021) compare with.
    """

    num_warmup: int = 5
    num_samples: int = 5
    num_steps: int = 5
    step_size: float = 0.1
    target_acceptance: float = 0.8
    density: ImportanceScore = field(default_factory=ImportanceScore)

    def __post_init__(self) -> None:
        for option, least in (("num_warmup", 0), ("num_samples", 1), ("num_steps", 1)):
            if getattr(self, option) < least:
                raise ValueError(
                    f"{option} = {getattr(self, option)}; expected at least {least}."
                )
        if not self.step_size > 0:
            raise ValueError(
                f"step_size = {self.step_size}; expected a positive number."
            )

    def init(self, num_latents: int) -> HMCState:
        """The initial step size."""
        return HMCState(
            jnp.log(jnp.asarray(self.step_size, float)), self.density.init(num_latents)
        )

    def evaluate(
        self, rng_key: Array, state: HMCState, pair: Pair, latents: Array, values: Array
    ) -> tuple[ScoreInfo, HMCState]:
        """Score and log density at ``values``, and the state with the step size adapted.

        One body: the chain's step and its adaptation share their state.
        """
        key_chain, key_density = random.split(rng_key)
        step_size = jnp.exp(state.log_step_size)

        def potential(latents: Array) -> Array:
            return -jax.vmap(pair.log_joint)(latents, values)

        def gradient(latents: Array) -> Array:
            return jax.grad(lambda z: jnp.sum(potential(z)))(latents)

        def transition(latents: Array, key: Array) -> tuple[Array, Array]:
            key_momentum, key_step, key_accept = random.split(key, 3)
            start = random.normal(key_momentum, latents.shape, latents.dtype)
            step = step_size * random.uniform(
                key_step, (len(latents), 1), latents.dtype, 0.5, 1.0
            )

            def leapfrog(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                position, momentum = carry
                position = position + step * momentum
                return position, momentum - step * gradient(position)

            momentum = start - 0.5 * step * gradient(latents)
            position, momentum = lax.fori_loop(
                0, self.num_steps, leapfrog, (latents, momentum)
            )
            momentum = momentum + 0.5 * step * gradient(position)
            kinetic = 0.5 * jnp.sum(start**2 - momentum**2, axis=-1)
            log_ratio = potential(latents) - potential(position) + kinetic
            accept = (
                jnp.log1p(-random.uniform(key_accept, log_ratio.shape)) < log_ratio
            )  # False for NaN
            acceptance = jnp.where(
                jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0))
            )
            return jnp.where(accept[:, None], position, latents), jnp.mean(acceptance)

        def counted(latents: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
            latents, acceptance = transition(latents, key)
            score = jax.grad(lambda x: jnp.sum(jax.vmap(pair.log_joint)(latents, x)))(
                values
            )
            return latents, (score, acceptance)

        keys = random.split(key_chain, self.num_warmup + self.num_samples)
        latents_now, _ = lax.scan(transition, latents, keys[: self.num_warmup])
        _, (scores, acceptance) = lax.scan(
            counted, latents_now, keys[self.num_warmup :]
        )
        found, density = self.density.evaluate(
            key_density, state.density, pair, latents, values
        )
        log_step_size = state.log_step_size + 0.05 * (
            jnp.mean(acceptance) - self.target_acceptance
        )
        return ScoreInfo(jnp.mean(scores, axis=0), found.log_density), HMCState(
            log_step_size, density
        )
