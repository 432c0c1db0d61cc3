"""scikit-learn's densities as bases, against scikit-learn."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from sklearn.linear_model import LinearRegression
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import KernelDensity

import ebm_ppl as ebm
from ebm_ppl.energy.coordinates import standardizing_transform

RNG = np.random.default_rng(0)
# Two skewed heaps of different shape, off centre.
ROWS = np.concatenate(
    [
        RNG.gamma(2.0, 1.0, size=(150, 3)) @ RNG.normal(size=(3, 3)) + 20.0,
        RNG.normal(size=(250, 3)) * [0.1, 1.0, 3.0],
    ]
)
KINDS = ("full", "tied", "diag", "spherical")


def estimators():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            k: GaussianMixture(3, covariance_type=k, random_state=0) for k in KINDS
        }
        found["bayesian"] = BayesianGaussianMixture(n_components=4, random_state=0)
        found["kernels"] = KernelDensity(bandwidth=0.4)
        found["one"] = GaussianMixture(1)
        found["many"] = GaussianMixture(100, covariance_type="full", random_state=0)
        return {name: estimator.fit(ROWS) for name, estimator in found.items()}


ESTIMATORS = estimators()


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]


def score(estimator, x):
    """Log density; of the Bayesian estimator at its estimates."""
    if isinstance(estimator, BayesianGaussianMixture):
        plain = GaussianMixture(covariance_type=estimator.covariance_type)
        for name in ("weights_", "means_", "covariances_", "precisions_cholesky_"):
            setattr(plain, name, getattr(estimator, name))
        return plain.score_samples(x)
    return estimator.score_samples(x)


def test_densities_are_the_estimators(estimator):
    base = ebm.from_sklearn(estimator)
    points = np.concatenate([ROWS[::7], ROWS[::50] + 3.0])
    right = score(estimator, points)
    found = np.asarray(base.log_prob(points.astype(np.float32)))
    # float32: x of 20 beside a scale of 0.1 is known to 2e-6 / 0.1 of it.
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=5e-3)
    shaped = base.log_prob(points[:12].reshape(3, 4, 3))
    np.testing.assert_allclose(shaped.reshape(-1), found[:12], rtol=1e-6)


def test_densities_in_double_precision(estimator):
    with jax.enable_x64(True):
        base = ebm.from_sklearn(estimator)
        np.testing.assert_allclose(
            base.log_prob(ROWS[::7]), score(estimator, ROWS[::7]), rtol=1e-9
        )


def test_draws_are_the_estimators(estimator):
    """Mean, covariance and the mean density of 40,000 draws, in standard errors."""
    base, num = ebm.from_sklearn(estimator), 40_000
    draws = np.asarray(base.sample(random.key(0), (2, num // 2)), float).reshape(num, 3)
    theirs = estimator.sample(num, **_seed(estimator))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs

    def statistics(x):
        centred = x - np.asarray(base.mean, float)
        products = np.einsum("ni,nj->nij", centred, centred).reshape(num, -1)
        return np.column_stack([x, products, score(estimator, x)])

    ours, others = statistics(draws), statistics(theirs)
    error = np.sqrt((np.var(ours, 0) + np.var(others, 0)) / num)
    assert np.all(np.abs(ours.mean(0) - others.mean(0)) < 5 * error)
    np.testing.assert_allclose(base.mean, theirs.mean(0), atol=5 * error[:3].max())
    spread = np.cov(theirs.T)
    np.testing.assert_allclose(
        base.covariance_matrix, spread, atol=5 * error[3:12].max()
    )


def _seed(estimator):
    if isinstance(estimator, KernelDensity):
        return {"random_state": 1}
    estimator.random_state = 1
    return {}


def test_weights_of_a_kernel_density():
    weights = RNG.uniform(size=len(ROWS))
    estimator = KernelDensity(bandwidth=0.5).fit(ROWS, sample_weight=weights)
    found = ebm.from_sklearn(estimator).log_prob(ROWS[:50].astype(np.float32))
    right = estimator.score_samples(ROWS[:50])
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=5e-3)


def test_walkers_move_in_whitened_coordinates():
    base = ebm.from_sklearn(ESTIMATORS["full"])
    u = standardizing_transform(base).inv(base.sample(random.key(1), (20_000,)))
    np.testing.assert_allclose(np.cov(np.asarray(u).T), np.eye(3), atol=0.1)


def test_an_energy_on_a_mixture_is_normalised():
    """E = −a · x on a mixture of normals has log Z in closed form; annealing finds it."""
    estimator, a = ESTIMATORS["full"], np.array([0.1, -0.2, 0.3])
    distribution = ebm.EnergyDistribution(
        lambda v: -jnp.sum(v * a, -1), ebm.from_sklearn(estimator)
    )
    log_z = ebm.log_normalizer(random.key(0), distribution, progress_bar=False)
    terms = np.log(estimator.weights_) + estimator.means_ @ a
    terms += 0.5 * np.einsum("i,kij,j->k", a, estimator.covariances_, a)
    right = np.logaddexp.reduce(terms)
    assert log_z.lower["x"] - 0.01 < right < log_z.upper["x"] + 0.01
    assert abs(log_z.estimate["x"] - right) < 5 * log_z.stderr["x"]


def test_other_estimators_are_refused():
    with pytest.raises(TypeError, match="is a LinearRegression"):
        ebm.from_sklearn(LinearRegression())
    with pytest.raises(TypeError, match="expected a fitted"):
        ebm.from_sklearn(GaussianMixture(2))
    tophat = KernelDensity(kernel="tophat").fit(ROWS)
    with pytest.raises(ValueError, match="kernel 'tophat'"):
        ebm.from_sklearn(tophat)
    far = KernelDensity(metric="manhattan").fit(ROWS)
    with pytest.raises(ValueError, match="metric 'manhattan'"):
        ebm.from_sklearn(far)


def test_a_mixture_that_single_precision_cannot_hold_is_told():
    """Columns of 10⁴, one the sum of two: rows were off by 4 nats."""
    a, b = 1e4 * RNG.normal(size=(2, 400))
    fitted = GaussianMixture(1, random_state=0).fit(np.column_stack([a, b, a + b]))
    with pytest.warns(UserWarning, match="In float32 the mixture's log density is off"):
        ebm.from_sklearn(fitted)
    with jax.enable_x64(True):
        ebm.from_sklearn(fitted)


def test_rows_of_weight_zero():
    weights = np.arange(len(ROWS)) % 2
    found = ebm.from_sklearn(
        KernelDensity(bandwidth=0.5).fit(ROWS, sample_weight=weights)
    )
    right = ebm.from_sklearn(KernelDensity(bandwidth=0.5).fit(ROWS[1::2]))
    points = ROWS[:9].astype(np.float32)
    np.testing.assert_allclose(
        found.log_prob(points), right.log_prob(points), rtol=1e-4, atol=5e-3
    )
