"""Log weights: means, effective sample sizes and the jackknife of a log-mean-exp.

Everything stays in log space and is stable in float32.  ``axis`` is the walker axis
throughout.  Every function is jitted, since outside a jitted caller JAX would compile
one program per operation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp

# Roundings by which log weights may differ and be the same.
SAME = 4
# Larger ones of which a tail's shape is fitted; of fewer, the share of all weight from
# which each may stand for many that were not drawn.
MIN_TAIL, MAX_SHARE = 5, 1e-3


@partial(jax.jit, static_argnames="axis")
def log_mean_exp(log_weights: Array, axis: int = -1) -> Array:
    """Return ``log(mean(exp(log_weights)))`` along ``axis``; −inf if no weight > 0."""
    return logsumexp(log_weights, axis=axis) - jnp.log(log_weights.shape[axis])


@partial(jax.jit, static_argnames="axis")
def ess_fraction(log_weights: Array, axis: int = -1) -> Array:
    """Effective sample size over the number of walkers, ``(Σw)² / (n Σw²)``, in (0, 1].

    Kong (1992).  NaN where every weight is zero.
    """
    # Normalised first: the difference of two logsumexps loses digits if log weights are
    # large.
    weights = jax.nn.softmax(log_weights, axis=axis)
    return 1.0 / (log_weights.shape[axis] * jnp.sum(weights**2, axis=axis))


@jax.jit
def pooled_ess_fraction(log_weights: Array) -> Array:
    """ESS fraction of the estimator that averages self-normalised islands equally.

    ``log_weights`` has shape ``(num_chains, num_walkers, ...)``; the estimator's
    weights are ``softmax`` inside an island over the number of islands, so its ESS is
    the harmonic mean of the islands'.
    """
    return 1.0 / jnp.mean(1.0 / ess_fraction(log_weights, axis=1), axis=0)


@jax.jit
def conditional_ess_fraction(log_weights: Array, log_increments: Array) -> Array:
    """Conditional ESS of an increment, ``(Σ w e^Δ)² / Σ w e^{2Δ}``, in (0, 1].

    Here ``Σ w = 1`` (Zhou, Johansen and Aston 2016, eq. 3.16).  Both arguments have
    shape ``(num_chains, num_walkers, ...)``; islands count equally, whatever their
    normaliser.
    """
    weights = jax.nn.softmax(log_weights, axis=1) / log_weights.shape[0]
    log_increments = jnp.where(weights > 0, log_increments, -jnp.inf)
    ratios = jnp.exp(log_increments - jnp.max(log_increments, axis=(0, 1)))
    return jnp.sum(weights * ratios, axis=(0, 1)) ** 2 / jnp.sum(
        weights * ratios**2, axis=(0, 1)
    )


@jax.jit
def jackknife_log_mean_exp(
    log_values: Array, log_weights: Array | None = None
) -> tuple[Array, Array]:
    """Bias-corrected log of the mean of ``exp(log_values)``, and its standard error.

    The mean is over axis 0, weighted if ``log_weights`` is given.  Each
    ``exp(log_values[c])`` is an independent unbiased estimate of Z; the log of their
    mean is biased by ``−½ Var``, which the jackknife (Quenouille 1956, Tukey 1958)
    removes to first order.  The average of ``log_values`` itself would keep a bias of
    ``−½ Var`` of a *single* island, however many islands there are.

    Args:
        log_values: Shape ``(num_islands, ...)``, at least two islands.
        log_weights: Log weights of the islands, of the same shape; None weighs them
            equally.

    Returns:
        ``(estimate, stderr)``, each of shape ``(...)``.
    """
    num = log_values.shape[0]

    # The jackknife subtracts numbers close to each other: subtracting their maximum
    # first keeps float32 precise.
    size = jnp.max(log_values, axis=0)
    size = jnp.where(jnp.isfinite(size), size, 0.0)
    log_values = log_values - size
    left_out = jnp.eye(num, dtype=bool)[(...,) + (None,) * (log_values.ndim - 1)]

    def log_mean(excluded: Array) -> Array:
        weights = jnp.zeros_like(log_values) if log_weights is None else log_weights
        weights = jnp.where(excluded, -jnp.inf, weights)
        return logsumexp(weights + log_values, axis=-log_values.ndim) - logsumexp(
            weights, axis=-log_values.ndim
        )

    # Jackknife
    leave_one_out = log_mean(left_out)
    centre = leave_one_out.mean(axis=0)
    estimate = size + num * log_mean(jnp.zeros((), bool)) - (num - 1) * centre
    stderr = jnp.sqrt((num - 1) / num * jnp.sum((leave_one_out - centre) ** 2, axis=0))
    return estimate, stderr


@jax.jit
def pareto_khat(log_weights: Array) -> Array:
    """Shape k̂ of a generalised Pareto distribution fitted to the largest weights.

    Weights lie along axis 0.  The tail holds ``3√n`` weights (a fifth of n for n under
    226); the fit is that of Zhang and Stephens (2009) with the prior of Vehtari,
    Simpson, Gelman, Yao and Gabry (2024), who show that above 0.7 an average of these
    weights cannot be trusted.  Weights that equal the smallest of the tail, as energies
    that count make many, are left out of it; of fewer than five others only their share
    can be judged.

    Args:
        log_weights: Shape ``(n, ...)``.

    Returns:
        Shape ``(...)``; −inf where the tail's weights are equal to 1 part in 10⁴, +inf
        where fewer than five are larger than all others and matter, NaN with fewer
        than 25 weights.
    """
    num = log_weights.shape[0]
    if num < 25:
        return jnp.full(log_weights.shape[1:], jnp.nan)

    # Tail
    num_tail = math.ceil(3 * math.sqrt(num)) if num > 225 else num // 5
    largest = jnp.sort(log_weights, axis=0)[-num_tail - 1 :]
    # In units of the largest weight, so that no exponential overflows.
    weights = jnp.exp(largest - largest[-1])
    rounding = SAME * jnp.finfo(log_weights.dtype).eps
    is_above = largest[1:] - largest[0] > rounding * jnp.maximum(1, abs(largest[0]))
    exceedances = jnp.where(is_above, weights[1:] - weights[0], 0.0)

    flat = exceedances.reshape(num_tail, -1)
    khat = jax.vmap(_generalized_pareto_shape, in_axes=1)(flat)
    khat = khat.reshape(log_weights.shape[1:])

    # A handful above ties: no shape can be fitted, so that each may stand for many
    is_handful = jnp.sum(exceedances > 0, axis=0) < MIN_TAIL
    largest_share = 1.0 / jnp.sum(jnp.exp(log_weights - largest[-1]), axis=0)
    is_told = is_handful & (khat > -jnp.inf) & (largest_share > MAX_SHARE)
    return jnp.where(is_told, jnp.inf, khat)


def _generalized_pareto_shape(sorted_values: Array) -> Array:
    """Of the positive ones among ascending exceedances."""
    size = sorted_values.shape[0]
    num_grid = 30 + math.isqrt(size)
    num = jnp.sum(sorted_values > 0)
    place = size - num + jnp.maximum((num + 2) // 4, 1) - 1
    largest = sorted_values[-1]
    quartile = sorted_values[jnp.minimum(place, size - 1)]

    # The grid is b = 1/largest − c/(3 quartile); 1 − b x is computed without
    # subtracting nearly equal numbers.
    offsets = (jnp.sqrt(num_grid / (jnp.arange(1, num_grid + 1) - 0.5)) - 1.0) / (
        3.0 * quartile
    )

    def mean_log(offset: Array) -> Array:
        logs = jnp.log((1.0 - sorted_values / largest) + sorted_values * offset)
        return jnp.sum(logs) / num

    # Posterior mean over the grid
    shapes = jax.vmap(mean_log)(offsets)
    profile = num * (jnp.log((offsets - 1.0 / largest) / shapes) - shapes - 1.0)
    shape = mean_log(jnp.sum(jax.nn.softmax(profile) * offsets))

    return jnp.where(largest > 1e-4, (num * shape + 10 * 0.5) / (num + 10), -jnp.inf)
