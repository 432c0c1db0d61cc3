"""Bounded energies, and log Z by draws of the base."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.tree_util import Partial
from numpyro.distributions import constraints
from scipy.stats import binom

import ebm_ppl as ebm
from ebm_ppl.energy.bounded import bound_of
from ebm_ppl.normalizer.by_base import chernoff_limits

pytestmark = pytest.mark.xdist_group("bounded")

BASE = dist.Normal(0.0, 1.0)
GRID = np.linspace(-10, 10, 40_001)
# A skewed energy that comes near to both of its bounds.
SKEWED = ebm.bounded(lambda v: 2.0 * v + 0.7 * v**2 - 0.2 * v**3, 3.0)
LIMIT = 3.0


def by_grid(energy):
    weights = np.exp(-0.5 * GRID**2) / np.sqrt(2 * np.pi) * (GRID[1] - GRID[0])
    return float(np.log(np.sum(weights * np.exp(-np.asarray(energy(GRID), float)))))


LOG_Z = by_grid(SKEWED)


def base_of(energy, seed=0, base=BASE, **options):
    distribution = ebm.EnergyDistribution(energy, base)
    return ebm.log_normalizer(random.key(seed), distribution, method="base", **options)


# The wrapper


def test_values_stay_inside_and_small_ones_stay():
    energy = ebm.bounded(lambda v: v**3, 2.0)
    v = jnp.array([-1e6, -0.05, 0.0, 0.05, jnp.inf])
    np.testing.assert_allclose(
        energy(v), [-2.0, -(0.05**3), 0.0, 0.05**3, 2.0], rtol=1e-6
    )


def test_bounds_of_factors_add_up():
    both = {"a": ebm.bounded(jnp.sin, 1.5), "b": ebm.bounded(Partial(jnp.cos), 2.0)}
    assert bound_of(ebm.EnergyDistribution(both, BASE).factors) == 3.5
    one = both | {"c": jnp.abs}
    assert bound_of(ebm.EnergyDistribution(one, BASE).factors) is None


def test_arrays_of_a_partial_stay_leaves():
    energy = ebm.bounded(Partial(lambda a, v: a * v, jnp.array(2.0)), 5.0)
    assert isinstance(energy, Partial)
    assert energy(0.01) == pytest.approx(0.02, rel=1e-4)


def test_a_change_inside_is_seen():
    class Weight:
        value = 1.0

    weight = Weight()
    distribution = ebm.EnergyDistribution(
        ebm.bounded(lambda v: weight.value * v**2, LIMIT), BASE
    )
    found = []
    for value in (0.5, 2.0):
        weight.value = value
        log_z = ebm.log_normalizer(random.key(0), distribution, method="base")
        found.append(float(log_z))
        right = by_grid(lambda v: LIMIT * np.tanh(weight.value * v**2 / LIMIT))
        assert abs(found[-1] - right) < 5 * log_z.stderr["x"]
    assert abs(found[0] - found[1]) > 0.1


@pytest.mark.parametrize(
    ("energy", "bound", "error", "message"),
    [
        ({"a": jnp.sin}, 1.0, TypeError, "bound each by itself"),
        (3.0, 1.0, TypeError, "expected a callable"),
        (jnp.sin, -1.0, ValueError, "bound = -1.0"),
        (jnp.sin, np.inf, ValueError, "bound = inf"),
        (jnp.sin, None, TypeError, "bound is a NoneType"),
    ],
)
def test_bad_input(energy, bound, error, message):
    with pytest.raises(error, match=message):
        ebm.bounded(energy, bound)


# Errors that are known before anything is run


def test_limits_hold_in_a_thousand_repeats():
    """Each of the two limits fails with probability 2.5% at most; and the spread is
    within sinh(c) / √n, and within √(e^c / (n Z))."""
    num, repeats = 200, 1000
    rng = np.random.default_rng(0)
    weights = np.exp(-np.asarray(SKEWED(rng.normal(size=(repeats, num))), float))
    means = np.mean(weights, axis=1)
    lower, upper = chernoff_limits(np.log(means), LIMIT, num)
    allowed = binom.ppf(0.999, repeats, 0.025)
    assert np.sum(lower > LOG_Z) <= allowed
    assert np.sum(upper < LOG_Z) <= allowed
    assert np.all((lower > -LIMIT - 1e-9) & (upper < LIMIT + 1e-9))

    spread = np.std(means) / np.exp(LOG_Z)
    assert spread < np.sinh(LIMIT) / np.sqrt(num)
    assert spread < np.sqrt(np.exp(LIMIT - LOG_Z) / num)


def test_limits_are_sharp_where_weights_are_at_the_bounds():
    """Weights 0 or e^c: the mean is binomial, and the limits fail nearly as allowed."""
    num, repeats, share = 500, 1000, 0.02
    counts = np.random.default_rng(1).binomial(num, share, size=repeats)
    means = np.log(np.maximum(counts, 1e-12) / num) + LIMIT
    lower, upper = chernoff_limits(means, LIMIT, num)
    right = LIMIT + np.log(share)
    allowed = binom.ppf(0.999, repeats, 0.025)
    for failed in (np.sum(lower > right), np.sum(upper < right)):
        assert failed <= allowed
        assert failed >= 1


def test_limits_of_what_is_no_number():
    for limits in chernoff_limits(np.array([np.nan, 0.0]), LIMIT, 100):
        assert np.isnan(limits[0])
        assert np.isfinite(limits[1])


# log Z by the base


@pytest.mark.parametrize("seed", range(3))
def test_log_z_is_that_of_a_grid(seed):
    log_z = base_of(SKEWED, seed)
    assert log_z.is_certified
    assert log_z.method == "base"
    assert abs(float(log_z) - LOG_Z) < 5 * log_z.stderr["x"]
    assert log_z.lower["x"] < LOG_Z < log_z.upper["x"]
    assert log_z.upper["x"] - log_z.lower["x"] < 1.0


def test_coverage_of_the_interval():
    """90% intervals over 16 islands of 64 draws cover 100 times as often as a binomial."""
    inside = 0
    for seed in range(100):
        log_z = base_of(SKEWED, seed, num_walkers=64, tolerance=10.0)
        low, high = log_z.interval()["x"]
        inside += bool(low < LOG_Z < high)
    assert binom.ppf(0.001, 100, 0.9) <= inside <= binom.ppf(0.999, 100, 0.9)


def test_too_few_draws_are_flagged_and_none_are_chosen_so():
    few = base_of(SKEWED, num_chains=2, num_walkers=16)
    assert "limits by the energy's bound of 3 are" in few.flags["x"][0]
    with pytest.raises(ebm.UncertifiedNormalizerError):
        float(few)
    assert base_of(SKEWED).num_evaluations >= 2**15


def test_a_well_outside_the_draws_reach_cannot_matter():
    """Depth 30 at 8 standard deviations: 10⁻¹⁵ of the base, e^15 of the unbounded Z.

    Bounded by 3 it holds e^3 × 10⁻¹⁵ at most, and the certificate is right.  Without a
    bound draws of the base see nothing, and say so.
    """

    def well(v):
        return -60.0 * jnp.exp(-0.5 * ((v - 8.0) / 0.1) ** 2)

    kept = base_of(ebm.bounded(well, 3.0))
    right = by_grid(lambda v: 3.0 * np.tanh(np.asarray(well(v), float) / 3.0))
    assert kept.is_certified
    assert abs(right) < 1e-9
    assert kept.lower["x"] < right < kept.upper["x"]

    lost = base_of(well)
    assert by_grid(well) > 10
    assert lost.estimate["x"] == pytest.approx(0.0, abs=1e-6)
    assert not lost.is_certified
    assert any("the energy has no bound" in flag for flag in lost.flags["x"])


def test_a_start_beside_the_base_is_no_bound():
    """The draws are the start's then, and their weights have base / start in them."""
    distribution = ebm.EnergyDistribution(SKEWED, BASE, start=dist.Normal(0.0, 0.3))
    log_z = ebm.log_normalizer(random.key(0), distribution, method="base")
    assert not log_z.is_certified


