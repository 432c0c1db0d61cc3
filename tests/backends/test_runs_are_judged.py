"""What a run says of itself when it ends: at a maximum or not, and what its draws miss.

Runs here have learning rate 0, so that where they stand is known exactly.
"""

import re
import warnings
from functools import partial

import heaps
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from jax.nn import logsumexp
from numpyro.distributions import constraints
from scipy.stats import chi2

import ebm_ppl as ebm
from ebm_ppl.backends.jarzynski.warnings import held_out_draws
from ebm_ppl.backends.vera.reach import log_ratios
from ebm_ppl.training.optimizers import carries_on

BASE = dist.Normal(0, 1).expand([2]).to_event(1)
NUM_ROWS = 400
# Skewed data: the model is a Gaussian all the same, whose maximum the moments give.
DATA = np.random.default_rng(0).gamma(2.0, 0.5, size=(NUM_ROWS, 2)).astype(np.float32)
VARIANCE = DATA.var(0)
MAXIMUM = {
    "slope": jnp.asarray(DATA.mean(0) / VARIANCE),
    "precision": jnp.asarray(1.0 / VARIANCE),
}
STILL = optax.sgd(0.0)
NUM_UPDATES = 200
KEYS = random.split(random.key(1), 32)


def model(x):
    """N(slope / precision, 1 / precision)."""
    slope = numpyro.param("slope", jnp.zeros(2))
    precision = numpyro.param("precision", jnp.ones(2), constraint=constraints.positive)

    def energy(v):
        return jnp.sum(0.5 * (precision - 1.0) * v**2 - slope * v, -1)

    with numpyro.plate("data", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, BASE), obs=x)


def generator(params):
    """The model's own density at these parameters, from two latents and little noise."""

    def program():
        deviation = numpyro.param("deviation", params["precision"] ** -0.5)
        mean = numpyro.param("mean", params["slope"] / params["precision"])
        noise = 0.2 * jnp.min(params["precision"] ** -0.5)
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        weight = jnp.sqrt(deviation**2 - noise**2)
        numpyro.sample("x", dist.Normal(mean + weight * z, noise).to_event(1))

    return program


def flow(params):
    """The same without latents."""

    def program():
        deviation = numpyro.param("deviation", params["precision"] ** -0.5)
        mean = params["slope"] / params["precision"]
        numpyro.sample("x", dist.Normal(mean, deviation).to_event(1))

    return program


def vera(params, program=generator, **options):
    return ebm.VERA(model, program(params), STILL, STILL, **options)


def jarzynski(params):
    return ebm.Jarzynski(
        model, STILL, num_chains=16, num_walkers=64, num_holdout_chains=8
    )


