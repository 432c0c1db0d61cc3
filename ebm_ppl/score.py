"""Estimators of ``∇ₓ log q(x)`` for q(x) = ∫ q(x | z) p(z) dz, at pairs (z, x) drawn
from the generator.

``∇ₓ log q(x) = E[∇ₓ log q(x | z′)]`` over z′ from the posterior of z given x (Grathwohl
et al. 2021, section 3); the z that x was made from is an exact draw of that posterior,
and every estimator starts there.  Shapes: latents ``(num, L)``, values ``(num,
*event)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random
from jax.nn import logsumexp
from jax.scipy.linalg import solve_triangular

# Pairs that lend each other their latents; several blocks have at least MIN_BLOCK each.
MAX_BLOCK, MIN_BLOCK = 256, 64


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
    """What an estimator says about every pair: score ``(num, *event)`` and log density log q(x) ``(num,)``."""

    score: Array
    log_density: Array


class Score(Protocol):
    """The contract of the estimators here: a state to carry, and one evaluation."""

    def init(self, num_latents: int) -> Any: ...  # noqa: D102

    def evaluate(  # noqa: D102
        self, rng_key: Array, state: Any, pair: Pair, latents: Array, values: Array
    ) -> tuple[ScoreInfo, Any]: ...


class Proposals(NamedTuple):
    """Draws of every pair's own proposal, and its log density at them and at all pairs'
    latents.

    Attributes:
        latents: ``(num, K, L)``.
        log_density: At these, ``(num, K)``.
        elsewhere: At the latents lent to all pairs, ``(num, M)``.
    """

    latents: Array
    log_density: Array
    elsewhere: Array


def _self_normalized(
    log_mean_weight: Callable[[Array], tuple[Array, Any]], values: Array
) -> tuple[ScoreInfo, Any]:
    """Score and log density from ``log_mean_weight``: values to log q̂ of every pair, and anything else."""
    # With the proposals fixed, its gradient is the self-normalised average of ∇ₓ log
    # q(x | z′).
    found, pull, rest = jax.vjp(log_mean_weight, values, has_aux=True)
    (score,) = pull(jnp.ones_like(found))
    return ScoreInfo(score, found), rest


def _log_mean_weight(
    pair: Pair, values: Array, proposals: Proposals, lent: Array, is_own: Array | bool
) -> tuple[Array, Array]:
    """Log q̂ by importance sampling from every pair's own proposal and, by latents lent
    to all, from the prior.

    Weights are by the mixture of both (the balance heuristic of Veach and Guibas 1995).
    x may be reached from far latents too; where x is folded over itself they are as
    likely as the one that made it.

    Args:
        pair: The density of a pair.
        values: ``(num, *event)``.
        proposals: Of these pairs.
        lent: Draws of the prior, ``(M, L)``.
        is_own: Where a lent latent is the one that made x, which is no draw of the
            prior given x; ``(num, M)``, with as many in every row.

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


def _mixture_score(
    pair: Pair, latents: Array, values: Array, proposals: Proposals
) -> tuple[ScoreInfo, Array]:
    """Score and log density where pairs lend each other their latents, and the weights
    of the own proposals.

    The others' latents cost no generator evaluation but the one that made their own x.
    Weights are those among the own proposals, ``(num, K)``.
    """
    is_own = jnp.eye(len(latents), dtype=bool)
    info, own = _self_normalized(
        lambda x: _log_mean_weight(pair, x, proposals, latents, is_own), values
    )
    return info, jax.nn.softmax(own - proposals.log_density, axis=1)


@dataclass(frozen=True)
class ExactScore:
    """The score of a generator without latents, such as a flow: q(x | z) is q(x)."""

    def init(self, num_latents: int) -> tuple[()]:
        """Nothing to learn."""
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
        return _self_normalized(
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
    ) -> Array:
        """Log q(x), a scalar."""
        return pair.log_joint(latents, value)


class ImportanceState(NamedTuple):
    """Running averages that the proposals are fitted to.

    Attributes:
        covariance: Of z′ around the proposal's centre, ``(L, L)``.
        cross: ``E[(z′ − z) sᵀ]``, s the gradient of ``log_joint`` with respect to z,
            ``(L, L)``.
        gradient: ``E[s sᵀ]``, ``(L, L)``.
        inflation: Of local proposals, a scalar: the mean of ``(z′ − centre)ᵀ Λ (z′ −
            centre) / L``.
    """

    covariance: Array
    cross: Array
    gradient: Array
    inflation: Array