def test_every_site_element_and_draw():
    """Rates of three columns at four draws: E = c tanh(r s v² / c)."""
    rates = jnp.array([0.2, 1.0, 4.0])

    def model(x=None):
        s = numpyro.param("s", 1.0, constraint=constraints.positive)
        energy = ebm.EnergyDistribution(
            ebm.bounded(lambda v: rates * s * v**2, LIMIT),
            dist.Normal(0.0, 1.0).expand([3]),
        )
        with numpyro.plate("columns", 3):
            numpyro.sample("x", energy, obs=x)

    draws = {"s": jnp.array([[0.5, 1.0], [1.5, 2.0]])}
    log_z = ebm.log_normalizer(
        random.key(0), model, draws, method="base", batch_ndims=2
    )
    assert log_z.is_certified
    assert log_z.estimate["x"].shape == (2, 2, 3)
    for index in np.ndindex(2, 2, 3):
        rate = float(rates[index[2]] * draws["s"][index[:2]])
        right = by_grid(lambda v, r=rate: LIMIT * np.tanh(r * v**2 / LIMIT))
        error = float(log_z.stderr["x"][index])
        assert abs(float(log_z.estimate["x"][index]) - right) < 6 * error
        assert log_z.lower["x"][index] < right < log_z.upper["x"][index]


def test_a_finite_support():
    """Six spins: the sum over 64 states."""
    states = np.array(np.meshgrid(*[[0, 1]] * 6, indexing="ij")).reshape(6, -1).T
    energy = ebm.bounded(lambda v: -0.8 * jnp.sum(v[..., 1:] == v[..., :-1], -1), 4.0)
    log_z = base_of(energy, base=dist.Bernoulli(0.5 * jnp.ones(6)).to_event(1))
    right = float(np.log(np.mean(np.exp(-np.asarray(energy(states), float)))))
    assert log_z.is_certified
    assert abs(float(log_z) - right) < 5 * log_z.stderr["x"]


def test_options_of_annealing_are_refused():
    for option in ({"budget": 10_000}, {"num_temperatures": 10}):
        with pytest.raises(ValueError, match="method = 'base' takes"):
            base_of(SKEWED, **option)


def test_a_base_that_rounding_does_not_normalise_is_flagged():
    """Its own constant, off by 0.08 nats, would enter every density."""
    log_z = base_of(
        ebm.bounded(lambda v: 0.0 * v, 1.0), base=dist.StudentT(1e6, 0.0, 1.0)
    )
    assert any("integrates to exp(" in flag for flag in log_z.flags["x"])
