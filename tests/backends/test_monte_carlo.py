"""Monte Carlo maximum likelihood against maxima that are known."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.normalizer import validation as validation_module

pytestmark = pytest.mark.xdist_group("monte_carlo")

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=400) / 2).astype(np.float32)
SKEWED = RNG.gamma(2.0, 0.5, size=400).astype(np.float32)
GRID = np.linspace(-12, 12, 20_001)
RATE = optax.cosine_decay_schedule(5e-2, 800)


def fit_of(model, *args, num_steps=800, **options):
    backend = ebm.MonteCarloMLE(model, optax.adam(RATE), **options)
    return backend.run(random.key(0), num_steps, *args, progress_bar=False)


def within(fit, model, *args, num=3.0):
    """The fit's own score test finds the maximum at most so many errors away."""
    test = ebm.score_test(random.key(1), fit, model, *args)
    worst = max(np.max(np.abs(d)) for d in test.distance.values())
    return worst < num


# Maxima in closed form


def precision(x):
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def quartic(x):
    """Skewed: E = a v⁴ / 4 − b v over N(0, 1.5)."""
    a = numpyro.param("a", 0.5, constraint=constraints.positive)
    b = numpyro.param("b", 0.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * a * v**4 - b * v, dist.Normal(0.5, 1.5)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def quartic_loss(theta, x=SKEWED):
    a, b = np.exp(theta[0]), theta[1]

    def potential(v):
        return 0.25 * a * v**4 - b * v + 0.5 * ((v - 0.5) / 1.5) ** 2

    log_z = logsumexp(-potential(GRID)) + np.log(GRID[1] - GRID[0])
    return float(np.mean(potential(x.astype(float))) + log_z)


def test_a_precision():
    lam, right = fit_of(precision, ROWS).params["lam"], 1 / np.mean(ROWS**2)
    # The last tenth's gradients average over some 80 x 1,024 draws with an ESS of 2/3.
    error = right * np.sqrt(2 / (80 * 1024 * 0.6))
    assert abs(lam - right) < 5 * error
    assert error < 0.1 * right * np.sqrt(2 / len(ROWS))


def test_a_skewed_quartic():
    fit = fit_of(quartic, SKEWED)
    best = minimize(quartic_loss, [0.0, 0.0], method="BFGS", tol=1e-10)
    found = np.array([np.log(fit.params["a"]), fit.params["b"]])
    # Nats a row that are lost: far under what one standard error costs, 1 / (2 n).
    assert quartic_loss(found) - best.fun < 0.1 / (2 * len(SKEWED))
    assert quartic_loss(found + np.array([0.1, 0.0])) - best.fun > 0.1 / (
        2 * len(SKEWED)
    )


def test_a_base_that_learns():
    """N(m, 1) tilted by −½ (λ − 1) v² is N(m / λ, 1 / λ): the base's derivative counts."""

    def model(x):
        m = numpyro.param("m", 0.0)
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(m, 1.0)
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    x = ROWS + 0.4
    fit = fit_of(model, x)
    assert fit.params["lam"] == pytest.approx(1 / np.var(x), rel=0.02)
    assert fit.params["m"] == pytest.approx(np.mean(x) / np.var(x), rel=0.02)


def test_a_start_that_learns_is_no_force():
    """The derivative is that of −U alone; that of the start's density would add one."""

    def model(x):
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
        start = dist.Normal(0.0, 1.5 / jnp.sqrt(lam))
        flat = dist.ImproperUniform(constraints.real, (), ())
        energy = ebm.EnergyDistribution(lambda v: 0.5 * lam * v**2, flat, start=start)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    fit = fit_of(model, ROWS)
    assert fit.params["lam"] == pytest.approx(1 / np.mean(ROWS**2), rel=0.02)


def test_the_odds_of_two_modes():
    up = np.arange(500) < 150
    x = np.where(up, 3.0, -3.0) + RNG.normal(size=500) / 2

    def model(x):
        h = numpyro.param("h", 0.0)

        def energy(v):
            above, below = h - 2.0 * (v - 3.0) ** 2, -2.0 * (v + 3.0) ** 2
            return -jnp.logaddexp(above, below) - v**2 / 32

        with numpyro.plate("rows", len(x)):
            base = ebm.EnergyDistribution(energy, dist.Normal(0.0, 4.0))
            numpyro.sample("x", base, obs=x)

    fit = fit_of(model, x.astype(np.float32))
    share = 1 / (1 + np.exp(-fit.params["h"]))
    assert share == pytest.approx(0.3, abs=0.2 * np.sqrt(0.3 * 0.7 / 500))


def test_a_chain_of_spins():
    """Of a finite support log Z is a sum: λ of an Ising chain by enumeration."""
    spins = np.array(np.meshgrid(*[[0, 1]] * 6, indexing="ij")).reshape(6, -1).T

    def agreement(v):
        return jnp.sum(v[..., 1:] == v[..., :-1], axis=-1)

    alike = np.asarray(agreement(spins), float)

    def loss(theta, mean):
        return -theta[0] * mean + logsumexp(theta[0] * alike)

    p = np.exp(0.8 * alike)
    x = spins[RNG.choice(len(spins), size=400, p=p / p.sum())]

    def model(x):
        coupling = numpyro.param("coupling", 0.0)
        base = dist.Bernoulli(0.5 * jnp.ones(6)).to_event(1)
        energy = ebm.EnergyDistribution(lambda v: -coupling * agreement(v), base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    fit = fit_of(model, x)
    mean = np.mean(np.asarray(agreement(x), float))
    right = minimize(loss, [0.0], args=(mean,), method="BFGS", tol=1e-10).x[0]
    p = np.exp(right * alike) / np.sum(np.exp(right * alike))
    error = 1 / np.sqrt(len(x) * (p @ alike**2 - (p @ alike) ** 2))
    assert abs(fit.params["coupling"] - right) < 0.2 * error
    exported = ebm.to_arviz(fit, model, x)
    drawn = np.asarray(exported["posterior_predictive"]["x"])
    assert set(np.unique(drawn)) == {0, 1}
    # 16,000 weighted draws; the number of agreements has a spread of 1.2.
    assert np.mean(agreement(drawn)) == pytest.approx(p @ alike, abs=5 * 1.2 / 80)


def conditional(x, c):
    """x | c ~ N(w c / 4, 1 / 4): every row has a log Z of its own."""
    w = numpyro.param("w", 0.0)
    base = dist.Normal(jnp.zeros(len(c)), 1.0)
    energy = ebm.EnergyDistribution(lambda v: 1.5 * v**2 - w * c * v, base)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def test_conditional_energies_have_a_log_z_each():
    c = RNG.normal(size=60).astype(np.float32) / 2
    x = (0.8 * c + 0.5 * RNG.normal(size=60)).astype(np.float32)

    fit = fit_of(conditional, x, c)
    # The maximum is 4 Σ c x / Σ c².
    right = 4 * np.sum(c * x) / np.sum(c**2)
    error = 2 / np.sqrt(np.sum(c**2))
    assert abs(fit.params["w"] - right) < 0.2 * error


def in_batches(x, c):
    """The same with twenty rows at a time."""
    w = numpyro.param("w", 0.0)
    with numpyro.plate("rows", len(x), subsample_size=20):
        rows = numpyro.subsample(x, event_dim=0)
        given = numpyro.subsample(c, event_dim=0)
        base = dist.Normal(jnp.zeros(len(given)), 1.0)
        energy = ebm.EnergyDistribution(lambda v: 1.5 * v**2 - w * given * v, base)
        numpyro.sample("x", energy, obs=rows)


def test_conditional_energies_in_batches_of_rows():
    """And log Z, afterwards, of every row: E[exp(w c v)] under N(0, 1/4), over 2."""
    c = RNG.normal(size=120).astype(np.float32) / 2
    x = (0.8 * c + 0.5 * RNG.normal(size=120)).astype(np.float32)

    fit = fit_of(in_batches, x, c)
    right, error = 4 * np.sum(c * x) / np.sum(c**2), 2 / np.sqrt(np.sum(c**2))
    # Batches of a sixth of the rows leave noise at the end of the rate's fall.
    assert abs(fit.params["w"] - right) < 0.5 * error

    log_z = ebm.log_normalizer(None, in_batches, fit, x, c, method="quadrature")
    w = np.asarray(fit.params["w"])
    expected = (w * c) ** 2 / 8 - np.log(2)
    np.testing.assert_allclose(log_z.estimate["x"], expected, atol=1e-4)
    scores = ebm.log_density(fit, in_batches, x, c, log_normalizer=log_z)["x"]
    expected = norm.logpdf(x, w * c / 4, 0.5)
    np.testing.assert_allclose(scores, expected, atol=1e-3)

    idata = ebm.to_arviz(fit, in_batches, x, c, log_normalizer=log_z)
    assert idata.attrs["mean_log_density"] == pytest.approx(expected.mean(), abs=1e-3)


@pytest.mark.parametrize("which", ["energies", "data"])
def test_rows_of_other_covariates(which):
    """A slice of the first rows beside a plate's: −0.04 for 0.71."""

    def model(x, c):
        w = numpyro.param("w", 0.0)
        with numpyro.plate("rows", len(x), subsample_size=20):
            rows, given = (numpyro.subsample(of, event_dim=0) for of in (x, c))
            if which == "data":
                rows = x[:20]
            else:
                given = c[:20]
            base = dist.Normal(jnp.zeros(20), 1.0)
            energy = ebm.EnergyDistribution(lambda v: 1.5 * v**2 - w * given * v, base)
            numpyro.sample("x", energy, obs=rows)

    x, c = (RNG.normal(size=120).astype(np.float32) for _ in range(2))
    other = {"energies": "data", "data": "energies"}[which]
    with pytest.raises(
        ValueError,
        match=f"its {other} follow the rows of plate 'rows' while its {which}",
    ):
        fit_of(model, x, c)


@pytest.mark.parametrize("together", [True, False])
def test_rows_of_two_plates(together):
    """Data follow one plate, covariates another of the same size."""

    def model(x, c):
        w = numpyro.param("w", 0.0)
        plates = [numpyro.plate(name, len(x), subsample_size=20) for name in "ab"]
        with plates[0 if together else 1]:
            given = numpyro.subsample(c, event_dim=0)
        with plates[1]:
            numpyro.sample("y", dist.Normal(w), obs=numpyro.subsample(x, event_dim=0))
        with plates[0]:
            base = dist.Normal(jnp.zeros(len(given)), 1.0)
            energy = ebm.EnergyDistribution(lambda v: 1.5 * v**2 - w * given * v, base)
            numpyro.sample("x", energy, obs=numpyro.subsample(x, event_dim=0))

    x, c = (RNG.normal(size=120).astype(np.float32) for _ in range(2))
    backend = ebm.MonteCarloMLE(model, optax.sgd(1e-4), num_draws=64)
    if together:
        backend.init(random.key(0), x, c)
        return
    with pytest.raises(
        ValueError, match=r"plate 'a' while its energies|plate 'b' while"
    ):
        backend.init(random.key(0), x, c)


def test_more_data_for_the_same_energies():
    """Data follow a plate of times too, in which an energy of every row stays."""

    def model(x, c):
        w = numpyro.param("w", 0.0)
        with numpyro.plate("rows", len(c), subsample_size=20, dim=-1):
            given = numpyro.subsample(c, event_dim=0)
            base = dist.Normal(jnp.zeros(len(given)), 1.0)
            energy = ebm.EnergyDistribution(lambda v: 1.5 * v**2 - w * given * v, base)
            with numpyro.plate("times", len(x), subsample_size=5, dim=-2):
                batch = numpyro.subsample(x, event_dim=0)
                numpyro.sample("x", energy, obs=batch)

    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 60)).astype(np.float32)
    c = rng.normal(size=60).astype(np.float32)
    backend = ebm.MonteCarloMLE(model, optax.sgd(1e-4), num_draws=64)
    backend.init(random.key(0), x, c)


