"""Log weights: means, effective sample sizes and the jackknife of a log-mean-exp.

Everything stays in log space and holds in float32.  ``axis`` is the walker axis throughout.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp


def log_mean_exp(log_weights: Array, axis: int = -1) -> Array:
    """Return ``log(mean(exp(log_weights)))`` along ``axis``; −inf where every weight is zero."""
    return logsumexp(log_weights, axis=axis) - jnp.log(log_weights.shape[axis])


def ess_fraction(log_weights: Array, axis: int = -1) -> Array:
    """Effective sample size over the number of walkers, ``(Σw)² / (n Σw²)``, in (0, 1].

    Kong (1992).  NaN where every weight is zero.
    """
    # Normalised first: the difference of two logsumexps loses digits where log weights are large.
    weights = jax.nn.softmax(log_weights, axis=axis)
    return 1.0 / (log_weights.shape[axis] * jnp.sum(weights**2, axis=axis))


def pooled_ess_fraction(log_weights: Array) -> Array:
    """ESS fraction of the estimator that averages self-normalised islands equally.

    ``log_weights`` has shape ``(num_chains, num_walkers, ...)``; the estimator's weights are
    ``softmax`` inside an island over the number of islands, so its ESS is the harmonic mean of the islands'.
    """
    return 1.0 / jnp.mean(1.0 / ess_fraction(log_weights, axis=1), axis=0)


def conditional_ess_fraction(log_weights: Array, log_increments: Array) -> Array:
    """Conditional ESS of an increment, ``(Σ w e^Δ)² / Σ w e^{2Δ}`` with ``Σ w = 1``, in (0, 1].

    Zhou, Johansen and Aston (2016), eq. 3.16.  Both arguments have shape
    ``(num_chains, num_walkers, ...)``; islands count equally, whatever their normaliser.
    """
    weights = jax.nn.softmax(log_weights, axis=1) / log_weights.shape[0]
    log_increments = jnp.where(weights > 0, log_increments, -jnp.inf)
    ratios = jnp.exp(log_increments - jnp.max(log_increments, axis=(0, 1)))
    return jnp.sum(weights * ratios, axis=(0, 1)) ** 2 / jnp.sum(weights * ratios**2, axis=(0, 1))


def jackknife_log_mean_exp(log_values: Array) -> tuple[Array, Array]:
    """Bias-corrected ``log(mean(exp(log_values)))`` over axis 0 and its standard error.

    Each ``exp(log_values[c])`` is an independent unbiased estimate of Z; the log of their mean is biased by
    ``−½ Var``, which the jackknife (Quenouille 1956, Tukey 1958) removes to first order.  The average of
    ``log_values`` itself would keep a bias of ``−½ Var`` of a *single* island however many there are.

    Args:
        log_values: Shape ``(num_islands, ...)``, at least two islands.

    Returns:
        ``(estimate, stderr)``, each of shape ``(...)``.
    """
    num = log_values.shape[0]
    left_out = jnp.where(jnp.eye(num, dtype=bool)[(...,) + (None,) * (log_values.ndim - 1)], -jnp.inf, log_values[None])
    leave_one_out = logsumexp(left_out, axis=1) - jnp.log(num - 1)
    centre = leave_one_out.mean(axis=0)
    estimate = num * log_mean_exp(log_values, axis=0) - (num - 1) * centre
    stderr = jnp.sqrt((num - 1) / num * jnp.sum((leave_one_out - centre) ** 2, axis=0))
    return estimate, stderr
