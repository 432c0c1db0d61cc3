"""Mixtures of normals as bases, from scikit-learn's estimators."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.nn import logsumexp
from numpyro.distributions import constraints
from scipy.linalg import solve_triangular

from ebm_ppl.errors import level_of_caller
from ebm_ppl.programs.products import einsum, matmul

# Draws at which single precision is held against double, and nats that it may be off.
NUM_POINTS = 64
MAX_ERROR = 0.05
# Components whose densities are found at once: a kernel density has one per row.
BLOCK = 64


class NormalMixture(dist.Distribution):
    """A mixture of normals: draws cost what one component's do, densities all of them.

    NumPyro's ``MixtureSameFamily`` draws from every component and keeps one.

    Args:
        log_weights: ``(num_components,)``.
        means: ``(num_components, d)``.
        factors: F for which ``(x − mean) F`` is standard: matrices ``(num_components, d,
            d)``, one matrix ``(1, d, d)``, or scales ``(num_components, d or 1)``.
        inverses: Their inverses, of the same shape.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    pytree_data_fields = ("log_weights", "means", "factors", "inverses")

    def __init__(
        self, log_weights: Array, means: Array, factors: Array, inverses: Array
    ) -> None:
        self.log_weights = log_weights
        self.means = means
        self.factors = factors
        self.inverses = inverses
        super().__init__((), means.shape[-1:], validate_args=False)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws, ``(*sample_shape, d)``."""
        key_which, key_noise = random.split(key)
        which = random.categorical(key_which, self.log_weights, shape=sample_shape)
        noise = random.normal(key_noise, (*sample_shape, *self.event_shape))

        if self.inverses.ndim == 2:
            return self.means[which] + noise * self.inverses[which]
        if len(self.inverses) == 1:
            moved = matmul(noise, self.inverses[0])
        else:
            moved = einsum("...d,...de->...e", noise, self.inverses[which])
        return self.means[which] + moved

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log density, of shape ``value.shape[:-1]``."""
        flat = jnp.reshape(value, (-1, *self.event_shape))
        num = len(self.means)
        if num <= BLOCK:
            found = self._log_terms(flat, self.log_weights, self.means, self.factors)
            return logsumexp(found, axis=1).reshape(jnp.shape(value)[:-1])

        # Block by block, filled up with components of weight 0.
        def blocks(leaf: Array, fill: float) -> Array:
            extra = [(0, -num % BLOCK)] + [(0, 0)] * (leaf.ndim - 1)
            padded = jnp.pad(leaf, extra, constant_values=fill)
            return padded.reshape(-1, BLOCK, *leaf.shape[1:])

        shared = self.factors if len(self.factors) == 1 else None
        parts = (
            blocks(self.log_weights, -jnp.inf),
            blocks(self.means, 0.0),
            None if shared is not None else blocks(self.factors, 1.0),
        )

        def of_block(part: tuple[Array, Array, Array | None]) -> Array:
            log_weights, means, factors = part
            factors = shared if factors is None else factors
            return logsumexp(self._log_terms(flat, log_weights, means, factors), axis=1)

        found = logsumexp(lax.map(of_block, parts), axis=0)
        return found.reshape(jnp.shape(value)[:-1])

    def _log_terms(
        self, flat: Array, log_weights: Array, means: Array, factors: Any
    ) -> Array:
        """Log weighted densities, ``(num_points, num_components)``."""
        offsets = flat[:, None] - means
        size = flat.shape[-1]
        if factors.ndim == 2:
            standard = offsets * factors
            log_det = jnp.sum(jnp.log(jnp.broadcast_to(factors, means.shape)), axis=-1)
        else:
            standard = einsum(
                "nkd,kde->nke",
                offsets,
                jnp.broadcast_to(factors, (len(means), size, size)),
            )
            log_det = jnp.linalg.slogdet(factors)[1]

        squares = jnp.sum(standard**2, axis=-1)
        constant = log_det - 0.5 * size * np.log(2 * np.pi)
        return log_weights + constant - 0.5 * squares

    @property
    def mean(self) -> Array:
        """Mean, ``(d,)``."""
        return matmul(jnp.exp(self.log_weights), self.means)

    @property
    def covariance_matrix(self) -> Array:
        """Covariance, ``(d, d)``."""
        weights = jnp.exp(self.log_weights)
        offsets = self.means - self.mean
        between = einsum("k,kd,ke->de", weights, offsets, offsets)
        if self.inverses.ndim == 2:
            variances = jnp.broadcast_to(self.inverses**2, self.means.shape)
            return between + jnp.diag(matmul(weights, variances))
        within = einsum("kde,kdf->kef", self.inverses, self.inverses)
        return between + (
            within[0] if len(within) == 1 else einsum("k,kef->ef", weights, within)
        )