def test_rows_that_are_all_alike_are_no_other_rows():
    """Data of one value cannot be seen to follow a plate, and need not."""
    c = RNG.normal(size=120).astype(np.float32)
    backend = ebm.MonteCarloMLE(in_batches, optax.sgd(1e-4), num_draws=64)
    fit = backend.run(random.key(0), 2, np.zeros(120), c, progress_bar=False)
    assert np.isfinite(fit.params["w"])


@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
def test_initial_values_outside_of_their_constraint(value):
    def positive(x):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(lambda v: rate * v**2, dist.Normal(0.0, 1.0)),
            obs=x,
        )

    backend = ebm.MonteCarloMLE(positive, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"'rate' has values .* outside of it"):
        backend.run(random.key(0), 1, 0.5, init_params={"rate": value})


def test_priors_and_two_sites():
    """k of N(0, 1/k) and N(0, 1/(2k)) under Gamma(3, 2): (n/2 + 2) / (S/2 + 2)."""
    x, y = (RNG.normal(size=n).astype(np.float32) for n in (100, 150))

    def model(x, y):
        k = numpyro.sample("k", dist.Gamma(3.0, 2.0))
        for name, values, factor in (("x", x, 1.0), ("y", y, 2.0)):
            energy = ebm.EnergyDistribution(
                lambda v, factor=factor: 0.5 * (factor * k - 1) * v**2,
                dist.Normal(0.0, 1.0),
            )
            with numpyro.plate(f"rows of {name}", len(values)):
                numpyro.sample(name, energy, obs=values)

    fit = fit_of(model, x, y)
    total = float(np.sum(x**2) + 2 * np.sum(y**2))
    assert fit.params["k"] == pytest.approx((125 + 2) / (0.5 * total + 2), rel=0.01)


