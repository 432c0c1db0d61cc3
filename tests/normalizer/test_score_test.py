"""The score test and polished fits against likelihoods in closed form."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import binom

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("score_test")

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=300).astype(np.float32) / 2
SKEWED = RNG.gamma(2.0, 0.5, size=400).astype(np.float32)
GRID = np.linspace(-12, 12, 20_001)


# Models, with the maximum of their likelihood


def precision(x):
    """N(0, 1/λ) over N(0, 1), a random sub-batch in every run."""
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x), subsample_size=50):
        numpyro.sample("x", energy, obs=numpyro.subsample(x, 0))


LAM = 1 / float(np.mean(ROWS.astype(float) ** 2))


def loss_of_precision(lam):
    """Nats a row that ``lam`` loses to the maximum."""
    return 0.5 * (np.log(LAM / lam) - 1 + lam / LAM)


def quartic(x):
    """Skewed: E = a v⁴ / 4 − b v over N(0, 1)."""
    a = numpyro.param("a", 0.5, constraint=constraints.positive)
    b = numpyro.param("b", 0.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * a * v**4 - b * v, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def quartic_loss(theta, x=SKEWED):
    a, b = np.exp(theta[0]), theta[1]
    potential = 0.25 * a * GRID**4 - b * GRID + 0.5 * GRID**2
    log_z = logsumexp(-potential) + np.log(GRID[1] - GRID[0])
    x = x.astype(float)
    return float(np.mean(0.25 * a * x**4 - b * x + 0.5 * x**2) + log_z)


@pytest.fixture(scope="module")
def quartic_maximum():
    found = minimize(quartic_loss, [-1.0, 1.0], method="BFGS", tol=1e-10)
    return found.x, found.fun


def gamma_prior(x):
    """MAP: Gamma(2, 1) on the rate of an exponential, E = r x over Exponential(1)."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    energy = ebm.EnergyDistribution(lambda v: rate * v, dist.Exponential(1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def two_sites(x, y):
    """x ~ N(0, 1/k), y ~ N(0, 1/(2k)): one k from both."""
    k = numpyro.param("k", 1.0, constraint=constraints.positive)
    flat = dist.ImproperUniform(constraints.real, (), ())
    start = dist.Normal(0.0, 1.0)
    for name, values, factor in (("x", x, 1.0), ("y", y, 2.0)):
        energy = ebm.EnergyDistribution(
            lambda v, factor=factor: 0.5 * factor * k * v**2, flat, start=start
        )
        with numpyro.plate(f"rows of {name}", len(values)):
            numpyro.sample(name, energy, obs=values)


def rows_of_their_own(x):
    """Three columns with a log Z each: N(0, 1 / (s c)) with one s."""
    scale = numpyro.param("s", 1.0, constraint=constraints.positive)
    rates = scale * jnp.array([1.0, 2.0, 4.0])
    base = dist.Normal(0.0, 1.0).expand([3])
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (rates - 1) * v**2, base)
    with numpyro.plate("columns", 3, dim=-1), numpyro.plate("rows", len(x), dim=-2):
        numpyro.sample("x", energy, obs=x)


COLUMNS = (RNG.normal(size=(100, 3)) / np.sqrt([1.0, 2.0, 4.0])).astype(np.float32)


def within(test, name, truth, num=4.0):
    """The test's own maximum is the truth, within its own Monte Carlo errors."""
    errors = np.asarray(test.standard_errors[name])
    noise = np.asarray(test.distance_error[name]) * errors
    return np.abs(np.asarray(test.newton[name]) - truth) < num * noise


# The score test


@pytest.mark.parametrize("seed", range(3))
def test_silent_at_the_maximum(seed):
    test = ebm.score_test(random.key(seed), {"lam": LAM}, precision, ROWS)
    assert test.is_at_maximum, test
    assert test.log_normalizer.is_certified
    assert abs(test.distance["lam"]) < 5 * test.distance_error["lam"]
    # Fisher: λ √(2/n)
    assert test.standard_errors["lam"] == pytest.approx(LAM * np.sqrt(2 / 300), rel=0.1)


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.5, 3.0])
def test_loud_away_from_it_and_the_gain_is_right(factor):
    test = ebm.score_test(random.key(0), {"lam": factor * LAM}, precision, ROWS)
    assert not test.is_at_maximum
    assert "parameter 'lam'" in str(test)
    assert "not at a maximum" in test.flags[-1]
    assert np.sign(test.distance["lam"]) == (1 if factor < 1 else -1)
    assert test.gain_per_row == pytest.approx(loss_of_precision(factor * LAM), rel=0.2)
    assert within(test, "lam", LAM)