@dataclass(frozen=True)
class ImportanceScore:
    """Self-normalised importance sampling from proposals that approximate the posterior
    of z given x.

    *Local* proposals, for generators that are normal given z (``standardized_normal``
    is): one Gauss–Newton step from the z that made x, ``N(z − Λ⁻¹ Rᵀ r, κ Λ⁻¹)`` with r
    the standardised residuals of z and x, R their Jacobian and Λ = RᵀR.  κ is a running
    average.  R costs as much as min(L, d) proposals.

    *Global* ones, for all others: ``N(z + A s, S)`` with s the gradient of
    ``log_joint`` with respect to z, A the regression of posterior draws on s and S
    their covariance around that, running averages over the importance samples
    themselves.

    Either is the posterior itself where x is linear in z.  The other pairs' latents are
    proposals from the prior, for posteriors of several modes, at no generator
    evaluation; pairs are dealt into equal blocks of 64 to 256 for that.

    Args:
        num_samples: Proposals per pair.
        local: False takes global proposals for every generator.
        init_scale: Standard deviation of the first global proposals, in the latents'
            units.
        memory: Of the running averages, in evaluations.

    Source: Grathwohl et al. (2021), section 3.1, with other proposals (see
    docs/design.md); moments as in Cappé, Douc, Guillin, Marin and Robert (2008).
    """

    num_samples: int = 20
    local: bool = True
    init_scale: float = 0.1
    memory: float = 50.0

    def __post_init__(self) -> None:
        _check_proposals(self.num_samples, self.init_scale)
        if not self.memory >= 1:
            raise ValueError(f"memory = {self.memory}; expected at least 1 evaluation.")

    def init(self, num_latents: int) -> ImportanceState:
        """Global proposals of standard deviation ``init_scale`` around z; local ones without inflation."""
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
        """Score and log density at ``values``, and the state with its averages one step further."""
        num, num_latents = latents.shape
        noise = random.normal(
            rng_key, (num, self.num_samples, num_latents), latents.dtype
        )
        evaluate = (
            self._local if self.local and pair.residuals is not None else self._global
        )
        # Pairs lend each other their latents in blocks, or the work would grow with the
        # square of their number.
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
    ) -> Array:
        """Log q(x) alone; while the key stays, a function of ``latents`` and ``value``
        as smooth as their Jacobian.

        Args:
            rng_key: A JAX PRNG key.
            state: Fitted to this generator.
            pair: The density of a pair.
            latents: The z that made x, ``(L,)``.
            value: x, of the event shape.
            lent: Draws of the prior, ``(M, L)``.

        Returns:
            A scalar.
        """
        noise = random.normal(
            rng_key, (1, self.num_samples, len(latents)), latents.dtype
        )
        # With the z that made x among the samples, p(z) q(x | z) / q̂ ≤ K r(z) + (M +
        # 1) p(z) where all others miss.
        lent = jnp.concatenate([lent, latents[None]])
        latents, values = latents[None], value[None]
        if self.local and pair.residuals is not None:
            proposals = _local_proposals(noise, state, pair, latents, values, lent)
        else:
            proposals = _global_proposals(
                noise, state, pair, latents, values, lent
            ).proposals
        return _log_mean_weight(pair, values, proposals, lent, False)[0][0]

    def _local(
        self,
        noise: Array,
        state: ImportanceState,
        pair: Pair,
        latents: Array,
        values: Array,
    ) -> tuple[ScoreInfo, ImportanceState]:
        proposals = _local_proposals(noise, state, pair, latents, values, latents)
        info, weights = _mixture_score(pair, latents, values, proposals)
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
        proposals, slope, steps = _global_proposals(
            noise, state, pair, latents, values, latents
        )
        info, weights = _mixture_score(pair, latents, values, proposals)
        shift, num = (
            jnp.einsum("nk,nkl->nl", weights, proposals.latents) - latents,
            len(latents),
        )
        now = state._replace(
            covariance=jnp.einsum("nk,nkl,nkm->lm", weights, steps, steps) / num,
            cross=shift.T @ slope / num,
            gradient=slope.T @ slope / num,
        )
        return info, now


def _local_proposals(
    noise: Array,
    state: ImportanceState,
    pair: Pair,
    latents: Array,
    values: Array,
    lent: Array,
) -> Proposals:
    assert pair.residuals is not None
    residual, jacobian = jax.vmap(partial(_linearized, pair.residuals))(latents, values)
    # R = Q root and Λ = rootᵀ root: no squared condition number.
    orthogonal, root = jnp.linalg.qr(jacobian)
    step = jax.vmap(solve_triangular)(
        root, jnp.einsum("nij,ni->nj", orthogonal, residual)
    )
    spread = jax.vmap(lambda root, white: solve_triangular(root, white.T).T)(
        root, noise
    )
    scale = jnp.sqrt(state.inflation)
    log_det = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root, axis1=1, axis2=2))), axis=1)
    log_det = (log_det - noise.shape[-1] * jnp.log(scale))[:, None]
    centre = (latents - step)[:, None]
    white = jnp.einsum("nkl,nml->nmk", root, lent - centre) / scale
    return Proposals(
        centre + scale * spread,
        _log_standard_normal(noise) + log_det,
        _log_standard_normal(white) + log_det,
    )


