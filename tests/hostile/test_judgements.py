"""Places that look like a maximum of the likelihood and are none.

Each was found by an attack: the score test was silent, and `polish` stated an error.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("judgements")


def rng():
    return np.random.default_rng(1)


def rows_of(name, energy, x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample(name, energy, obs=x)


# Standard errors that grow on the way


def two_heaps(x):
    """h is the log weight of a second heap at 8, where there is no datum."""
    h = numpyro.param("h", 0.0)

    def energy(v):
        heaps = jnp.logaddexp(-0.5 * v**2, h - 0.5 * (v - 8.0) ** 2)
        return -heaps - 0.5 * v**2 / 9

    rows_of("x", ebm.EnergyDistribution(energy, dist.Normal(0.0, 3.0)), x)


def test_mass_where_no_row_is():
    """525 nats are lost, and the standard error at the end of the way there is endless."""
    x = rng().normal(size=400).astype(np.float32)
    at = {"h": jnp.array(1.0)}
    test = ebm.score_test(random.key(1), at, two_heaps, x)
    assert not test.is_at_maximum
    assert any("not at a maximum" in flag for flag in test.flags)
    assert test.gain_per_row == pytest.approx(np.log1p(np.e), abs=0.1)
    polished = ebm.polish(random.key(1), at, two_heaps, x, max_rounds=2)
    assert any("no maximum inside" in flag for flag in polished.flags)


def edge(x):
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    rows_of("x", ebm.EnergyDistribution(lambda v: lam * v**2, dist.Uniform(-1, 1)), x)


def test_a_maximum_at_the_end_of_a_parameters_range():
    """Uniform rows with a mean square over 1/3: λ = 0 is the best, 90 nats from λ = 1."""
    for seed in range(100):
        x = np.random.default_rng(seed).uniform(-1, 1, 2000).astype(np.float32)
        if 0.3 < (np.mean(x.astype(float) ** 2) - 1 / 3) / np.sqrt(4 / 45 / 2000) < 0.8:
            break
    test = ebm.score_test(random.key(0), {"lam": jnp.array(1.0)}, edge, x)
    assert not test.is_at_maximum
    polished = ebm.polish(random.key(0), {"lam": jnp.array(0.5)}, edge, x, max_rounds=2)
    assert any(
        "parameter 'lam' went where nothing depends" in f for f in polished.flags
    )


# Parameters that are hardly told apart, or not at all


def uncentred(x):
    b, c = numpyro.param("b", 0.0), numpyro.param("c", 0.0)
    energy = ebm.EnergyDistribution(lambda v: b * v + c * v**2, dist.Normal(300.0, 1.0))
    rows_of("x", energy, x)


def test_nearly_collinear_statistics():
    """Kelvin: b = −305 and c = ½ nearly cancel, 197 nats over b = −0.3 and c = 0."""
    x = (300.3 + 0.7 * rng().normal(size=2000)).astype(np.float32)
    at = {"b": jnp.array(300 - x.astype(float).mean()), "c": jnp.array(0.0)}
    test = ebm.score_test(random.key(0), at, uncentred, x)
    assert not test.is_at_maximum
    polished = ebm.polish(random.key(0), at, uncentred, x, max_rounds=2)
    assert polished.flags


def twins(x):
    a, b = numpyro.param("a", 0.3), numpyro.param("b", 0.0)
    energy = ebm.EnergyDistribution(lambda v: -(a + b) * v, dist.Normal(0.0, 1.0))
    rows_of("x", energy, x)


def test_twins_have_no_standard_error():
    x = rng().normal(size=400).astype(np.float32)
    half = jnp.array(x.mean() / 2)
    test = ebm.score_test(random.key(0), {"a": half, "b": half}, twins, x)
    assert test.is_at_maximum
    assert test.standard_errors["a"] == test.standard_errors["b"] == np.inf
    polished = ebm.polish(random.key(0), {"a": half, "b": half}, twins, x, max_rounds=1)
    assert polished.standard_errors["a"] == np.inf
    assert any("do not tell parameter 'a', 'b'" in flag for flag in polished.flags)


# Minima and saddles


def hump(x):
    mu = numpyro.param("mu", 0.0)
    flat, start = dist.ImproperUniform(constraints.real, (), ()), dist.Normal(0.0, 1.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * v**2 - jnp.log(jnp.cosh(mu * v)), flat, start=start
    )
    rows_of("x", energy, x)


def test_a_minimum_by_symmetry():
    """As a Boltzmann machine whose weights begin at 0: 527 nats under the maximum."""
    x = rng().normal(size=400).astype(np.float32) / 2 + np.repeat([2.0, -2.0], 200)
    x = (x - x.mean()).astype(np.float32)
    at = {"mu": jnp.array(0.0)}
    test = ebm.score_test(random.key(0), at, hump, x)
    assert any("curves up along parameter 'mu'" in flag for flag in test.flags)
    polished = ebm.polish(random.key(0), at, hump, x, max_rounds=1)
    assert any("curves up along parameter 'mu'" in flag for flag in polished.flags)
    away = ebm.score_test(random.key(0), {"mu": jnp.array(2.0)}, hump, x)
    assert not any("curves up" in flag for flag in away.flags)


# Held-out rows


def linear(x):
    b = numpyro.param("b", jnp.zeros(x.shape[1]))
    base = dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1)
    rows_of("x", ebm.EnergyDistribution(lambda v: -v @ b, base), x)


def test_the_gain_on_held_out_rows_has_no_noise_in_it():
    """Of 30 slopes: log Z is ½ |b|², so the gain at the test's own maximum is known."""
    x = rng().normal(size=(2600, 30)).astype(np.float32)
    fitted, held_out = x[:600], x[600:]
    test = ebm.score_test(
        random.key(0), {"b": jnp.zeros(30)}, linear, fitted, held_out=(held_out,),
        num_walkers=64,
    )  # fmt: skip
    b = np.asarray(test.newton["b"], float)
    right = b @ held_out.astype(float).mean(0) - 0.5 * b @ b
    # Uncorrected it would be 30 / 1,024 = 0.03 nats a row too high.
    assert test.gain_held_out == pytest.approx(right, abs=0.012)
    assert f"{test.gain_held_out:.3g} on held-out rows" in str(test)


