"""Tables of log Z, and the posteriors they give, against closed forms and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density
from scipy.stats import gamma, norm

import ebm_ppl as ebm
from ebm_ppl.normalizer.chebyshev import smooth
from ebm_ppl.normalizer.posterior_points import points_by_mass

pytestmark = pytest.mark.xdist_group("tabulate")

SIZE, NUM_ROWS = 5, 8
X = np.random.default_rng(0).normal(size=(NUM_ROWS, SIZE)).astype(np.float32) * 0.7
POSTERIOR = gamma(
    2 + NUM_ROWS * SIZE / 2, scale=1 / (2 + 0.5 * np.sum(X.astype(float) ** 2))
)
FLAT = dist.ImproperUniform(constraints.real_vector, (), (SIZE,))
START = dist.Normal(0, 1).expand([SIZE]).to_event(1)
NORMAL = dist.Normal(0.0, 1.0)
RANGE = {"rate": np.geomspace(0.6, 6.0, 9)}


def model(x=None):
    """E = ½ λ |x|² in five dimensions: log Z = −5/2 log λ, up to a constant."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * rate * (v**2).sum(-1), FLAT, start=START
    )
    with numpyro.plate("rows", NUM_ROWS):
        numpyro.sample("x", energy, obs=x)


def line(x, base=None, other=False):
    """The same in one dimension, where quadrature serves, and may depend on more."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    shift = numpyro.sample("shift", dist.Normal(0, 1)) if other else 0.0
    base = dist.Normal(0.0, 3.0) if base is None else base
    with numpyro.plate("rows", len(x)):
        energy = lambda v: 0.5 * rate * v**2 - shift * v  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)


def line_log_z(rate):
    return -0.5 * np.log(1 + 9 * np.asarray(rate))


def moments(normalized, x, rates):
    """Of the posterior that a model has, on a fine grid."""
    joint = jax.vmap(lambda r: log_density(normalized, (x,), {}, {"rate": r})[0])
    values = np.asarray(joint(jnp.asarray(rates)), float)
    weights = np.exp(values - values.max())
    mean = np.sum(weights * rates) / weights.sum()
    return mean, np.sqrt(np.sum(weights * (rates - mean) ** 2) / weights.sum())


@pytest.fixture(scope="module")
def table():
    """One of those that so few walkers certify: about half."""
    return ebm.tabulate_log_normalizer(
        random.key(1), model, RANGE, X, num_walkers=256, progress_bar=False
    )


@pytest.fixture(scope="module")
def exact_table():
    return ebm.tabulate_log_normalizer(
        None, line, {"rate": np.geomspace(0.2, 40, 13)}, X[:, 0], method="quadrature"
    )


# The function


def test_it_is_log_z_between_the_points(exact_table):
    rates = np.geomspace(0.2, 40, 101).astype(np.float32)
    found = jax.vmap(lambda r: exact_table({"rate": r})["x"])(rates)
    np.testing.assert_allclose(found, line_log_z(rates), atol=1e-4)
    assert exact_table.is_certified
    assert exact_table.error["x"] < 2e-4
    assert exact_table.counts == {"x": NUM_ROWS}


def test_its_derivative_is_that_of_log_z(exact_table):
    """−9/2 / (1 + 9λ), which is −E[x²] / 2."""
    slope = jax.grad(lambda r: exact_table({"rate": r})["x"])
    for rate in (0.5, 2.0, 9.0):
        assert slope(rate) == pytest.approx(-4.5 / (1 + 9 * rate), rel=2e-3)


@pytest.mark.parametrize("rate", [0.19, 41.0])
def test_outside_of_the_grid_there_is_none(exact_table, rate):
    assert np.isnan(exact_table({"rate": rate})["x"])


@pytest.mark.parametrize("rate", [0.2, 40.0])
def test_the_ends_are_inside(exact_table, rate):
    assert exact_table({"rate": rate})["x"] == pytest.approx(line_log_z(rate), abs=1e-3)


def test_two_parameters_of_a_finite_support():
    """Four spins in a ring with a field, over every state."""
    states = np.array(list(itertools.product([0, 1], repeat=4)), float)

    def energy(v, coupling, field):
        spins = 2.0 * v - 1.0
        return -coupling * (spins * jnp.roll(spins, 1, -1)).sum(-1) - field * spins.sum(
            -1
        )

    def ring():
        coupling = numpyro.param("coupling", 0.1)
        field = numpyro.param("field", 0.1)
        base = dist.Bernoulli(0.5 * jnp.ones(4)).to_event(1)
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: energy(v, coupling, field), base)
        )

    grid = {"coupling": np.linspace(-0.6, 0.6, 9), "field": np.linspace(-0.5, 1, 9)}
    table = ebm.tabulate_log_normalizer(None, ring, grid, method="enumeration")
    for coupling, field in [(-0.55, 0.9), (0.33, 0.21), (0.6, -0.5)]:
        exact = np.log(np.mean(np.exp(-energy(states, coupling, field))))
        found = table({"coupling": coupling, "field": field})["x"]
        assert found == pytest.approx(exact, abs=table.error["x"])
    assert table.error["x"] < 0.02
    assert table.is_certified
    assert table.counts == {"x": 1.0}


def test_a_function_that_is_not_smooth_is_off():
    nodes = np.linspace(-1, 1, 11)[:, None]
    between = (nodes[1:] + nodes[:-1]) / 2
    halves = nodes, between
    noise = np.zeros(11), np.zeros(10)
    everywhere = np.ones(11, bool), np.ones(10, bool)
    kink = smooth(
        halves, tuple(np.abs(p[:, 0] - 0.15) for p in halves), noise, everywhere
    )
    assert kink.error > 0.05
    curve = smooth(halves, tuple(np.exp(p[:, 0]) for p in halves), noise, everywhere)
    assert curve.error < 1e-4


def test_noise_is_smoothed_and_told():
    """Ten repeats: the function is nearer than the values, and the error holds."""
    rng = np.random.default_rng(0)
    nodes = np.linspace(-1, 1, 17)[:, None]
    halves = nodes, (nodes[1:] + nodes[:-1]) / 2
    noise = tuple(np.full(len(p), 0.01) for p in halves)
    everywhere = tuple(np.ones(len(p), bool) for p in halves)
    for _ in range(10):
        values = tuple(np.exp(p[:, 0]) + rng.normal(0, 0.01, len(p)) for p in halves)
        found = smooth(halves, values, noise, everywhere)
        line = np.linspace(-0.9, 0.9, 50)
        at = jax.vmap(found.polynomial)(jnp.asarray(line[:, None], float))
        off = np.asarray(at, float) - np.exp(line)
        assert np.abs(off - off.mean()).max() < min(0.02, 2 * found.error)


# Posteriors


@pytest.mark.runs_long
def test_the_posterior_of_a_precision_in_five_dimensions(table):
    """Mean and deviation within 2% of the conjugate ones."""
    assert table.error["x"] < 0.02
    rates = np.linspace(0.61, 5.99, 400)
    mean, deviation = moments(ebm.normalized(model, table), X, rates)
    assert mean == pytest.approx(POSTERIOR.mean(), rel=0.02)
    assert deviation == pytest.approx(POSTERIOR.std(), rel=0.02)


def test_nuts_runs_on_it(exact_table):
    x = X[:, 0]
    kernel = NUTS(ebm.normalized(line, exact_table))
    mcmc = MCMC(kernel, num_warmup=200, num_samples=300, progress_bar=False)
    mcmc.run(random.key(0), x)
    rates = np.linspace(0.21, 39.9, 4_000)
    exact = gamma(2, scale=0.5).logpdf(rates)
    exact += NUM_ROWS * 0.5 * np.log(1 + 9 * rates) - 0.5 * rates * np.sum(x**2)
    weights = np.exp(exact - exact.max())
    mean = np.sum(weights * rates) / weights.sum()
    deviation = np.sqrt(np.sum(weights * (rates - mean) ** 2) / weights.sum())
    drawn = np.asarray(mcmc.get_samples()["rate"])
    # NUTS's draws of one parameter count for a third at least.
    assert abs(drawn.mean() - mean) < 4 * deviation / np.sqrt(100)


def test_a_grid_that_the_posterior_leaves_is_told():
    narrow = {"rate": np.linspace(1.0, 2.0, 6)}
    table = ebm.tabulate_log_normalizer(
        None, line, narrow, X[:, 0], method="quadrature"
    )
    assert "posterior of 'rate' lie beyond 2, where the grid ends" in str(table)
    with pytest.raises(ebm.UncertifiedNormalizerError, match="go further"):
        ebm.normalized(line, table)


def test_a_coarse_table_is_told():
    strict = ebm.tabulate_log_normalizer(
        None,
        line,
        {"rate": np.array([1e-3, 1.0, 20.0, 1e4])},
        X[:, 0],
        method="quadrature",
    )
    assert "over the tolerance of 0.1" in strict.flags["x"][0]


@pytest.mark.parametrize("width", [0.02, 0.01])
def test_a_bump_between_all_points_is_told(width):
    """A well far from the data, deep for a narrow range of rates within the posterior."""

    def with_bump(x):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))

        def energy(v):
            depth = 14.0 * jnp.exp(-0.5 * ((rate - 0.97) / width) ** 2)
            return 0.5 * rate * v**2 - depth * jnp.exp(-0.5 * ((v - 4.2) / 0.3) ** 2)

        with numpyro.plate("rows", len(x)):
            site = ebm.EnergyDistribution(energy, dist.Normal(0.0, 3.0))
            numpyro.sample("x", site, obs=x)

    x = np.random.default_rng(3).normal(size=200).astype(np.float32)
    table = ebm.tabulate_log_normalizer(
        None, with_bump, {"rate": np.geomspace(0.3, 3.0, 13)}, x, method="quadrature"
    )
    assert "over the tolerance of 0.1" in table.flags["x"][0]


def test_points_by_mass_are_quantiles():
    """Of a correlated Gaussian that fills a thousandth of the box."""
    low, high = np.array([-20.0, -30.0]), np.array([20.0, 30.0])
    cov = np.array([[0.04, 0.03], [0.03, 0.09]])
    precision = np.linalg.inv(cov)

    def log_density(points):
        away = points - np.array([3.0, -7.0])
        return -0.5 * np.einsum("ni,ij,nj->n", away, precision, away)

    points = points_by_mass(log_density, low, high, 400)
    np.testing.assert_allclose(points.mean(0), [3.0, -7.0], atol=0.03)
    np.testing.assert_allclose(np.cov(points.T), cov, rtol=0.15)
    one = points_by_mass(
        lambda p: -0.5 * (p[:, 0] / 0.1) ** 2, np.array([-9.0]), np.array([9.0]), 9
    )
    np.testing.assert_allclose(
        one[:, 0], norm.ppf((np.arange(9) + 0.5) / 9, scale=0.1), atol=2e-3
    )
    assert (low == [-20.0, -30.0]).all()


def test_errors_count_where_the_posterior_is():
    """With three hundred times the rows the same noise counts more, and sooner."""
    few, many = (
        ebm.tabulate_log_normalizer(
            None,
            line,
            {"rate": np.array([0.02, 0.4, 2.0, 10.0, 200.0])},
            np.tile(X[:, 0], times),
            method="quadrature",
        )
        for times in (1, 300)
    )
    assert many.counts["x"] == 300 * few.counts["x"]
    assert many.error["x"] <= few.error["x"]
    assert any("over the tolerance" in flag for flag in many.flags["x"])


def with_scale(x, as_latent=False):
    """A model with a parameter that a table holds fixed."""
    if as_latent:
        scale = numpyro.sample("scale", dist.HalfNormal(3.0))
    else:
        scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    line(x * scale, dist.Normal(0.0, 3.0 * scale))


@pytest.mark.parametrize("as_latent", [False, True])
def test_other_parameters_stay_fixed(as_latent):
    """At the values that log Z belongs to: others from outside are refused."""
    x = X[:, 0]
    table = ebm.tabulate_log_normalizer(
        None,
        with_scale,
        {"rate": np.geomspace(0.2, 40, 9)},
        x,
        params={"scale": jnp.asarray(2.0)},
        method="quadrature",
        as_latent=as_latent,
    )
    assert table({"rate": 1.0})["x"] == pytest.approx(-0.5 * np.log(37), abs=1e-3)

    known = handlers.seed(ebm.normalized(with_scale, table, allow_uncertified=True), 0)
    trace = handlers.trace(handlers.substitute(known, {"rate": 1.0})).get_trace(
        x, as_latent
    )
    assert trace["scale"]["value"] == 2.0
    assert np.isfinite(trace["x"]["fn"].log_prob(trace["x"]["value"])).all()

    with pytest.raises(ValueError, match="'scale' was given another value"):
        log_density(known, (x, as_latent), {}, {"rate": 1.0, "scale": 1.0})
    traced = jax.jit(
        lambda scale: log_density(
            known, (x, as_latent), {}, {"rate": 1.0, "scale": scale}
        )[0]
    )
    assert np.isfinite(traced(2.0))
    assert np.isnan(traced(1.0))


def test_noise_counts_where_the_halves_agree_by_chance():
    """Values with noise whose halves are one line: the line's own error remains."""
    nodes = np.linspace(-1, 1, 9)[:, None]
    halves = nodes, (nodes[1:] + nodes[:-1]) / 2
    noise = np.full(9, 0.01), np.full(8, 0.01)
    everywhere = np.ones(9, bool), np.ones(8, bool)
    found = smooth(halves, tuple(2 * p[:, 0] for p in halves), noise, everywhere)
    assert found.error < 1e-12
    # Least squares of a line: the slope's standard error, times the distance
    among = np.array([[-0.3], [0.3]])
    points = np.concatenate(halves)
    slope = 0.01 / np.sqrt(np.sum((points - points.mean()) ** 2))
    assert found.error_among(among) == pytest.approx(0.3 * slope)


