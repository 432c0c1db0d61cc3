"""The score by importance sampling of the latents."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.generators.scores.base import (
    Pair,
    ScoreInfo,
    importance_log_density,
    mixture_score,
)
from ebm_ppl.generators.scores.proposals import (
    ImportanceState,
    check_proposals,
    global_proposals,
    local_proposals,
)
from ebm_ppl.programs.products import einsum, matmul

# Sizes of a block of pairs that share their latents; a single block may be smaller.
MAX_BLOCK, MIN_BLOCK = 256, 64


@dataclass(frozen=True)
class ImportanceScore:
    """Self-normalised importance sampling of the posterior of z given x.

    *Local* proposals, for generators that are normal given z (``standardized_normal``
    is): one Gauss–Newton step from the z that generated x, ``N(z − Λ⁻¹ Rᵀ r, κ Λ⁻¹)``
    with r the standardised residuals of z and x, R their Jacobian and Λ = RᵀR.  κ is a
    running average.  R costs as much as min(L, d) proposals.

    *Global* proposals, for all other generators: ``N(z + A s, S)`` with s the gradient
    of ``log_joint`` with respect to z, A the regression of posterior draws on s and S
    the residual covariance.  A and S are running averages over the importance samples.

    Both are exact where x is linear in z.  The latents of the other pairs serve as
    proposals from the prior, for posteriors with several modes, at no further generator
    evaluations; pairs are split into equal blocks of 64 to 256 for that.

    Args:
        num_samples: Proposals per pair.
        local: False takes global proposals for every generator.
        init_scale: Standard deviation of the first global proposals, in the latents'
            units.
        memory: Time constant of the running averages, in evaluations.

    Source: Grathwohl et al. (2021), section 3.1, with other proposals (see
    docs/design.md); moments as in Cappé, Douc, Guillin, Marin and Robert (2008).
    """

    num_samples: int = 20
    local: bool = True
    init_scale: float = 0.1
    memory: float = 50.0

    def __post_init__(self) -> None:
        check_proposals(self.num_samples, self.init_scale)
        if not self.memory >= 1:
            raise ValueError(f"memory = {self.memory}; expected at least 1 evaluation.")

    def init(self, num_latents: int) -> ImportanceState:
        """Proposals before anything was learned.

        Global ones have standard deviation ``init_scale`` around z; local ones no inflation.
        """
        eye = jnp.eye(num_latents)
        return ImportanceState(self.init_scale**2 * eye, 0.0 * eye, eye, jnp.ones(()))

    def evaluate(
        self,
        rng_key: Array,
        state: ImportanceState,
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, ImportanceState]:
        """Score and log density at ``values``, and the updated running averages."""
        num, num_latents = latents.shape
        noise = random.normal(
            rng_key, (num, self.num_samples, num_latents), latents.dtype
        )
        evaluate = (
            self._local if self.local and pair.residuals is not None else self._global
        )

        # Pairs share latents inside blocks: over all pairs the cost would be quadratic.
        size = _block_size(num)
        blocks = [
            array.reshape(-1, size, *array.shape[1:])
            for array in (noise, latents, values)
        ]
        info, now = jax.vmap(lambda n, z, x: evaluate(n, state, pair, z, x))(*blocks)
        info = jax.tree.map(lambda leaf: leaf.reshape(num, *leaf.shape[2:]), info)
        return info, jax.tree.map(
            lambda old, new: old + (jnp.mean(new, axis=0) - old) / self.memory,
            state,
            now,
        )

    def log_density(
        self,
        rng_key: Array,
        state: ImportanceState,
        pair: Pair,
        latents: Array,
        value: Array,
        lent: Array,
        *,
        is_drawn: bool = True,
    ) -> Array:
        """Log q(x) alone; a smooth function of ``latents`` and ``value`` for a fixed key.

        Args:
            rng_key: A JAX PRNG key.
            state: A state fitted to this generator.
            pair: The density of a pair.
            latents: The z that generated x, ``(L,)``, or a likely one for it.
            value: x, of the event shape.
            lent: Draws of the prior, ``(M, L)``.
            is_drawn: Whether x was made from these latents.

        Returns:
            A scalar.
        """
        noise = random.normal(
            rng_key, (1, self.num_samples, len(latents)), latents.dtype
        )
        # With the z that generated x among the samples, p(z) q(x | z) / q̂ ≤ K r(z) +
        # (M + 1) p(z) even where all other samples miss.
        if is_drawn:
            lent = jnp.concatenate([lent, latents[None]])
        latents, values = latents[None], value[None]
        if self.local and pair.residuals is not None:
            proposals = local_proposals(noise, state, pair, latents, values, lent)
        else:
            proposals = global_proposals(
                noise, state, pair, latents, values, lent
            ).proposals
        return importance_log_density(pair, values, proposals, lent, False)[0][0]

    def _local(
        self,
        noise: Array,
        state: ImportanceState,
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, ImportanceState]:
        proposals = local_proposals(noise, state, pair, latents, values, latents)
        info, weights = mixture_score(pair, latents, values, proposals)
        inflation = state.inflation * jnp.mean(
            jnp.sum(weights[..., None] * noise**2, axis=1)
        )
        return info, state._replace(inflation=inflation)

    def _global(
        self,
        noise: Array,
        state: ImportanceState,
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, ImportanceState]:
        proposals, slope, steps = global_proposals(
            noise, state, pair, latents, values, latents
        )
        info, weights = mixture_score(pair, latents, values, proposals)
        shift, num = (
            einsum("nk,nkl->nl", weights, proposals.latents) - latents,
            len(latents),
        )
        now = state._replace(
            covariance=einsum("nk,nkl,nkm->lm", weights, steps, steps) / num,
            cross=matmul(shift.T, slope) / num,
            gradient=matmul(slope.T, slope) / num,
        )
        return info, now


def _block_size(num: int) -> int:
    """Size of the largest equal blocks that ``num`` pairs can be split into."""
    size = max(divisor for divisor in range(1, MAX_BLOCK + 1) if num % divisor == 0)
    if size < min(num, MIN_BLOCK):
        raise ValueError(
            f"{num} draws of the generator cannot be dealt into equal blocks of "
            f"{MIN_BLOCK} to {MAX_BLOCK}, inside which they lend each other their "
            f"latents. Take another num_particles, such as {128 * round(num / 128)}."
        )
    return size