class _Global(NamedTuple):
    """Proposals, the gradients that centre them, ``(num, L)``, and their distances from there, ``(num, K, L)``."""

    proposals: Proposals
    slope: Array
    steps: Array


def _global_proposals(
    noise: Array,
    state: ImportanceState,
    pair: Pair,
    latents: Array,
    values: Array,
    lent: Array,
) -> _Global:
    slope = jax.vmap(jax.grad(pair.log_joint))(latents, values)
    drift = jnp.linalg.solve(_with_ridge(state.gradient, 1e-4), state.cross.T)
    root = jnp.linalg.cholesky(_with_ridge(state.covariance, 1e-6))
    steps = noise @ root.T
    centre = (latents + slope @ drift)[:, None]
    log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
    away = lent - centre
    white = solve_triangular(
        root, away.reshape(-1, lent.shape[1]).T, lower=True
    ).T.reshape(away.shape)
    proposals = Proposals(
        centre + steps,
        _log_standard_normal(noise) - log_det,
        _log_standard_normal(white) - log_det,
    )
    return _Global(proposals, slope, steps)


def _block_size(num: int) -> int:
    """The largest equal blocks that so many pairs can be dealt into."""
    size = max(divisor for divisor in range(1, MAX_BLOCK + 1) if num % divisor == 0)
    if size < min(num, MIN_BLOCK):
        raise ValueError(
            f"{num} draws of the generator cannot be dealt into equal blocks of "
            f"{MIN_BLOCK} to {MAX_BLOCK}, inside "
            "which they lend each other their latents. Take another num_particles, "
            f"such as {128 * round(num / 128)}."
        )
    return size


def _linearized(
    residuals: Callable[[Array, Array], tuple[Array, Array]],
    latents: Array,
    value: Array,
) -> tuple[Array, Array]:
    """Residuals of z and x of one pair, ``(L + d,)``, and their Jacobian with respect to z."""
    of_latents, of_value = residuals(latents, value)
    # One pass per element of the smaller side.
    derivative = jax.jacrev if len(of_value) < len(latents) else jax.jacfwd
    jacobian_of_latents = jax.jacfwd(lambda z: residuals(z, value)[0])(latents)
    jacobian_of_value = derivative(lambda z: residuals(z, value)[1])(latents)
    return jnp.concatenate([of_latents, of_value]), jnp.concatenate(
        [jacobian_of_latents, jacobian_of_value]
    )


def _log_standard_normal(noise: Array) -> Array:
    return -0.5 * jnp.sum(noise**2, axis=-1) - 0.5 * noise.shape[-1] * jnp.log(
        2.0 * jnp.pi
    )


def _with_ridge(matrix: Array, share: float) -> Array:
    """A covariance plus a share of its mean variance, so that it can be inverted."""
    return matrix + share * jnp.mean(jnp.diagonal(matrix)) * jnp.eye(
        matrix.shape[0], dtype=matrix.dtype
    )


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
    """The paper's self-normalised importance sampling: proposals N(z, diag η²), η
    learned by its ELBO.

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
        _check_proposals(self.num_samples, self.init_scale)

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
        """Score and log density at ``values``, and the state with η one step further."""
        num, num_latents = latents.shape
        noise = random.normal(
            rng_key, (num, self.num_samples, num_latents), latents.dtype
        )
        log_proposal = _log_standard_normal(noise) - jnp.sum(state.log_scale)
        proposals = latents[:, None] + jnp.exp(state.log_scale) * noise

        def log_mean_weight(values: Array) -> tuple[Array, Array]:
            log_weight = (
                jax.vmap(jax.vmap(pair.log_joint, (0, None)))(proposals, values)
                - log_proposal
            )
            return logsumexp(log_weight, axis=1) - jnp.log(self.num_samples), log_weight

        info, _ = _self_normalized(log_mean_weight, values)

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


class HMCState(NamedTuple):
    """Log step size of the chains, a scalar, and the state of the log density's estimator."""

    log_step_size: Array
    density: ImportanceState


@dataclass(frozen=True, eq=False)
class HMCScore:
    """Averages over Hamiltonian Monte Carlo chains on z given x: the reference, several
    times as costly.

    Every chain starts at the z that made x, so it is at equilibrium from the first
    step; ``num_warmup`` transitions are for forgetting it, since the z that made x is
    not independent of the noise that the score is paired with.  Every transition
    shortens its step by a random factor in [½, 1]: a fixed path length may come round
    to its start.

    Args:
        num_warmup: Transitions before the first that counts.
        num_samples: Transitions that count.
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
        """Score and log density at ``values``, and the state with the step size adapted."""
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