def test_do_gives_the_energy_and_log_z_the_same_value(exact_table):
    x = X[:, 0]
    at = handlers.do(ebm.normalized(line, exact_table), data={"rate": jnp.asarray(1.3)})
    exact = norm(0, (1.3 + 1 / 9) ** -0.5).logpdf(x)
    for seed in (0, 1):
        site = handlers.trace(handlers.seed(at, seed)).get_trace(x)["x"]
        np.testing.assert_allclose(site["fn"].log_prob(x), exact, atol=1e-3)


def test_a_grid_that_begins_at_an_energy_of_zero(exact_table):
    """The energy of its first value tells nothing of the others."""

    def scaled(x):
        rate = numpyro.param("rate", 1.0)
        size = jnp.abs(x).max()
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda v: rate * (v / size) ** 2, NORMAL)
            numpyro.sample("x", energy, obs=x)

    x = X[:, 0]
    grid = {"rate": np.linspace(0.0, 3.0, 13)}
    table = ebm.tabulate_log_normalizer(None, scaled, grid, x, method="quadrature")
    known = ebm.normalized(scaled, table, allow_uncertified=True)
    assert np.isfinite(log_density(known, (x,), {}, {"rate": 1.0})[0])
    with pytest.raises(ValueError, match="belongs to another energy"):
        log_density(known, (2 * x,), {}, {"rate": 1.0})