def said(backend, params, rows=DATA):
    """Warnings of a run that stands still at ``params``."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = backend.run(
            random.key(0), NUM_UPDATES, rows, init_params=params, progress_bar=False
        )
    return fit, [str(w.message) for w in told if w.category is UserWarning]


BACKENDS = [jarzynski, vera, partial(vera, program=flow)]


@pytest.mark.parametrize("backend", BACKENDS, ids=["jarzynski", "vera", "flow"])
def test_a_run_at_the_maximum_is_silent(backend):
    assert said(backend(MAXIMUM), MAXIMUM)[1] == []


@pytest.mark.parametrize("backend", BACKENDS, ids=["jarzynski", "vera", "flow"])
def test_a_run_that_ends_elsewhere_says_how_far(backend):
    """The first slope is off by eight standard errors: of (slope, precision) of one
    coordinate the covariance is the inverse of N Cov(x, −½ x²), on the log scale of the
    precision."""
    p, s = (np.asarray(MAXIMUM[k], float)[0] for k in ("precision", "slope"))
    mean, variance = s / p, 1.0 / p
    cross = -mean * variance * p
    square = (mean**2 * variance + 0.5 * variance**2) * p**2
    information = NUM_ROWS * np.array([[variance, cross], [cross, square]])
    error = np.sqrt(np.linalg.inv(information)[0, 0])
    away = MAXIMUM | {"slope": MAXIMUM["slope"] - jnp.array([8.0 * error, 0.0])}
    _, told = said(backend(away), away)
    assert len(told) == 1
    assert "parameter 'slope'" in told[0]
    found, noise = map(
        float, re.search(r"is ([\d.]+) ± ([\d.]+) of its", told[0]).groups()
    )
    # Printed to a decimal.
    assert abs(found - 8.0) < 4 * noise + 0.1


def precision_run(factor, rows, num_walkers=64):
    """A run that stands still at so many times the precision that ``rows`` have."""
    best = 1.0 / float(np.mean(rows.astype(float) ** 2))

    def precision(x):
        k = numpyro.param("k", 1.0, constraint=constraints.positive)
        flat = dist.ImproperUniform(constraints.real, (), ())
        energy = lambda v: 0.5 * k * v**2  # noqa: E731
        with numpyro.plate("data", len(x)):
            start = dist.Normal(0.0, 1.0)
            site = ebm.EnergyDistribution(energy, flat, start=start)
            numpyro.sample("x", site, obs=x)

    backend = ebm.Jarzynski(
        precision,
        STILL,
        num_chains=16,
        num_walkers=num_walkers,
        num_holdout_chains=8,
    )
    return said(backend, {"k": factor * best}, rows)


@pytest.mark.parametrize("factor", [2.0, 2.5])
def test_a_run_far_away_is_told_by_its_slope(factor):
    """A normal too narrow by half: reweighted to the maximum, its draws have no finite
    variance, but the slope where they stand is (1 − factor) √(N/2) exactly."""
    rows = DATA.ravel()
    fit, told = precision_run(factor, rows, num_walkers=256)
    (text,) = told
    assert fit.findings == (text,)
    found, noise = map(
        float, re.search(r"is ([\d.]+) ± ([\d.]+) of its .* by its", text).groups()
    )
    expected = (factor - 1.0) * np.sqrt(len(rows) / 2)
    # Of 2,048 squares of normals the root of the variance has this relative error.
    spread = 0.5 * np.sqrt((15 - 1) / 2048)
    assert abs(found - expected) < 4 * np.hypot(noise, spread * expected)
    # The mean of 2,048 of them, from eight islands: χ of 7 at 10⁻³ on either side, and
    # printed to a decimal
    ratio = noise / np.sqrt(len(rows) / 2048)
    low, high = np.sqrt(chi2.ppf([1e-3, 1 - 1e-3], 7) / 7)
    assert low - 0.1 < ratio < high + 0.1


def test_a_run_that_cannot_tell_says_so_in_the_fit():
    """Many more rows than draws: the maximum itself cannot be told from its
    neighbourhood, which is no reason to warn."""
    rows = np.tile(DATA.ravel(), 20)
    fit, told = precision_run(1.0, rows)
    assert not told
    (finding,) = fit.findings
    assert "Whether this is a maximum was not told" in finding
    assert "parameter 'k'" in finding
    assert finding in str(fit)


def test_weights_make_up_for_a_generator_that_is_near():
    """Its variance is 1.4 times the model's: equal weights would call it far."""
    wide = {name: 0.7 * value for name, value in MAXIMUM.items()}
    fit, told = said(vera(wide), MAXIMUM)
    assert 0.8 < fit.history["generator_ess"]["x"].mean() < 0.97
    assert told == []


@pytest.mark.parametrize("ess_threshold", [0.0, 1.0], ids=["never", "always"])
def test_held_out_walkers_carry_log_z(ess_threshold):
    """Their mean weight is the mean of the held-out islands' Ẑ, while the parameters
    move, whether or not they resample."""
    backend = ebm.Jarzynski(
        model,
        optax.adam(0.02),
        num_chains=8,
        num_walkers=64,
        ess_threshold=ess_threshold,
    )
    fit = backend.run(random.key(0), 60, DATA, progress_bar=False)
    walkers = fit.state.walkers["x"]
    draws = held_out_draws(fit.state.walkers)["x"]
    islands = walkers.ensemble.log_normalizers[walkers.num_training_chains :]
    assert len(draws.log_weight) == len(islands) == walkers.num_holdout_chains
    assert float(jnp.std(draws.log_weight)) > 0.01
    mean = logsumexp(draws.log_weight) - np.log(draws.log_weight.size)
    expected = logsumexp(islands) - np.log(len(islands))
    assert float(mean) == pytest.approx(float(expected), abs=1e-4)
    np.testing.assert_array_equal(
        draws.values, walkers.values[walkers.num_training_chains :]
    )


