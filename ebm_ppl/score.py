"""Estimators of ``∇ₓ log q(x)`` for q(x) = ∫ q(x | z) p(z) dz, at pairs (z, x) drawn from the generator.

``∇ₓ log q(x) = E[∇ₓ log q(x | z′)]`` over z′ from the posterior of z given x (Grathwohl et al. 2021, section 3); the z
that x was made from is an exact draw of that posterior, and every estimator starts there.  Shapes: latents ``(num,
L)``, values ``(num, *event)``; ``log_joint(z, x)`` is ``log p(z) + log q(x | z)`` of one pair.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random
from jax.nn import logsumexp

LogJoint = Callable[[Array, Array], Array]


class ScoreInfo(NamedTuple):
    """What an estimator says about every pair: score ``(num, *event)`` and log density log q(x) ``(num,)``."""

    score: Array
    log_density: Array


class Score(Protocol):
    """The contract of the estimators here: a state to carry, and one evaluation."""

    def init(self, num_latents: int) -> Any: ...  # noqa: D102

    def evaluate(  # noqa: D102
        self, rng_key: Array, state: Any, log_joint: LogJoint, latents: Array, values: Array
    ) -> tuple[ScoreInfo, Any]: ...


def _weighted_score(
    log_joint: LogJoint, values: Array, proposals: Array, log_proposal: Array
) -> tuple[ScoreInfo, Array]:
    """Score, log density and normalised weights from proposals ``(num, K, L)`` of log density ``(num, K)``."""
    pairs = jax.vmap(jax.vmap(log_joint, (0, None)))

    def log_density(values: Array) -> tuple[Array, Array]:
        log_weight = pairs(proposals, values) - log_proposal
        return logsumexp(log_weight, axis=1) - jnp.log(log_weight.shape[1]), log_weight

    # With the proposals fixed, its gradient is the self-normalised average of ∇ₓ log q(x | z′).
    found, pull, log_weight = jax.vjp(log_density, values, has_aux=True)
    (score,) = pull(jnp.ones_like(found))
    return ScoreInfo(score, found), jax.nn.softmax(log_weight, axis=1)


class ImportanceState(NamedTuple):
    """Running moments that the proposals are fitted to, each ``(L, L)``.

    Attributes:
        covariance: Of z′ around the proposal's centre.
        cross: ``E[(z′ − z) sᵀ]``, s the gradient of ``log_joint`` with respect to z.
        gradient: ``E[s sᵀ]``.
    """

    covariance: Array
    cross: Array
    gradient: Array


@dataclass(frozen=True)
class ImportanceScore:
    """Self-normalised importance sampling; the proposals are fitted to the posteriors as training goes on.

    z′ is proposed from N(z + A s, S) around the z that made x, with s the gradient of ``log_joint`` with respect to z,
    A the regression of posterior draws on s and S their covariance around that: running averages over the
    importance samples themselves, so nothing is tuned.  Where x is linear in z this is the posterior itself, and the
    score is exact.

    Args:
        num_samples: Proposals per pair.
        init_scale: Standard deviation of the first proposals, in the latents' units.
        memory: Of the running averages, in evaluations.

    Source: Grathwohl et al. (2021), section 3.1; the proposals by moments as in Cappé, Douc, Guillin, Marin and Robert
    (2008).
    """

    num_samples: int = 20
    init_scale: float = 0.1
    memory: float = 50.0

    def __post_init__(self) -> None:
        _check_proposals(self.num_samples, self.init_scale)
        if not self.memory >= 1:
            raise ValueError(f"memory = {self.memory}; expected at least 1 evaluation.")

    def init(self, num_latents: int) -> ImportanceState:
        """Proposals of standard deviation ``init_scale`` around z."""
        eye = jnp.eye(num_latents)
        return ImportanceState(self.init_scale**2 * eye, 0.0 * eye, eye)

    def evaluate(
        self, rng_key: Array, state: ImportanceState, log_joint: LogJoint, latents: Array, values: Array
    ) -> tuple[ScoreInfo, ImportanceState]:
        """Score and log density at ``values``, and the state with its averages one step further."""
        num, num_latents = latents.shape
        slope = jax.vmap(jax.grad(log_joint))(latents, values)
        drift = jnp.linalg.solve(_with_ridge(state.gradient, 1e-4), state.cross.T)
        scale = jnp.linalg.cholesky(_with_ridge(state.covariance, 1e-6))
        noise = random.normal(rng_key, (num, self.num_samples, num_latents), latents.dtype)
        steps = noise @ scale.T
        centre = latents + slope @ drift
        log_proposal = -0.5 * jnp.sum(noise**2, axis=-1) - jnp.sum(jnp.log(jnp.diagonal(scale)))
        log_proposal -= 0.5 * num_latents * jnp.log(2.0 * jnp.pi)
        info, weights = _weighted_score(log_joint, values, centre[:, None] + steps, log_proposal)
        shift = centre + jnp.einsum("nk,nkl->nl", weights, steps) - latents
        now = ImportanceState(
            jnp.einsum("nk,nkl,nkm->lm", weights, steps, steps) / num, shift.T @ slope / num, slope.T @ slope / num
        )
        return info, jax.tree.map(lambda old, new: old + (new - old) / self.memory, state, now)


def _with_ridge(matrix: Array, share: float) -> Array:
    """A covariance plus a share of its mean variance, so that it can be inverted."""
    return matrix + share * jnp.mean(jnp.diagonal(matrix)) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def _check_proposals(num_samples: int, init_scale: float) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}; expected at least 1.")
    if not init_scale > 0:
        raise ValueError(f"init_scale = {init_scale}; expected a positive number.")


class VariationalState(NamedTuple):
    """Log η, the proposals' scale per latent, ``(L,)``, and the state of its optimiser."""

    log_scale: Array
    optim_state: Any