def test_a_skewed_energy(quartic_maximum):
    """Score and maximum against quadrature, at a place far from it."""
    theta, least = quartic_maximum
    here, step = theta + np.array([0.5, -0.2]), 1e-5
    at = {"a": np.exp(here[0]), "b": here[1]}
    test = ebm.score_test(random.key(0), at, quartic, SKEWED)
    slope = [
        -400 * (quartic_loss(here + d) - quartic_loss(here - d)) / (2 * step)
        for d in step * np.eye(2)
    ]
    found = [float(test.score["a"]), float(test.score["b"])]
    density = np.exp(-(0.25 * at["a"] * GRID**4 - at["b"] * GRID + 0.5 * GRID**2))
    density /= density.sum()
    for value, right, slopes in zip(
        found, slope, (0.25 * at["a"] * GRID**4, -GRID), strict=True
    ):
        variance = density @ slopes**2 - (density @ slopes) ** 2
        assert abs(value - right) < 5 * 400 * np.sqrt(variance / 4096)
    assert test.gain_per_row == pytest.approx(quartic_loss(here) - least, rel=0.2)
    assert within(test, "b", theta[1])


def test_priors_count():
    """(n + 1) / (1 + Σ x) − 1 by MAP; without the prior it would be n / Σ x − 1."""
    x = RNG.exponential(size=12).astype(np.float32) / 3
    right = 13 / (1 + float(x.sum()))
    rate = float(minimize(lambda r: 12 * -np.log1p(r[0]) + r[0] * x.sum()
                          + r[0] - np.log(r[0]), [1.0], method="Nelder-Mead").x[0])  # fmt: skip
    assert abs(rate - right) > 0.1
    test = ebm.score_test(random.key(0), {"rate": rate}, gamma_prior, x)
    assert test.is_at_maximum
    # On the log scale: n Var(r x) from the energy, and r from the prior.
    information = 12 * (rate / (1 + rate)) ** 2 + rate
    error = rate / np.sqrt(information)
    assert test.standard_errors["rate"] == pytest.approx(error, rel=0.05)
    off = ebm.score_test(random.key(0), {"rate": 3 * rate}, gamma_prior, x)
    assert within(off, "rate", rate)


def test_sites_add_up():
    x, y = (RNG.normal(size=n).astype(np.float32) for n in (100, 150))
    k = 250 / float((x.astype(float) ** 2).sum() + 2 * (y.astype(float) ** 2).sum())
    test = ebm.score_test(random.key(0), {"k": 1.6 * k}, two_sites, x, y)
    assert not test.is_at_maximum
    assert within(test, "k", k)
    assert test.standard_errors["k"] == pytest.approx(k * np.sqrt(2 / 250), rel=0.2)


def test_elements_have_their_own_log_z():
    right = 300 / float((COLUMNS.astype(float) ** 2 * [1.0, 2.0, 4.0]).sum())
    test = ebm.score_test(random.key(0), {"s": 0.6 * right}, rows_of_their_own, COLUMNS)
    assert within(test, "s", right)
    assert test.standard_errors["s"] == pytest.approx(right * np.sqrt(2 / 300), rel=0.2)


@pytest.mark.runs_long
def test_alarms_by_chance_are_rare():
    """Of 40 tests at the maximum at most as many as a binomial of 2% gives at 10⁻³."""
    rows = ROWS[:100]
    at = {"lam": 1 / float(np.mean(rows.astype(float) ** 2))}
    alarms = sum(
        not ebm.score_test(
            random.key(seed), at, precision, rows, num_walkers=64
        ).is_at_maximum
        for seed in range(40)
    )
    assert alarms <= binom.ppf(0.999, 40, 0.02)