def test_a_penalty_is_named():
    away = MAXIMUM | {"precision": 0.5 * MAXIMUM["precision"]}
    _, told = said(vera(away, gradient_penalty=1.0), away)
    assert any("gradient_penalty = 1.0 makes this a penalised fit" in t for t in told)


def test_draws_that_are_not_the_models_are_told():
    """A generator four times too narrow: ESS of exp(−U) / q̂ and rows out of reach."""
    narrow = MAXIMUM | {"precision": 16.0 * MAXIMUM["precision"]}
    narrow["slope"] = 16.0 * MAXIMUM["slope"]
    _, told = said(vera(narrow), MAXIMUM)
    assert any("draws for energy site 'x' are not the model's" in t for t in told)
    assert any("does not reach" in t and "of the data rows" in t for t in told)


def test_a_mode_without_a_draw_is_told():
    """Two heaps at ±3; the generator is the lower one.  Weights exp(−U) / q̂ are all equal
    there: their effective sample sees nothing."""
    x = heaps.rows(NUM_ROWS, 0.3)
    backend = ebm.VERA(heaps.model, heaps.lower, STILL, STILL, importance_weights=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = backend.run(random.key(0), NUM_UPDATES, x, progress_bar=False)
    assert fit.history["generator_ess"]["x"].mean() > 0.99
    texts = [str(w.message) for w in told if w.category is UserWarning]
    assert any("does not reach 30% of the data rows" in text for text in texts)


def test_short_runs_are_not_judged():
    away = MAXIMUM | {"slope": MAXIMUM["slope"] + 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vera(away).run(random.key(0), 20, DATA, init_params=away, progress_bar=False)


def bent():
    """x = 3 tanh(2 z) and little noise: two heaps that hang together by a thread."""
    z = numpyro.sample("z", dist.Normal(0, 1))
    gain = numpyro.param("gain", 2.0)
    mean = 3.0 * jnp.tanh(gain * z) * jnp.array([1.0, 0.3])
    numpyro.sample("x", dist.Normal(mean, 0.15).to_event(1))


def test_the_density_of_rows_that_were_not_drawn():
    """log q̂ + U + bound, against q by quadrature over z."""
    state = ebm.VERA(model, bent, STILL, STILL).init(
        random.key(0), DATA, init_params=MAXIMUM
    )
    rows = jnp.array(
        [[0.0, 0.0], [2.9, 0.9], [-3.1, -0.8], [1.0, 0.1], [2.0, -1.0], [5.0, 3.0]]
    )
    energy = ebm.EnergyDistribution(lambda v: jnp.sum(v**2, -1), BASE)
    score = ebm.ImportanceScore()
    found = [log_ratios(key, state, energy, score, rows) for key in KEYS]
    found = np.asarray(found, float)

    z = np.linspace(-8, 8, 100_001)
    mean = 3.0 * np.tanh(2.0 * z)[:, None] * np.array([1.0, 0.3])
    log_prior = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    for row, values in zip(np.asarray(rows, float), found.T, strict=True):
        log_x = -0.5 * np.sum((row - mean) ** 2, 1) / 0.15**2
        joint = log_prior + log_x - np.log(2 * np.pi * 0.15**2)
        log_q = (
            np.log(np.sum(np.exp(joint - joint.max())) * (z[1] - z[0])) + joint.max()
        )
        potential = 1.5 * np.sum(row**2) + np.log(2 * np.pi)
        ratio = np.exp(values - log_q - potential - float(state.log_normalizer_bound))
        # q̂ is unbiased; float32 carries log q̂ to 1e-5 of its size.
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(KEYS)) + 0.01
        assert ratio.std() < 0.5


def test_the_density_of_rows_far_from_every_draw_in_six_dimensions():
    """x_i = 3 tanh(2 z_i) and noise: a product of densities by quadrature over each z_i,
    whose latents no draw of the prior comes near, nor one Gauss–Newton step from there."""
    size, noise = 6, 0.3
    base = dist.Normal(0.0, 2.0).expand([size]).to_event(1)
    rng = np.random.default_rng(4)
    x = 3.0 * np.tanh(2.0 * rng.normal(size=(40, size)))
    x = (x + noise * rng.normal(size=x.shape)).astype(np.float32)

    def bent():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([size]).to_event(1))
        gain = numpyro.param("gain", 2.0)
        numpyro.sample("x", dist.Normal(3.0 * jnp.tanh(gain * z), noise).to_event(1))

    def bowl(x):
        depth = numpyro.param("depth", 0.0)
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda v: depth * jnp.sum(v**2, -1), base)
            numpyro.sample("x", energy, obs=x)

    state = ebm.VERA(bowl, bent, STILL, STILL).init(random.key(0), x)
    energy = ebm.EnergyDistribution(lambda v: 0.0 * jnp.sum(v, -1), base)
    found = log_ratios(random.key(1), state, energy, ebm.ImportanceScore(), x)

    z = np.linspace(-6, 6, 20_001)
    away = (x.astype(float)[..., None] - 3.0 * np.tanh(2.0 * z)) / noise
    joint = -0.5 * (away**2 + z**2) - np.log(2 * np.pi * noise)
    log_q = np.log(np.sum(np.exp(joint), -1) * (z[1] - z[0])).sum(-1)
    exact = log_q - base.log_prob(x) + state.log_normalizer_bound
    # Where tanh saturates, the posterior of z_i is no normal, and proposals cover it
    # roughly: near enough for an alarm at -3.
    over = np.asarray(found - exact)
    assert over.min() > -2.5
    assert np.mean(np.abs(over) < 1.5) > 0.9