def from_sklearn(estimator: Any) -> NormalMixture:
    """A fitted scikit-learn density as a base.

    Args:
        estimator: A fitted ``GaussianMixture`` or ``BayesianGaussianMixture`` of any
            ``covariance_type``, or a ``KernelDensity`` with a Gaussian kernel.  Of the
            Bayesian one the mixture at its estimates is taken, which its ``sample``
            draws from; its ``score_samples`` are means of logs, and no density's.

    Returns:
        A NumPyro distribution over vectors of the estimator's features.

    Raises:
        TypeError: It is another estimator, or not fitted.
        ValueError: A kernel that is not Gaussian, or a metric that is not Euclidean.
    """
    if hasattr(estimator, "precisions_cholesky_"):
        factors = np.asarray(estimator.precisions_cholesky_, float)
        means = np.asarray(estimator.means_, float)
        log_weights = np.log(np.maximum(estimator.weights_, 1e-300))
        kind = estimator.covariance_type
        factors = {"tied": factors[None], "spherical": factors[..., None]}.get(
            kind, factors
        )
        return _mixture(log_weights, means, factors)

    if hasattr(estimator, "tree_") and hasattr(estimator, "bandwidth_"):
        if estimator.kernel != "gaussian" or estimator.metric not in (
            "euclidean",
            "l2",
        ):
            raise ValueError(
                f"The kernel density has kernel '{estimator.kernel}' and metric "
                f"'{estimator.metric}'; expected 'gaussian' and 'euclidean'."
            )
        means = np.asarray(estimator.tree_.data, float)
        weights = estimator.tree_.sample_weight
        weights = np.ones(len(means)) if weights is None else np.asarray(weights, float)
        factors = np.full((len(means), 1), 1.0 / estimator.bandwidth_)
        return _mixture(np.log(np.maximum(weights, 1e-300)), means, factors)

    raise TypeError(
        f"estimator is a {type(estimator).__name__}; expected a fitted GaussianMixture, "
        "BayesianGaussianMixture or KernelDensity of scikit-learn. Other densities are "
        "bases as NumPyro distributions."
    )


def _mixture(
    log_weights: np.ndarray, means: np.ndarray, factors: np.ndarray
) -> NormalMixture:
    """In the present precision, from numbers in double precision."""
    if factors.ndim == 3:
        unit = np.eye(factors.shape[-1])
        inverses = np.stack([solve_triangular(f, unit) for f in factors])
    else:
        inverses = 1.0 / factors
    log_weights = log_weights - np.logaddexp.reduce(log_weights)
    made = NormalMixture(
        *(jnp.asarray(leaf, float) for leaf in (log_weights, means, factors, inverses))
    )
    _warn_of_rounding(made, log_weights, means, factors, inverses)
    return made


def _warn_of_rounding(made: NormalMixture, *exact: np.ndarray) -> None:
    """Warn where the present precision cannot tell the mixture's points apart."""
    if made.means.dtype == jnp.float64:
        return
    with jax.enable_x64(True):
        double = NormalMixture(*map(jnp.asarray, exact))
        points = double.sample(random.key(0), (NUM_POINTS,))
        right = np.asarray(double.log_prob(points))
    found = np.asarray(made.log_prob(jnp.asarray(np.asarray(points), jnp.float32)))
    error = float(np.max(np.abs(found - right)))

    if not error <= MAX_ERROR:
        warnings.warn(
            f"In float32 the mixture's log density is off by up to {error:.2g} nats at "
            "its own draws: columns are far from 0 beside their spread, or nearly "
            "collinear. Standardise or whiten them first, or run in double precision "
            "(jax.config.update('jax_enable_x64', True)).",
            stacklevel=level_of_caller(),
        )