@dataclass(frozen=True, eq=False)
class VariationalScore:
    """The paper's self-normalised importance sampling: proposals N(z, diag η²), η learned by its ELBO.

    It is kept for comparison.  The z that made x is a draw of the posterior, not its centre, so the score is biased
    towards that z: with 32 latents its gradient of the entropy is half too large (see docs/design.md).

    Args:
        num_samples: Proposals per pair.
        init_scale: Initial η, in the latents' units.
        optim: An optax transformation for log η.

    Source: Grathwohl et al. (2021), section 3.1 and Algorithm 1.
    """

    num_samples: int = 20
    init_scale: float = 0.1
    optim: optax.GradientTransformation = field(default_factory=lambda: optax.adam(1e-2))

    def __post_init__(self) -> None:
        _check_proposals(self.num_samples, self.init_scale)

    def init(self, num_latents: int) -> VariationalState:
        """η = ``init_scale`` in every direction."""
        log_scale = jnp.full(num_latents, jnp.log(self.init_scale))
        return VariationalState(log_scale, self.optim.init(log_scale))

    def evaluate(
        self, rng_key: Array, state: VariationalState, log_joint: LogJoint, latents: Array, values: Array
    ) -> tuple[ScoreInfo, VariationalState]:
        """Score and log density at ``values``, and the state with η one step further."""
        num, num_latents = latents.shape
        noise = random.normal(rng_key, (num, self.num_samples, num_latents), latents.dtype)
        log_proposal = -0.5 * jnp.sum(noise**2, axis=-1) - jnp.sum(state.log_scale)
        log_proposal -= 0.5 * num_latents * jnp.log(2.0 * jnp.pi)
        proposals = latents[:, None] + jnp.exp(state.log_scale) * noise
        info, _ = _weighted_score(log_joint, values, proposals, log_proposal)

        def negative_elbo(log_scale: Array) -> Array:
            proposals = latents + jnp.exp(log_scale) * noise[:, 0]
            return -jnp.mean(jax.vmap(log_joint)(proposals, values)) - jnp.sum(log_scale)

        gradient = jax.grad(negative_elbo)(state.log_scale)
        update, optim_state = self.optim.update(gradient, state.optim_state, state.log_scale)
        return info, VariationalState(optax.apply_updates(state.log_scale, update), optim_state)