@pytest.mark.parametrize("what", ["latent", "energy"])
def test_where_the_posterior_lies_cannot_be_told(what):
    """It depends on a site that has neither data nor a value."""

    def with_another(x):
        if what == "latent":
            numpyro.sample("other", dist.Normal(0.0, 1.0))
        else:
            numpyro.sample("other", ebm.EnergyDistribution(lambda v: v**2, NORMAL))
        line(x)

    grid = {"rate": np.geomspace(0.2, 40, 9)}
    table = ebm.tabulate_log_normalizer(
        None, with_another, grid, X[:, 0], method="quadrature"
    )
    assert r"sites ['other'] have neither data nor values" in table.flags["x"][0]


def test_more_rows_than_the_table_was_judged_for():
    few = X[:, 0]
    many = np.tile(few, 300)
    table = ebm.tabulate_log_normalizer(
        None, line, {"rate": np.geomspace(0.2, 40, 8)}, few, method="quadrature"
    )
    assert table.is_certified
    assert 300 * NUM_ROWS * table.error["x"] > 0.1
    known = ebm.normalized(line, table)
    assert np.isfinite(log_density(known, (few,), {}, {"rate": 1.0})[0])
    with pytest.raises(ebm.UncertifiedNormalizerError, match=r"for 8 rows.*are 2400"):
        log_density(known, (many,), {}, {"rate": 1.0})
    allowed = ebm.normalized(line, table, allow_uncertified=True)
    assert np.isfinite(log_density(allowed, (many,), {}, {"rate": 1.0})[0])


