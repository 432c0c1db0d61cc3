"""Estimators of ``∇ₓ log q(x)`` for q(x) = ∫ q(x | z) p(z) dz, at drawn pairs (z, x).

``∇ₓ log q(x) = E[∇ₓ log q(x | z′)]`` over z′ from the posterior of z given x (Grathwohl
et al. 2021, section 3); the z that x was made from is an exact draw of that posterior,
and every estimator starts there.  Shapes: latents ``(num, L)``, values ``(num,
*event)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp


class Pair(NamedTuple):
    """The density of one pair (z, x).

    Attributes:
        log_prior: ``log p(z)``.
        log_joint: ``log p(z) + log q(x | z)``.
        residuals: z and x in coordinates where their normals are standard, ``(L,)`` and
            ``(d,)``; None where they are not normals.
    """

    log_prior: Callable[[Array], Array]
    log_joint: Callable[[Array, Array], Array]
    residuals: Callable[[Array, Array], tuple[Array, Array]] | None = None


class ScoreInfo(NamedTuple):
    """What an estimator finds at every pair.

    The score, ``(num, *event)``, and the log density log q(x), ``(num,)``.
    """

    score: Array
    log_density: Array


class Score(Protocol):
    """The protocol of score estimators: a state to carry, and one evaluation."""

    def init(self, num_latents: int) -> Any: ...  # noqa: D102

    def evaluate(  # noqa: D102
        self, rng_key: Array, state: Any, pair: Pair, latents: Array, values: Array
    ) -> tuple[ScoreInfo, Any]: ...


class Proposals(NamedTuple):
    """Draws of every pair's own proposal, and log densities.

    Attributes:
        latents: ``(num, K, L)``.
        log_density: At these, ``(num, K)``.
        elsewhere: At the latents lent to all pairs, ``(num, M)``.
    """

    latents: Array
    log_density: Array
    elsewhere: Array


def self_normalized(
    log_mean_weight: Callable[[Array], tuple[Array, Any]], values: Array
) -> tuple[ScoreInfo, Any]:
    """Score and log density from ``log_mean_weight``.

    That maps values to log q̂ of every pair, and anything else.
    """
    # With the proposals fixed, its gradient is the self-normalised average of ∇ₓ log
    # q(x | z′).
    found, pull, rest = jax.vjp(log_mean_weight, values, has_aux=True)
    (score,) = pull(jnp.ones_like(found))
    return ScoreInfo(score, found), rest


def importance_log_density(
    pair: Pair, values: Array, proposals: Proposals, lent: Array, is_own: Array | bool
) -> tuple[Array, Array]:
    """Log q̂ by importance sampling from own proposals and from the prior.

    Latents from the prior are lent to all pairs.

    Weights are by the mixture of both (the balance heuristic of Veach and Guibas 1995).
    x may be reached from far latents too; where x is folded over itself they are as
    likely as the one that made it.

    Args:
        pair: The density of a pair.
        values: ``(num, *event)``.
        proposals: The pairs' proposals.
        lent: Draws of the prior, shared by all pairs, ``(M, L)``.
        is_own: Where a shared latent is the one that generated x, which given x is not
            a draw of the prior; ``(num, M)``, with equal counts in all rows.

    Returns:
        log q̂(x), ``(num,)``, and ``log_joint`` at the own proposals, ``(num, K)``.
    """
    num, num_own = proposals.log_density.shape
    is_own = jnp.broadcast_to(is_own, (num, len(lent)))
    log_own, log_lent = (
        jnp.log(num_own),
        jnp.log(jnp.sum(~is_own[0], dtype=values.dtype)),
    )
    of_own = jnp.logaddexp(
        log_own + proposals.log_density,
        log_lent + jax.vmap(jax.vmap(pair.log_prior))(proposals.latents),
    )

    of_lent = jnp.logaddexp(
        log_own + proposals.elsewhere, log_lent + jax.vmap(pair.log_prior)(lent)
    )
    own = jax.vmap(jax.vmap(pair.log_joint, (0, None)))(proposals.latents, values)
    others = jax.vmap(lambda value: jax.vmap(lambda z: pair.log_joint(z, value))(lent))(
        values
    )
    others = jnp.where(is_own, -jnp.inf, others - of_lent)

    # Σ w / n with w by the mixture density Σ n_k r_k / n: n cancels.
    return logsumexp(jnp.concatenate([own - of_own, others], axis=1), axis=1), own


def mixture_score(
    pair: Pair, latents: Array, values: Array, proposals: Proposals
) -> tuple[ScoreInfo, Array]:
    """Score, log density and weights where pairs lend each other their latents.

    The others' latents cost no generator evaluation but the one that made their own x.
    Weights are those among the own proposals, ``(num, K)``.
    """
    is_own = jnp.eye(len(latents), dtype=bool)
    info, own = self_normalized(
        lambda x: importance_log_density(pair, x, proposals, latents, is_own), values
    )
    return info, jax.nn.softmax(own - proposals.log_density, axis=1)
