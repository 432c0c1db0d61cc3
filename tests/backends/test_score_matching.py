"""Score matching against minima in closed form."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.backends.score_matching.losses import (
    denoising_loss,
    exact_loss,
    sliced_loss,
)

pytestmark = pytest.mark.xdist_group("score_matching")

RNG = np.random.default_rng(0)
ROWS = (0.3 + RNG.normal(size=400) / 2).astype(np.float32)
SKEWED = RNG.gamma(2.0, 0.5, size=400).astype(np.float32)
RATE = optax.cosine_decay_schedule(5e-2, 600)
FLAT = dist.ImproperUniform(constraints.real, (), ())


def fit_of(model, *args, **options):
    backend = ebm.ScoreMatching(model, optax.adam(RATE), **options)
    return backend.run(random.key(0), 600, *args, progress_bar=False)


def loss_at_start(model, *args, **options):
    backend = ebm.ScoreMatching(model, optax.sgd(0.0), **options)
    fit = backend.run(random.key(0), 1, *args, progress_bar=False)
    return float(fit.history["loss"][0])


def precision(x, base=FLAT):
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(lambda v: 0.5 * lam * v**2, base)
        numpyro.sample("x", energy, obs=x)


def quartic(x):
    """Skewed: U = a v⁴ / 4 − b v + ½ ((v − ½) / 1.5)²."""
    a, b = numpyro.param("a", 0.5), numpyro.param("b", 0.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * a * v**4 - b * v, dist.Normal(0.5, 1.5)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def gamma(x):
    """x^k e^(−βx) on an exponential base of rate 1."""
    k, beta = numpyro.param("k", 0.5), numpyro.param("beta", 0.5)
    energy = ebm.EnergyDistribution(
        lambda v: -(k - 1) * jnp.log(v) + (beta - 1) * v, dist.Exponential(1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


# Minima


def test_a_precision_on_an_improper_base():
    """½λ²x² − λ is least at λ = 1 / mean x²; half of λ²x² alone, at 0."""
    fit = fit_of(precision, ROWS)
    right = 1 / np.mean(ROWS**2)
    assert fit.params["lam"] == pytest.approx(right, rel=1e-3)
    assert fit.history["loss"][-1] == pytest.approx(-len(ROWS) * right / 2, rel=1e-3)


def test_a_skewed_quartic():
    """Of parameters that enter linearly the loss is a quadratic form."""
    x = SKEWED.astype(float)
    slopes = np.stack([x**3, -np.ones_like(x)])  # of a and of b
    of_base = (x - 0.5) / 1.5**2
    curvatures = np.array([np.sum(3 * x**2), 0.0])
    right = np.linalg.solve(slopes @ slopes.T, curvatures - slopes @ of_base)

    fit = fit_of(quartic, SKEWED)
    found = [fit.params["a"], fit.params["b"]]
    np.testing.assert_allclose(found, right, rtol=5e-3)

    slope = 0.5 * x**3 - 0.5 + of_base
    loss = 0.5 * slope**2 - 1.5 * x**2 - 1 / 1.5**2
    assert loss_at_start(quartic, SKEWED) == pytest.approx(np.sum(loss), rel=1e-5)


def test_a_half_line_is_matched_in_logs():
    """In log x the fit of a gamma density is that by moments: k = m²/v, β = m/v."""
    fit = fit_of(gamma, SKEWED)
    mean, variance = np.mean(SKEWED), np.var(SKEWED)
    assert fit.params["k"] == pytest.approx(mean**2 / variance, rel=5e-3)
    assert fit.params["beta"] == pytest.approx(mean / variance, rel=5e-3)


def test_noise_widens_what_is_fitted():
    """By denoising λ is that of the data and the noise: 1 / (mean x² + σ²)."""
    x = np.tile(ROWS, 25)
    fit = fit_of(precision, x, method="denoising", noise_scale=0.5)
    right = 1 / (np.mean(ROWS**2) + 0.25)
    # 120 updates of the last fifth, of 10,000 rows each: mean of 1.2e6 squares.
    assert fit.params["lam"] == pytest.approx(right, rel=5 * np.sqrt(2 / 1.2e6) + 1e-3)


# Rows


CORRELATED = jnp.array([[2.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 0.7]])


def correlated():
    base = dist.ImproperUniform(constraints.real_vector, (), (3,))
    return ebm.EnergyDistribution(
        lambda v: 0.5 * jnp.sum(v @ CORRELATED * v, -1) + jnp.sum(v**4, -1) / 12, base
    )


X3 = RNG.normal(size=(5, 3)).astype(np.float32)


def exact_by_hand(x):
    slope = x @ np.asarray(CORRELATED) + x**3 / 3
    return 0.5 * np.sum(slope**2, 1) - np.trace(CORRELATED) - np.sum(x**2, 1)


def test_the_trace_is_that_of_the_hessian():
    found = exact_loss(correlated())(jnp.asarray(X3))
    np.testing.assert_allclose(found, exact_by_hand(X3), rtol=1e-5)


def test_slices_average_to_the_trace():
    """vᵀHv = tr H + 2 Σ H_ij v_i v_j, of variance 4 Σ H_ij²."""
    num = 4000
    loss = sliced_loss(correlated(), random.key(1), num)(jnp.asarray(X3))
    error = np.sqrt(4 * (0.8**2 + 0.3**2) / num)
    deviation = np.asarray(loss) - exact_by_hand(X3)
    assert np.max(np.abs(deviation)) < 4 * error
    assert np.max(np.abs(deviation)) > 1e-3 * error  # signs are drawn


def test_denoising_by_hand():
    key, scale = random.key(2), 0.3
    noise = np.asarray(random.normal(key, X3.shape))
    there = X3 + scale * noise
    slope = there @ np.asarray(CORRELATED) + there**3 / 3
    right = 0.5 * np.sum((noise - scale * slope) ** 2, 1)
    found = denoising_loss(correlated(), key, scale)(jnp.asarray(X3))
    np.testing.assert_allclose(found, right, rtol=1e-4)


def test_elements_have_losses_of_their_own():
    """A batch shape, and an event of two dimensions."""
    scale = jnp.array([[1.0], [2.0]])
    base = dist.Normal(jnp.zeros((2, 1, 3)), 1.0).to_event(2)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * scale[:, 0] * jnp.sum(v**2, (-2, -1)), base
    )
    x = RNG.normal(size=(4, 2, 1, 3)).astype(np.float32)
    precision = 1 + np.asarray(scale[:, 0])
    squares = np.sum(x**2, (-2, -1))
    right = 0.5 * precision**2 * squares - 3 * precision
    np.testing.assert_allclose(exact_loss(energy)(x), right, rtol=1e-5)


def test_masks_and_plates_keep_their_meaning():
    def masked(x, keep):
        with handlers.mask(mask=keep):
            gamma(x)

    keep = np.arange(400) % 3 > 0
    filled = np.where(keep, SKEWED, -99.0).astype(np.float32)
    alone = loss_at_start(gamma, SKEWED[keep])
    assert loss_at_start(masked, filled, keep) == pytest.approx(alone, rel=1e-5)

    def part(x):
        with numpyro.plate("rows", 400, subsample_size=len(x)):
            lam = numpyro.param("lam", 1.0)
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: 0.5 * lam * v**2, FLAT), obs=x
            )

    whole = loss_at_start(precision, ROWS[:100])
    assert loss_at_start(part, ROWS[:100]) == pytest.approx(4 * whole, rel=1e-5)


def test_one_energy_for_each_row_of_a_batch():
    """E(y | x) with a log Z for each row, whose plate is subsampled: y | x ~ N(w x, 1)."""
    x = RNG.normal(size=200).astype(np.float32)
    y = (1.5 * x + RNG.normal(size=200)).astype(np.float32)

    def model(x, y):
        w = numpyro.param("w", 0.0)
        with numpyro.plate("rows", len(x), subsample_size=50):
            x, y = numpyro.subsample(x, 0), numpyro.subsample(y, 0)
            base = dist.Normal(jnp.zeros(len(x)), 1.0)
            numpyro.sample(
                "y", ebm.EnergyDistribution(lambda v: -w * x * v, base), obs=y
            )

    right = np.sum(x * y) / np.sum(x**2)
    fit = fit_of(model, x, y)
    # Batches of a quarter of the rows, over some 120 updates of the last fifth.
    error = np.std(x * (y - right * x)) / np.mean(x**2) / np.sqrt(50 * 120)
    assert abs(fit.params["w"] - right) < 5 * error + 1e-3


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hessian"}, "method = 'hessian'; expected one of"),
        ({"num_slices": 0}, "num_slices = 0; expected at least 1"),
        ({"method": "denoising"}, "noise_scale = None; method='denoising' needs"),
        ({"noise_scale": 0.1}, "noise_scale = 0.1 has no meaning for method='exact'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ebm.ScoreMatching(precision, optax.sgd(0.1), **options)


def test_a_discrete_support_is_refused():
    def model(x):
        a = numpyro.param("a", 0.0)
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: a * v, dist.Bernoulli(0.5)), obs=x
        )

    with pytest.raises(ValueError, match=r"'x' has a discrete support.*MonteCarloMLE"):
        ebm.ScoreMatching(model, optax.sgd(0.1)).init(random.key(0), 1)


def test_a_loss_that_still_falls_is_told():
    backend = ebm.ScoreMatching(precision, optax.adam(1e-3))
    fit = backend.run(random.key(0), 400, ROWS, progress_bar=False)
    (finding,) = fit.findings
    assert "The loss still fell by" in finding
    assert "nats" not in finding


ROUGH = {
    "smooth": (lambda v: jnp.sqrt(v**2 + 0.1), None),
    "steep": (lambda v: jax.nn.softplus(8 * v), None),
    "kinks": (jnp.abs, "of that (root mean squares), which is at kinks"),
    "kinks that cancel": (
        lambda v: jnp.abs(v) * jnp.array([1.0, -1.0]),
        "of that (root mean squares), which is at kinks",
    ),
    "jumps": (lambda v: v**2 + (v > 0.5), "the energy jumps around the data"),
    "walls": (
        lambda v: jnp.where(v > -0.5, v**2, jnp.inf),
        "the energy is infinite next to the data",
    ),
}


@pytest.mark.parametrize("kind", ROUGH)
def test_what_derivatives_do_not_show_is_told(kind):
    """Laplace's density has a second derivative of 0 but at 0; and so on."""
    energy_of, message = ROUGH[kind]

    def model(x):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            base = dist.Normal(jnp.zeros(2), 3.0).to_event(1)
            energy = ebm.EnergyDistribution(lambda v: rate * energy_of(v).sum(-1), base)
            numpyro.sample("x", energy, obs=x)

    x = RNG.laplace(size=(500, 2)).astype(np.float32)
    if kind == "walls":
        x = np.abs(x)
    backend = ebm.ScoreMatching(model, optax.adam(1e-2), method="sliced")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        backend.run(random.key(0), 60, x, progress_bar=False)
    messages = [str(w.message) for w in told]
    if message is None:
        assert messages == []
    else:
        (found,) = messages
        assert message in found