# Refusals


def test_a_whole_number_is_not_rounded_to():
    """A parameter fixed at 2 is not 2.5; one at float32(0.1) is 0.1."""
    table = ebm.tabulate_log_normalizer(
        None,
        with_scale,
        {"rate": np.geomspace(0.2, 40, 9)},
        X[:, 0],
        params={"scale": 2},
        method="quadrature",
    )
    known = ebm.normalized(with_scale, table, allow_uncertified=True)
    assert np.isfinite(
        log_density(known, (X[:, 0],), {}, {"rate": 1.0, "scale": 2.0})[0]
    )
    with pytest.raises(ValueError, match="'scale' was given another value"):
        log_density(known, (X[:, 0],), {}, {"rate": 1.0, "scale": 2.5})


def test_a_wall_in_the_grid():
    def walled(x):
        rate = numpyro.param("rate", 1.0)
        energy = lambda v: jnp.where(rate < 2, rate * v**2, jnp.inf)  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, NORMAL), obs=x)

    grid = {"rate": np.linspace(1.0, 3.0, 5)}
    with pytest.raises(ValueError, match=r"not finite at . of 9 points"):
        ebm.tabulate_log_normalizer(None, walled, grid, X[:, 0], method="quadrature")


@pytest.mark.parametrize(
    ("grid", "match"),
    [
        ({}, "grid has 0 parameters"),
        ({n: np.arange(4.0) for n in "abc"}, "grid has 3 parameters"),
        ({"rate": [1.0, 2.0, 3.0]}, r"grid\['rate'\].*at least 4"),
        ({"rate": [4.0, 3.0, 2.0, 1.0]}, r"grid\['rate'\].*ascend"),
        ({"rate": [1.0, 2.0, np.nan, 4.0]}, r"grid\['rate'\].*finite"),
        ({"rate": [0.0, 1.0, 2.0, 3.0]}, r"grid\['rate'\] has the value 0, .* inside"),
        (
            {"rate": [-1.0, 1.0, 2.0, 3.0]},
            r"grid\['rate'\] has the value -1, .* inside",
        ),
        ({"theta": np.arange(4.0)}, r"grid names 'theta', which is no parameter"),
    ],
)
def test_grids_that_cannot_be(grid, match):
    with pytest.raises(ValueError, match=match):
        ebm.tabulate_log_normalizer(None, line, grid, X[:, 0], method="quadrature")


def test_an_energy_that_depends_on_more_than_the_grid():
    with pytest.raises(ValueError, match=r"depends on a latent site that has no value"):
        ebm.tabulate_log_normalizer(
            None, line, RANGE, X[:, 0], other=True, method="quadrature"
        )


def test_another_base_than_the_tables(exact_table):
    known = ebm.normalized(line, exact_table)
    with pytest.raises(ValueError, match="belongs to another energy"):
        log_density(known, (X[:, 0], dist.Normal(0, 2)), {}, {"rate": 1.0})
