"""Noise-contrastive estimation against minima by quadrature."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy.optimize import approx_fprime, minimize
from scipy.stats import norm

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("noise_contrastive")

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=1000) / 2).astype(np.float32)
GRID = np.linspace(-12, 12, 4001)
OF_GRID = np.exp(-0.25 * GRID**4 + 1.5 * GRID)
SKEWED = RNG.choice(GRID, size=1000, p=OF_GRID / OF_GRID.sum()).astype(np.float32)
NUM_STEPS, RATIO, NUM_DRAWS = 1000, 10.0, 1024
STATES = np.array(list(itertools.product((0, 1), repeat=5)))


class Quantiles(dist.Normal):
    """A normal whose draws are its quantiles: noise without noise."""

    def sample(self, key, sample_shape=()):
        num = np.prod(sample_shape, dtype=int)
        return self.icdf((jnp.arange(num) + 0.5) / num).reshape(sample_shape)


class EveryState(dist.BernoulliProbs):
    """Five coins whose draws are all their states in turn."""

    def sample(self, key, sample_shape=()):
        num = np.prod(sample_shape, dtype=int)
        return jnp.asarray(STATES)[jnp.arange(num) % 32].reshape(*sample_shape, 5)


def fit_of(model, x):
    rate = optax.cosine_decay_schedule(5e-2, NUM_STEPS)
    backend = ebm.NoiseContrastive(model, optax.adam(rate), num_draws=NUM_DRAWS)
    return backend.run(random.key(0), NUM_STEPS, x, progress_bar=False)


def precision(x, draws=Quantiles):
    lam = numpyro.param("lam", 1.0)
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (lam - 1) * v**2, draws(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def quartic(x):
    """Skewed; noise from a start that is not the base."""
    a = numpyro.param("a", 0.5)
    b = numpyro.param("b", 0.5)
    flat = dist.ImproperUniform(constraints.real, (), ())
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * a * v**4 - b * v, flat, start=Quantiles(0.5, 1.5)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def chain(x):
    """Five spins, neighbours alike by J."""
    coupling = numpyro.param("J", 0.0)
    base = EveryState(0.5 * jnp.ones(5)).to_event(1)
    energy = ebm.EnergyDistribution(
        lambda v: -coupling * jnp.sum((v[..., 1:] == v[..., :-1]) * 1.0, -1), base
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def same_neighbours(x):
    return np.sum(x[:, 1:] == x[:, :-1], axis=1)


ALIKE = np.exp(0.7 * same_neighbours(STATES))
CHAINS = STATES[RNG.choice(32, size=1000, p=ALIKE / ALIKE.sum())]

NORMAL, WIDE = norm(0, 1), norm(0.5, 1.5)
WIDTH = GRID[1] - GRID[0]
# For each: data, names, where noise is summed, its mass there, and the energy over the
# noise's density.
CASES = {
    "precision": (
        (precision, ROWS, ["lam"], GRID, NORMAL.pdf(GRID) * WIDTH),
        lambda t, v: 0.5 * (t[0] - 1) * v**2,
    ),
    "skewed quartic": (
        (quartic, SKEWED, ["a", "b"], GRID, WIDE.pdf(GRID) * WIDTH),
        lambda t, v: 0.25 * t[0] * v**4 - t[1] * v + WIDE.logpdf(v),
    ),
    "chain": (
        (chain, CHAINS, ["J"], STATES, np.full(32, 1 / 32)),
        lambda t, v: -t[0] * same_neighbours(v),
    ),
}


def losses_of_rows(energy, theta, points, sign):
    odds = -energy(theta[:-1], points) - theta[-1] - np.log(RATIO)
    return np.logaddexp(0.0, -sign * odds)


def best_of(energy, x, points, mass, num_params):
    """Parameters and c at the least loss, and the standard error of c − log Z(θ)."""

    def loss(theta):
        noise = RATIO * mass @ losses_of_rows(energy, theta, points, -1)
        return np.mean(losses_of_rows(energy, theta, x, 1)) + noise

    def log_z(theta):
        return np.log(mass @ np.exp(-energy(theta[:-1], points)))

    best = minimize(loss, np.full(num_params + 1, 0.3), method="BFGS", tol=1e-12).x
    steps = np.eye(len(best)) * 1e-4
    hessian = np.array(
        [
            (approx_fprime(best + s, loss, 1e-6) - approx_fprime(best - s, loss, 1e-6))
            / 2e-4
            for s in steps
        ]
    )
    scores = np.array(
        [
            losses_of_rows(energy, best + s, x, 1)
            - losses_of_rows(energy, best - s, x, 1)
            for s in steps
        ]
    )
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ np.cov(scores / 2e-4) @ inverse / len(x)
    slope = np.append(-approx_fprime(best, log_z, 1e-6)[:-1], 1.0)
    return best, log_z(best), np.sqrt(slope @ covariance @ slope)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_log_z(case):
    """Those of the least loss on these rows; c within its error of the log Z there."""
    (model, x, names, points, mass), energy = CASES[case]
    best, log_z, error = best_of(energy, x.astype(float), points, mass, len(names))

    fit = fit_of(model, x)
    learned = float(fit.state.log_normalizers["x"])
    found = np.array([*(float(fit.params[name]) for name in names), learned])
    # A thousand quantiles leave out the tails beyond.
    np.testing.assert_allclose(found, best, atol=2e-3, rtol=2e-3)
    assert abs(learned - log_z) < 3 * error
    assert fit.history["log_normalizer"]["x"][-1] == learned

    # What the test can see: noise that counts once, not ν times, would end elsewhere.
    assert np.log(RATIO) > 10 * error


def test_the_certificate_checks_what_was_learned():
    fit = fit_of(precision, ROWS)
    log_z = ebm.log_normalizer(
        random.key(1), precision, fit, ROWS, method="quadrature", progress_bar=False
    )
    assert fit.state.contradictions(log_z) == ()

    wrong = {"x": fit.state.log_normalizers["x"] + 1.0}
    state = fit.state.__class__(**{**vars(fit.state), "log_normalizers": wrong})
    (told,) = state.contradictions(log_z)
    assert "'x' was learned 1 nats away" in told


def test_a_run_that_ends_too_early_is_told():
    """θ and log Z move together, slowly where they are not told apart well."""
    backend = ebm.NoiseContrastive(precision, optax.adam(5e-3))
    with pytest.warns(UserWarning, match="Not at a maximum: parameter 'lam'"):
        backend.run(random.key(0), 200, ROWS, draws=dist.Normal, progress_bar=False)


def test_noise_that_misses_rows_is_told():
    def model(x):
        shift = numpyro.param("shift", 1.0)
        energy = ebm.EnergyDistribution(lambda v: -shift * v, dist.Normal(0.0, 0.1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.NoiseContrastive(model, optax.adam(0.1))
    with pytest.warns(UserWarning, match="Energy site 'x'"):
        backend.run(random.key(0), 60, ROWS + 2.0, progress_bar=False)


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_draws = 1; expected at least 2"):
        ebm.NoiseContrastive(precision, optax.sgd(0.1), num_draws=1)
    with pytest.raises(ValueError, match="noise_ratio = 0; expected a positive"):
        ebm.NoiseContrastive(precision, optax.sgd(0.1), noise_ratio=0)

    def model(x):
        w = numpyro.param("w", 0.0)
        with numpyro.plate("rows", 100, subsample_size=len(x)):
            base = dist.Normal(jnp.zeros(len(x)), 1.0)
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: w * v, base), obs=x)

    backend = ebm.NoiseContrastive(model, optax.sgd(0.1))
    with pytest.raises(ValueError, match="a learned log Z of absent rows"):
        backend.init(random.key(0), ROWS[:50])


@pytest.mark.parametrize("backend", [ebm.NoiseContrastive, ebm.MonteCarloMLE])
def test_energies_that_look_up_a_table(backend):
    """Log odds of three classes: those of the counts."""
    counts = np.array([100, 150, 250])

    def model(x):
        odds = numpyro.param("odds", jnp.zeros(2))
        table = jnp.concatenate([jnp.zeros(1), odds])
        base = dist.Categorical(jnp.full(3, 1 / 3))
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: -table[v], base), obs=x
            )

    rate = optax.cosine_decay_schedule(5e-2, 400)
    fit = backend(model, optax.adam(rate), num_draws=4096).run(
        random.key(0), 400, np.repeat(np.arange(3), counts), progress_bar=False
    )
    right = np.log(counts[1:] / counts[0])
    # A fifth of the rows' own standard errors.
    error = np.sqrt(1 / counts[1:] + 1 / counts[0])
    assert np.all(np.abs(fit.params["odds"] - right) < 0.2 * error)
