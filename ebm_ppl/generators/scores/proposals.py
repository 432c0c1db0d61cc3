"""Proposals for the latents of a pair."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular

from ebm_ppl.generators.scores.base import Pair, Proposals
from ebm_ppl.generators.scores.orthogonal import orthonormalized
from ebm_ppl.programs.products import einsum, matmul


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


def local_proposals(
    noise: Array,
    state: ImportanceState,
    pair: Pair,
    latents: Array,
    values: Array,
    lent: Array,
) -> Proposals:
    """Proposals at the posterior of z in the generator that is linear around z."""
    assert pair.residuals is not None
    residual, jacobian = jax.vmap(partial(linearized, pair.residuals))(latents, values)

    # A QR decomposition, R = Q root and Λ = rootᵀ root, avoids forming RᵀR, which
    # squares the condition number.
    found = orthonormalized(jacobian)
    step = einsum(
        "nlk,nk->nl", found.inverse, einsum("nij,ni->nj", found.columns, residual)
    )
    spread = einsum("nlk,nmk->nml", found.inverse, noise)
    scale = jnp.sqrt(state.inflation)
    log_det = jnp.sum(jnp.log(jnp.diagonal(found.root, axis1=1, axis2=2)), axis=1)
    log_det = (log_det - noise.shape[-1] * jnp.log(scale))[:, None]
    centre = (latents - step)[:, None]
    white = einsum("nkl,nml->nmk", found.root, lent - centre) / scale

    return Proposals(
        centre + scale * spread,
        log_standard_normal(noise) + log_det,
        log_standard_normal(white) + log_det,
    )


class _Global(NamedTuple):
    """Proposals, the gradients that centre them, and their distances from there.

    Gradients ``(num, L)``, distances ``(num, K, L)``.
    """

    proposals: Proposals
    slope: Array
    steps: Array


def global_proposals(
    noise: Array,
    state: ImportanceState,
    pair: Pair,
    latents: Array,
    values: Array,
    lent: Array,
) -> _Global:
    """Proposals of one covariance for all pairs, learned on the way."""
    slope = jax.vmap(jax.grad(pair.log_joint))(latents, values)
    drift = jnp.linalg.solve(_with_ridge(state.gradient, 1e-4), state.cross.T)
    root = jnp.linalg.cholesky(_with_ridge(state.covariance, 1e-6))
    steps = matmul(noise, root.T)
    centre = (latents + matmul(slope, drift))[:, None]
    log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
    away = lent - centre

    white = solve_triangular(
        root, away.reshape(-1, lent.shape[1]).T, lower=True
    ).T.reshape(away.shape)
    proposals = Proposals(
        centre + steps,
        log_standard_normal(noise) - log_det,
        log_standard_normal(white) - log_det,
    )
    return _Global(proposals, slope, steps)


def linearized(
    residuals: Callable[[Array, Array], tuple[Array, Array]],
    latents: Array,
    value: Array,
) -> tuple[Array, Array]:
    """Residuals of one pair, ``(L + d,)``, and their Jacobian with respect to z."""
    of_latents, of_value = residuals(latents, value)
    # Forward or reverse mode, whichever needs fewer passes.
    derivative = jax.jacrev if len(of_value) < len(latents) else jax.jacfwd
    jacobian_of_latents = jax.jacfwd(lambda z: residuals(z, value)[0])(latents)
    jacobian_of_value = derivative(lambda z: residuals(z, value)[1])(latents)
    return jnp.concatenate([of_latents, of_value]), jnp.concatenate(
        [jacobian_of_latents, jacobian_of_value]
    )


def log_standard_normal(noise: Array) -> Array:
    """Log density of standard normal noise, over its last axis."""
    return -0.5 * jnp.sum(noise**2, axis=-1) - 0.5 * noise.shape[-1] * jnp.log(
        2.0 * jnp.pi
    )


def _with_ridge(matrix: Array, share: float) -> Array:
    """``matrix`` plus ``share`` of its mean variance on the diagonal, to invert it."""
    return matrix + share * jnp.mean(jnp.diagonal(matrix)) * jnp.eye(
        matrix.shape[0], dtype=matrix.dtype
    )


def check_proposals(num_samples: int, init_scale: float) -> None:
    """Refuse numbers and scales of proposals that cannot work."""
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}; expected at least 1.")
    if not init_scale > 0:
        raise ValueError(f"init_scale = {init_scale}; expected a positive number.")