# What it says of itself


def test_weights_that_few_draws_carry_are_told():
    def model(x):
        m = numpyro.param("m", 4.5)
        energy = ebm.EnergyDistribution(lambda v: -m * v, dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.MonteCarloMLE(model, optax.sgd(0.0), num_draws=256)
    with (
        pytest.warns(UserWarning, match="site 'x': of 256 draws of the base only"),
        pytest.warns(UserWarning, match="data rows lie where none of 16,384"),
    ):
        backend.run(random.key(0), 100, ROWS + 4.5, progress_bar=False)


def wide(x):
    lam = numpyro.param("lam", 1.0)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spread", [2.0, 2.5])
def test_a_base_narrower_than_the_data_is_told(spread):
    """Weights without a variance: λ was 17 standard errors off, or under 0, with 50 to
    200 draws of 1,024 that counted."""
    x = (spread * RNG.normal(size=2000)).astype(np.float32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit = fit_of(wide, x)
    right = 1 / np.mean(x.astype(float) ** 2)
    assert abs(fit.params["lam"] - right) > 3 * right * np.sqrt(2 / len(x))
    told = ("tail so heavy (Pareto k̂", "of the data rows lie where none")
    assert any(text in str(warning.message) for warning in seen for text in told)


def test_data_where_no_draw_of_the_base_comes_are_told():
    """Half of the data at 7 ± ½, no draw there: the ESS is 1, and log Z of nothing."""
    x = np.concatenate([ROWS, ROWS + 7.0])

    def model(x):
        h = numpyro.param("h", 1.0)
        energy = ebm.EnergyDistribution(
            lambda v: -h * jnp.exp(-0.5 * (v - 7.0) ** 2), dist.Normal(0.0, 1.0)
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.MonteCarloMLE(model, optax.adam(0.5))
    with pytest.warns(
        UserWarning, match=r"50% of the data rows lie where none of 16,384"
    ):
        fit = backend.run(random.key(0), 150, x, progress_bar=False)
    assert fit.history["ess"]["x"][-1] > 0.99


def test_an_energy_as_base_draws_approximately_and_is_refused():
    """Its draws miss the narrow half of itself; log Z by them was certified, 4 nats off."""
    broad = dist.Normal(0.0, 1.0).expand([5]).to_event(1)
    narrow = dist.Normal(6 * jnp.ones(5), 0.05).to_event(1)

    def inner(v):
        both = jnp.logaddexp(broad.log_prob(v), narrow.log_prob(v))
        return broad.log_prob(v) - both + np.log(2.0)

    base = ebm.EnergyDistribution(inner, broad, log_normalizer=0.0)
    energy = ebm.bounded(lambda v: -4.0 * jnp.tanh(v[..., 0] - 3.0), 3.0)
    outer = ebm.EnergyDistribution(energy, base)
    for method in ("base", "bracket"):
        with pytest.raises(ebm.UnknownNormalizerError, match="is an energy itself"):
            ebm.log_normalizer(random.key(0), outer, method=method, progress_bar=False)

    def model(x):
        t = numpyro.param("t", 1.0)
        tilted = ebm.EnergyDistribution(lambda v: t * energy(v), base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", tilted, obs=x)

    backend = ebm.MonteCarloMLE(model, optax.adam(1e-2))
    with pytest.raises(ebm.UnknownNormalizerError, match=r"start=inner\.base"):
        backend.init(random.key(0), np.zeros((3, 5), np.float32))


def test_a_run_that_stopped_early_is_told():
    backend = ebm.MonteCarloMLE(precision, optax.adam(1e-4))
    with pytest.warns(UserWarning, match="Not at a maximum: parameter 'lam'"):
        backend.run(random.key(0), 200, ROWS, progress_bar=False)


def test_an_improper_base_wants_a_start():
    def model(x):
        flat = dist.ImproperUniform(constraints.real, (), ())
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda v: lam * v**2, flat)
            numpyro.sample("x", energy, obs=x)

    with pytest.raises(ebm.UnknownNormalizerError, match="start"):
        ebm.MonteCarloMLE(model, optax.adam(1e-2)).init(random.key(0), ROWS)


def test_bad_options():
    with pytest.raises(ValueError, match="num_draws = 1"):
        ebm.MonteCarloMLE(precision, optax.adam(1e-2), num_draws=1)
    with pytest.raises(TypeError, match="optim"):
        ebm.MonteCarloMLE(precision, 1e-2)
    backend = ebm.MonteCarloMLE(precision, optax.adam(1e-2))
    with pytest.raises(ValueError, match=r"averaging = 1\.5"):
        backend.run(random.key(0), 2, ROWS, progress_bar=False, averaging=1.5)
    with pytest.raises(ValueError, match="every = 0"):
        ebm.Validation(ROWS, every=0)
    with pytest.raises(ValueError, match=r"\['num_chain'\]; expected"):
        ebm.Validation(ROWS, options={"num_chain": 4})
    with pytest.raises(ValueError, match=r"\['num_temperatures'\]; expected"):
        ebm.Validation(ROWS, options={"method": "base", "num_temperatures": 9})


def test_options_of_the_bracket_ask_for_the_bracket(monkeypatch):
    """Where draws of the base would do, options that they do not have count."""
    found = []
    whole = validation_module.log_normalizer

    def recorded(*args, **kwargs):
        found.append(whole(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(validation_module, "log_normalizer", recorded)

    def model(x):
        lam = numpyro.param("lam", 0.1)
        energy = ebm.bounded(lambda v: lam * v**2, 2.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, dist.Normal()), obs=x)

    options = {"num_temperatures": 8, "num_chains": 2, "num_walkers": 16}
    validation = ebm.Validation(ROWS, every=1, options=options)
    backend = ebm.MonteCarloMLE(model, optax.sgd(1e-3))
    backend.run(random.key(0), 1, ROWS, progress_bar=False, validation=validation)
    assert [log_z.method for log_z in found] == ["bracket"]


# Averages and validation


def jarzynski(model):
    return ebm.Jarzynski(model, optax.sgd(2e-3), num_chains=8, num_walkers=64)


def monte_carlo(model):
    return ebm.MonteCarloMLE(model, optax.sgd(2e-3))


@pytest.mark.parametrize("make", [jarzynski, monte_carlo])
def test_averages_are_those_of_the_updates(make):
    """Step by step: the mean of the first ones, then the exponential average."""
    backend = make(precision)
    options = {"progress_bar": False}
    fit = backend.run(random.key(0), 20, ROWS, averaging=0.9, **options)
    state, average = backend.init(random.key(0), ROWS), None
    update = jax.jit(backend.update)
    for count in range(20):
        state, _ = update(state, ROWS)
        u = float(state.params["lam"])
        share = max(0.1, 1 / (1 + count))
        average = u if average is None else (1 - share) * average + share * u
    assert float(np.log(fit.params["lam"])) == pytest.approx(average, abs=1e-5)
    assert abs(average - u) > 1e-4


def test_walkers_follow_the_average():
    """Weights and log Z of a Jarzynski state are those at the averages."""
    fit = jarzynski(precision).run(
        random.key(0), 60, ROWS, averaging=0.95, progress_bar=False
    )
    log_z = fit.state.log_normalizer()
    right = -0.5 * np.log(fit.params["lam"])
    assert abs(log_z.estimate["x"] - right) < 6 * log_z.stderr["x"]
    walkers = fit.state.walkers["x"]
    potential = 0.5 * fit.params["lam"] * walkers.values**2 + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(walkers.ensemble.potential, potential, atol=1e-4)


def test_the_best_validation_density_is_kept():
    """A rate that throws λ about: the fit is the look with the highest density."""
    valid = (RNG.normal(size=100) / 2).astype(np.float32)
    backend = ebm.MonteCarloMLE(precision, optax.sgd(4e-3), num_draws=64)
    exact = {"method": "quadrature"}
    fit = backend.run(
        random.key(0), 60, ROWS, progress_bar=False,
        validation=ebm.Validation(valid, every=10, options=exact),
    )  # fmt: skip
    seen = fit.history["density_validation"]
    assert np.flatnonzero(np.isfinite(seen)).tolist() == [9, 19, 29, 39, 49, 59]

    def density(lam, x):
        return 0.5 * np.log(lam / (2 * np.pi)) - 0.5 * lam * np.mean(
            x.astype(float) ** 2
        )

    best = int(np.nanargmax(seen))
    assert seen[best] == pytest.approx(
        density(float(fit.params["lam"]), valid), abs=1e-4
    )
    again = backend.run(random.key(0), best + 1, ROWS, progress_bar=False)
    assert again.params["lam"] == fit.params["lam"]
    trained = fit.history["density_training"][best]
    assert trained == pytest.approx(density(float(fit.params["lam"]), ROWS), abs=1e-4)


def flow():
    """A normal without latents, whose score is exact."""
    mean, scale = numpyro.param("mean", 0.0), numpyro.param("scale", 1.0)
    numpyro.sample("x", dist.Normal(mean, jnp.exp(scale) / jnp.e))


def vera(model):
    optim = optax.adam(5e-2, b1=0.0)
    return ebm.VERA(model, flow, optim, optim)


@pytest.mark.parametrize("make", [jarzynski, vera])
def test_other_backends_keep_their_best_look_too(make):
    """And the whole state of it: the run goes on from there bit for bit."""
    backend = make(precision)
    valid = 1.2 * ROWS[:100]
    fit = backend.run(
        random.key(0), 60, ROWS, progress_bar=False,
        validation=ebm.Validation(valid, every=10, options={"method": "quadrature"}),
    )  # fmt: skip
    best = int(np.nanargmax(fit.history["density_validation"]))
    assert best < 59
    again = backend.run(random.key(0), best + 1, ROWS, progress_bar=False)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(_numbers, fit.state),
        jax.tree.map(_numbers, again.state),
    )


def _numbers(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return random.key_data(leaf) if is_key else np.asarray(leaf)


def test_patience_ends_a_run():
    """Trained on rows that spread twice as far, the validation density only falls."""
    validation = ebm.Validation(
        ROWS, every=5, patience=2, options={"method": "quadrature"}
    )
    backend = ebm.MonteCarloMLE(precision, optax.sgd(1e-3))
    start = {"lam": 1 / np.mean(ROWS**2)}
    fit = backend.run(
        random.key(0), 10_000, 2 * ROWS, init_params=start, progress_bar=False,
        validation=validation,
    )  # fmt: skip
    assert len(fit.history["loss"]) == 5 * 4
    assert np.nanargmax(fit.history["density_validation"]) == 4


def test_validation_without_a_certificate_keeps_the_last_state():
    backend = ebm.MonteCarloMLE(precision, optax.sgd(1e-3))
    unbounded = {"method": "base", "num_walkers": 64}
    validation = ebm.Validation(ROWS, every=10, options=unbounded)
    with pytest.warns(UserWarning, match="No validation density was certified"):
        fit = backend.run(
            random.key(0), 20, ROWS, progress_bar=False, validation=validation
        )
    assert not np.any(np.isfinite(fit.history["density_validation"]))
    plain = backend.run(random.key(0), 20, ROWS, progress_bar=False)
    assert plain.params["lam"] == fit.params["lam"]


def test_priors_do_not_enter_a_validation():
    def model(x):
        rate = numpyro.sample("rate", dist.Gamma(50.0, 1.0))
        energy = ebm.EnergyDistribution(lambda v: (rate - 1) * v, dist.Exponential(1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.MonteCarloMLE(model, optax.sgd(0.0), num_draws=64)
    validation = ebm.Validation(SKEWED, every=1, options={"method": "quadrature"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = backend.run(
            random.key(0), 1, SKEWED, init_params={"rate": 2.0}, progress_bar=False,
            validation=validation,
        )  # fmt: skip
    right = np.log(2.0) - 2.0 * np.mean(SKEWED)
    assert fit.history["density_validation"][0] == pytest.approx(right, abs=1e-4)


def unseen_wells(x):
    """A well that the base's draws do not see, e^c deep."""
    h = numpyro.param("h", 12.0)
    well = ebm.bounded(lambda v: -h * jnp.exp(-0.5 * (v - 6.0) ** 2), 20.0)
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(well, dist.Normal(0.0, 1.0))
        numpyro.sample("x", energy, obs=x)


def test_a_look_is_certified_by_the_bound_and_by_the_rows():
    """Limits 10 nats apart, or a third of the rows where no draw came: no number."""
    backend = ebm.MonteCarloMLE(unseen_wells, optax.sgd(0.0))
    for x, options, reason in (
        (ROWS, {}, "limits by the energy's bound of 20"),
        (
            np.concatenate([ROWS, ROWS[:200] + 6]),
            {"tolerance": 50.0},
            "3[23]% of the rows",
        ),
    ):
        validation = ebm.Validation(x, every=1, options=options)
        with pytest.warns(UserWarning, match=reason):
            backend.run(
                random.key(0), 1, ROWS, progress_bar=False, validation=validation
            )


def test_conditional_rows_have_a_log_z_of_their_own():
    """As many validation rows as training rows, at other conditions."""
    c = RNG.normal(size=(2, 40)).astype(np.float32) + np.array(
        [[0.0], [3.0]], np.float32
    )
    x = (0.8 * c + 0.5 * RNG.normal(size=(2, 40))).astype(np.float32)

    fit = ebm.MonteCarloMLE(conditional, optax.sgd(0.0)).run(
        random.key(0), 1, x[0], c[0], progress_bar=False, init_params={"w": 3.0},
        validation=ebm.Validation(x[1], c[1], every=1, options={"method": "quadrature"}),
    )  # fmt: skip
    right = np.mean(-2 * (x - 0.75 * c) ** 2, axis=1) + 0.5 * np.log(2 / np.pi)
    assert fit.history["density_training"][0] == pytest.approx(right[0], abs=1e-3)
    assert fit.history["density_validation"][0] == pytest.approx(right[1], abs=1e-3)


def centred_on_its_rows(x):
    k = numpyro.param("k", 0.5)
    base = dist.Normal(x.mean(), x.std())
    energy = ebm.EnergyDistribution(ebm.bounded(lambda v: k * v, 5.0), base)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def test_a_base_of_the_rows_that_it_is_given_is_refused():
    """Validation rows would bring their own mean: another model."""
    backend = ebm.MonteCarloMLE(centred_on_its_rows, optax.sgd(0.0))
    validation = ebm.Validation(ROWS + 10, every=1)
    with pytest.raises(
        ValueError, match="computed from the rows that the model is given"
    ):
        backend.run(random.key(0), 1, ROWS, progress_bar=False, validation=validation)


def test_keywords_that_log_normalizer_takes_are_refused():
    def model(x, tolerance=1.0):
        precision(x)

    validation = ebm.Validation(ROWS, every=1)
    backend = ebm.MonteCarloMLE(model, optax.sgd(0.0))
    with pytest.raises(ValueError, match=r"keyword arguments \['tolerance'\]"):
        backend.run(random.key(0), 1, ROWS, tolerance=2.0, validation=validation)


def test_a_row_is_a_row_however_many_log_zs_it_has():
    """Three columns in one event: the density is their product's, as to_arviz has it."""
    x = (RNG.normal(size=(50, 3)) / 2).astype(np.float32)

    def model(x):
        s = numpyro.param("s", jnp.array([2.0, 3.0, 4.0]))
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * (s - 1) * v**2, dist.Normal(jnp.zeros(3), 1.0)
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy.to_event(1), obs=x)

    exact = {"method": "quadrature"}
    fit = ebm.MonteCarloMLE(model, optax.sgd(0.0)).run(
        random.key(0), 1, x, progress_bar=False,
        validation=ebm.Validation(x, every=1, options=exact),
    )  # fmt: skip
    rates = np.array([2.0, 3.0, 4.0])
    right = np.mean(
        np.sum(0.5 * np.log(rates / (2 * np.pi)) - 0.5 * rates * x**2, axis=1)
    )
    assert fit.history["density_validation"][0] == pytest.approx(right, abs=1e-3)


def test_walkers_are_led_to_an_average_that_is_far():
    """λ from 1 to 100 in 60 updates: its average is far from the last one.  Weights by one
    switch all the way left the exported draws with 0.6 of the model's variance."""
    y = (RNG.normal(size=400) / 10).astype(np.float32)
    backend = ebm.Jarzynski(precision, optax.adam(0.1), num_chains=8, num_walkers=64)
    fit = backend.run(random.key(0), 60, y, averaging=0.99, progress_bar=False)
    lam = float(fit.params["lam"])
    log_z = fit.state.log_normalizer()
    assert abs(log_z.estimate["x"] + 0.5 * np.log(lam)) < 5 * log_z.stderr["x"]
    assert log_z.khat["x"] < 0.7
    drawn = ebm.to_arviz(fit, precision, y)["posterior_predictive"]["x"].values
    # 512 walkers, of whose weights the ESS is over a half.
    assert lam * np.mean(drawn**2) == pytest.approx(1.0, abs=5 * np.sqrt(2 / 256))