def test_nets_are_tested_along_directions():
    """A net that starts at its base has a slope; one without data to tell has none."""
    x = RNG.normal(size=(200, 2)).astype(np.float32) + np.float32([1.0, 0.0])

    def model(x):
        layers = [nn.Dense(64), nn.swish, nn.Dense(16), nn.swish, nn.Dense(1)]
        net = flax_module("net", nn.Sequential(layers), input_shape=(2,))
        base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        energy = ebm.EnergyDistribution(lambda v: net(v)[..., 0], base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.Jarzynski(model, optax.adam(1e-3))
    fit = backend.run(random.key(0), 1, x, progress_bar=False)
    test = ebm.score_test(random.key(1), fit, model, x)
    assert not test.is_at_maximum
    assert test.newton is None
    assert {np.shape(v) for v in test.distance.values()} == {(5,)}
    with pytest.raises(ValueError, match=r"1,297 parameters|polish takes 1,000"):
        ebm.polish(random.key(1), fit, model, x)


# What Newton steps cannot judge


def beside_a_location(x, y):
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    mu = numpyro.param("mu", 0.0)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)
        numpyro.sample("y", dist.Cauchy(mu, 1.0), obs=y)


def test_a_slope_where_the_likelihood_does_not_curve_down():
    """20 widths from its centre a Cauchy likelihood is convex: a Newton step of 0 was
    taken for a maximum."""
    y = RNG.standard_cauchy(size=len(ROWS)).astype(np.float32)
    params = {"lam": jnp.array(LAM), "mu": jnp.array(20.0)}
    test = ebm.score_test(random.key(0), params, beside_a_location, ROWS, y)
    assert any("slopes along parameter 'mu'" in flag for flag in test.flags)
    assert test.distance["mu"] == -np.inf
    assert abs(test.distance["lam"]) < 1

    polished = ebm.polish(
        random.key(1), params, beside_a_location, ROWS, y, max_rounds=1
    )
    assert any("no maximum was reached" in flag for flag in polished.flags)


def test_a_parameter_without_effect_is_no_slope():
    def model(x):
        numpyro.param("idle", 0.3)
        precision(x)

    params = {"lam": jnp.array(LAM), "idle": jnp.array(0.3)}
    test = ebm.score_test(random.key(0), params, model, ROWS)
    assert test.is_at_maximum
    assert test.distance["idle"] == 0


def test_monte_carlo_errors_too_large_to_judge():
    """Forty thousand rows tell λ to half a percent, 64 walkers do not."""
    rows = np.tile(ROWS, 140)
    options = {"num_chains": 4, "num_walkers": 16}
    params = {"lam": jnp.array(1.05 * LAM)}
    test = ebm.score_test(random.key(0), params, precision, rows, **options)
    assert not test.is_judged
    assert not test.is_at_maximum
    assert "cannot be judged" in str(test)
    assert any("times the walkers (num_walkers)" in flag for flag in test.flags)


def test_a_distance_far_beyond_its_error_is_judged():
    """The same rows at 1.5 times the maximum: 72 standard errors, known to a few."""
    rows = np.tile(ROWS, 140)
    params = {"lam": jnp.array(1.5 * LAM)}
    test = ebm.score_test(random.key(0), params, precision, rows, num_walkers=64)
    assert float(test.distance_error["lam"]) > 1
    assert test.is_judged
    assert str(test).startswith("NOT at a maximum")


def test_bad_options():
    with pytest.raises(ValueError, match="num_chains = 1"):
        ebm.score_test(random.key(0), {"lam": 1.0}, precision, ROWS, num_chains=1)
    with pytest.raises(ValueError, match="max_rounds = 0"):
        ebm.polish(random.key(0), {"lam": 1.0}, precision, ROWS, max_rounds=0)


# Polished fits


def test_polish_goes_to_the_maximum():
    found = ebm.polish(random.key(0), {"lam": 0.3 * LAM}, precision, ROWS)
    error, noise = found.standard_errors["lam"], found.monte_carlo_errors["lam"]
    assert found.flags == ()
    assert noise < 0.2 * error
    assert abs(found.params["lam"] - LAM) < 4 * noise
    assert error == pytest.approx(LAM * np.sqrt(2 / 300), rel=0.05)
    assert "lam:" in str(found)


@pytest.mark.runs_long
def test_polish_of_a_skewed_energy(quartic_maximum):
    theta, _ = quartic_maximum
    found = ebm.polish(random.key(0), {"a": 0.8, "b": -0.5}, quartic, SKEWED)
    assert found.flags == ()
    for name, right in (("a", np.exp(theta[0])), ("b", theta[1])):
        noise = found.monte_carlo_errors[name]
        assert abs(found.params[name] - right) < 4 * noise


def test_polish_says_where_it_did_not_arrive():
    found = ebm.polish(
        random.key(0), {"lam": 0.02}, precision, ROWS, max_rounds=1, num_walkers=32
    )
    assert any("no maximum was reached in 1 rounds" in flag for flag in found.flags)