def test_generators_that_are_not_normal_are_not_searched():
    def heavy():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        scale = numpyro.param("scale", 0.5, constraint=constraints.interval(0.1, 1.0))
        numpyro.sample("x", dist.Laplace(z, scale).to_event(1))

    state = ebm.VERA(model, heavy, STILL, STILL).init(
        random.key(0), DATA, init_params=MAXIMUM
    )
    assert (
        log_ratios(random.key(1), state, BASE, ebm.ImportanceScore(), jnp.zeros((3, 2)))
        is None
    )


@pytest.mark.parametrize(
    ("optim", "has_momentum"),
    [
        (optax.adam(1e-2, b1=0.0), False),
        (optax.rmsprop(1e-2), False),
        (optax.adamw(1e-2, b1=0.0, weight_decay=0.1), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2)), False),
        (optax.adam(1e-2), True),
        (optax.sgd(1e-2, momentum=0.9), True),
    ],
)
def test_momentum_is_seen(optim, has_momentum):
    params = {"a": jnp.ones(3), "b": jnp.zeros(())}
    assert carries_on(optim, params) == has_momentum


def test_momentum_is_told():
    backend = ebm.VERA(model, generator(MAXIMUM), optax.adam(1e-2), STILL)
    with pytest.warns(UserWarning, match="^optim has momentum"):
        backend.init(random.key(0), DATA)


def test_a_check_that_fails_does_not_cost_the_fit(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ebm.Jarzynski, "_findings", broken)
    with pytest.warns(UserWarning, match="could not be checked: RuntimeError: out of"):
        fit = jarzynski(MAXIMUM).run(random.key(0), 3, DATA, progress_bar=False)
    assert len(fit.history["loss"]) == 3


def test_a_batch_in_a_plate_of_more_rows_is_judged_as_it_is():
    """``plate(size, subsample_size)`` around the rows of one batch: at full size the
    plate would not fit them."""

    def batched(x):
        slope = numpyro.param("slope", MAXIMUM["slope"] - 1.0)

        def energy(v):
            return jnp.sum(0.5 * (MAXIMUM["precision"] - 1.0) * v**2 - slope * v, -1)

        with numpyro.plate("data", 4 * len(x), subsample_size=len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, BASE), obs=x)

    backend = ebm.Jarzynski(batched, STILL, num_holdout_chains=8)
    with pytest.warns(UserWarning, match="parameter 'slope' is"):
        backend.run(random.key(0), NUM_UPDATES, DATA, progress_bar=False)