class HMCState(NamedTuple):
    """Log step size of the chains, a scalar, and the state of the log density's estimator."""

    log_step_size: Array
    density: ImportanceState


@dataclass(frozen=True, eq=False)
class HMCScore:
    """Averages over Hamiltonian Monte Carlo chains on z given x: the reference, several times as costly.

    Every chain starts at the z that made x, so it is at equilibrium from the first step; ``num_warmup`` transitions are
    for forgetting it, since the z that made x is not independent of the noise that the score is paired with.  Every
    transition shortens its step by a random factor in [½, 1]: a fixed path length may come round to its start.

    Args:
        num_warmup: Transitions before the first that counts.
        num_samples: Transitions that count.
        num_steps: Leapfrog steps per transition.
        step_size: Initial step, in the latents' units; adapted towards ``target_acceptance``.
        target_acceptance: Acceptance rate to adapt to.
        density: Estimator of the log density, which chains do not give.

    Source: Dieng, Ruiz, Blei and Titsias (2019), the method that Grathwohl et al. (2021) compare with.
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
                raise ValueError(f"{option} = {getattr(self, option)}; expected at least {least}.")
        if not self.step_size > 0:
            raise ValueError(f"step_size = {self.step_size}; expected a positive number.")

    def init(self, num_latents: int) -> HMCState:
        """The initial step size."""
        return HMCState(jnp.log(jnp.asarray(self.step_size, float)), self.density.init(num_latents))

    def evaluate(
        self, rng_key: Array, state: HMCState, log_joint: LogJoint, latents: Array, values: Array
    ) -> tuple[ScoreInfo, HMCState]:
        """Score and log density at ``values``, and the state with the step size adapted."""
        key_chain, key_density = random.split(rng_key)
        step_size = jnp.exp(state.log_step_size)

        def potential(latents: Array) -> Array:
            return -jax.vmap(log_joint)(latents, values)

        def gradient(latents: Array) -> Array:
            return jax.grad(lambda z: jnp.sum(potential(z)))(latents)

        def transition(latents: Array, key: Array) -> tuple[Array, Array]:
            key_momentum, key_step, key_accept = random.split(key, 3)
            start = random.normal(key_momentum, latents.shape, latents.dtype)
            step = step_size * random.uniform(key_step, (len(latents), 1), latents.dtype, 0.5, 1.0)

            def leapfrog(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                position, momentum = carry
                position = position + step * momentum
                return position, momentum - step * gradient(position)

            momentum = start - 0.5 * step * gradient(latents)
            position, momentum = lax.fori_loop(0, self.num_steps, leapfrog, (latents, momentum))
            momentum = momentum + 0.5 * step * gradient(position)
            kinetic = 0.5 * jnp.sum(start**2 - momentum**2, axis=-1)
            log_ratio = potential(latents) - potential(position) + kinetic
            accept = jnp.log1p(-random.uniform(key_accept, log_ratio.shape)) < log_ratio  # False for NaN
            acceptance = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
            return jnp.where(accept[:, None], position, latents), jnp.mean(acceptance)

        def counted(latents: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
            latents, acceptance = transition(latents, key)
            score = jax.grad(lambda x: jnp.sum(jax.vmap(log_joint)(latents, x)))(values)
            return latents, (score, acceptance)

        keys = random.split(key_chain, self.num_warmup + self.num_samples)
        latents_now, _ = lax.scan(transition, latents, keys[: self.num_warmup])
        _, (scores, acceptance) = lax.scan(counted, latents_now, keys[self.num_warmup :])
        found, density = self.density.evaluate(key_density, state.density, log_joint, latents, values)
        log_step_size = state.log_step_size + 0.05 * (jnp.mean(acceptance) - self.target_acceptance)
        return ScoreInfo(jnp.mean(scores, axis=0), found.log_density), HMCState(log_step_size, density)