def of_its_rows(x):
    b = numpyro.param("b", 0.0)
    base = dist.Normal(x.mean(), x.std())
    rows_of("x", ebm.EnergyDistribution(lambda v: -b * v, base), x)


def conditional(u, x):
    a = numpyro.param("a", 0.0)
    base = dist.Normal(0.0, 5.0).expand([len(u)])
    rows_of("x", ebm.EnergyDistribution(lambda v: 2 * (v - a * u) ** 2, base), x)


def test_held_out_rows_of_another_model_are_refused():
    x, other = rng().normal(size=(2, 200)).astype(np.float32)
    other = other + 0.6
    at = {"b": jnp.array(0.5)}
    with pytest.raises(
        ValueError, match="computed from the rows that the model is given"
    ):
        ebm.score_test(random.key(0), at, of_its_rows, x, held_out=(other,))
    u, v = rng().normal(size=(2, 40)).astype(np.float32)
    at = {"a": jnp.array(1.0)}
    with pytest.raises(ValueError, match="held-out rows are conditional"):
        ebm.score_test(random.key(0), at, conditional, u, u, held_out=(v, v))


def with_prior(x):
    rate = numpyro.sample("rate", dist.Gamma(50.0, 1.0))
    energy = ebm.EnergyDistribution(lambda v: (rate - 1) * v, dist.Exponential(1.0))
    rows_of("x", energy, x)


def test_priors_do_not_gain_on_held_out_rows():
    x = rng().exponential(size=(2, 200)).astype(np.float32)
    test = ebm.score_test(
        random.key(0), {"rate": jnp.array(1.5)}, with_prior, x[0], held_out=(x[1],)
    )
    rate, mean = float(test.newton["rate"]), float(x[1].mean())
    right = np.log(rate / 1.5) - (rate - 1.5) * mean
    assert test.gain_held_out == pytest.approx(right, abs=0.02)
