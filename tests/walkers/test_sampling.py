"""Draws of x against known moments: chains that ArviZ finds converged, on skewed,
constrained and divided energies."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.tree_util import Partial
from numpyro.distributions import constraints
from scipy.stats import norm

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("sampling")

METHODS = ("smc", "mala", "nuts")
GRID = np.linspace(-10.0, 10.0, 20_001)
NORMAL = dist.Normal(0.0, 1.0)


def polynomial(coefficients, v):
    return jnp.polyval(coefficients, v)


def quartic(coefficients):
    """A polynomial energy over N(0, 1), from v⁴ down, and its normalised density on the
    grid."""
    density = np.exp(-np.polyval(coefficients, GRID)) * norm.pdf(GRID)
    # Coefficients are data of the energy: all quartics share executables.
    energy = Partial(polynomial, jnp.asarray(coefficients, jnp.float32))
    return ebm.EnergyDistribution(energy, NORMAL), density / density.sum()


SKEWED, SKEWED_DENSITY = quartic([0.25, 0.5, 0.0, -2.0, 0.0])
# Modes at ±2 with no way between them; a fifth of the mass is on the right.
DIVIDED, DIVIDED_DENSITY = quartic([3.0, 0.0, -24.0, 0.35, 48.0])


SHORT = {"num_temperatures": 32}


@pytest.fixture(scope="module")
def skewed():
    return {method: draw(SKEWED, method, **SHORT) for method in METHODS}


def draw(distribution, method, seed=0, **options):
    return np.asarray(
        ebm.sample(random.key(seed), distribution, method=method, **options)["x"], float
    )


def mean_is(draws, exact):
    """``draws`` of shape ``(chains, draws)``: converged, and their mean within 5
    standard errors."""
    assert az.rhat(draws) < 1.02
    assert az.ess(draws) > 200
    assert abs(draws.mean() - exact) < 5 * az.mcse(draws)


# Moments


@pytest.mark.parametrize("method", METHODS)
def test_a_skewed_energy(skewed, method):
    draws = skewed[method]
    assert draws.shape == (4, 1000)
    centre = (GRID * SKEWED_DENSITY).sum()
    mean_is(draws, centre)
    for power in (2, 3):
        mean_is(
            (draws - centre) ** power, ((GRID - centre) ** power * SKEWED_DENSITY).sum()
        )


@pytest.mark.parametrize("method", ["mala", "nuts"])
def test_chains_from_given_points(method):
    """From one end of a skewed energy, its step size learned on the way, in a
    warm-up."""
    options = {"initial": {"x": np.full(4, 3.0)}, "thinning": 3}
    draws = draw(SKEWED, method, **options)
    centre = (GRID * SKEWED_DENSITY).sum()
    mean_is(draws, centre)
    mean_is((draws - centre) ** 3, ((GRID - centre) ** 3 * SKEWED_DENSITY).sum())


def test_chains_stay_in_the_mode_that_they_were_given():
    draws = draw(DIVIDED, "mala", initial={"x": np.array([-2.0, -2.0, 2.0, 2.0])})
    assert (draws[:2] < 0).all()
    assert (draws[2:] > 0).all()
    assert az.rhat(draws) > 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "smc", "initial": {"x": np.zeros(4)}},
            "'smc' anneals from the base",
        ),
        (
            {"method": "mala", "initial": {"y": np.zeros(4)}},
            r"initial has sites \['y'\]",
        ),
        (
            {"method": "mala", "initial": {"x": np.zeros(3)}},
            r"shape \(3,\); expected .* = \(4,\)",
        ),
        ({"method": "nuts", "initial": {"x": np.full(4, np.nan)}}, "not finite"),
    ],
)
def test_first_points_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ebm.sample(random.key(0), SKEWED, **options)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_constrained_events(method):
    """E = −Σ aᵢ log xᵢ over uniform simplices, for two vectors a at once: Dirichlet(a +
    1)."""
    powers = np.array([[1.0, 4.0, 0.5], [2.0, 1.0, 3.0]])
    base = dist.Dirichlet(jnp.ones((2, 3)))
    energy = lambda v: -(jnp.asarray(powers, jnp.float32) * jnp.log(v)).sum(-1)  # noqa: E731
    options = SHORT | {"thinning": 5 if method == "mala" else 1}
    draws = draw(ebm.EnergyDistribution(energy, base), method, **options)
    assert draws.shape == (4, 1000, 2, 3)
    assert (draws > 0).all()
    np.testing.assert_allclose(draws.sum(-1), 1.0, rtol=1e-5)
    exact = (powers + 1) / (powers + 1).sum(-1, keepdims=True)
    for batch, element in np.ndindex(2, 3):
        mean_is(draws[..., batch, element], exact[batch, element])


# Shapes of the two are alike, so that they share executables: a pool of 64 walkers for
# each of many chains.
MANY = {"num_chains": 1000, "num_temperatures": 8, "num_warmup": 32}


def share_on_the_right(draws):
    """Within 5 standard errors over chains, which are independent, and what weights of
    64 walkers are biased by."""
    exact = DIVIDED_DENSITY[GRID > 0].sum()
    share = (draws > 0).mean(axis=1)
    assert (
        abs(share.mean() - exact) < 5 * share.std(ddof=1) / np.sqrt(len(share)) + 1 / 64
    )


def test_smc_divides_its_draws_by_weight():
    """Few temperatures leave uneven weights, and no move crosses between the modes."""
    share_on_the_right(draw(DIVIDED, "smc", num_draws=64, **MANY))


def test_chains_start_by_weight():
    """A chain stays in the mode that it starts in: a fifth of many chains must start in
    the rarer one."""
    share_on_the_right(draw(DIVIDED, "mala", num_draws=1, **MANY))


# Chains


def test_a_single_chain():
    assert draw(
        SKEWED, "nuts", num_chains=1, num_draws=50, num_warmup=50, thinning=3, **SHORT
    ).shape == (1, 50)


def test_chains_differ(skewed):
    for draws in skewed.values():
        assert len({tuple(chain[:50]) for chain in draws}) == 4


@pytest.mark.parametrize("method", ["smc", "mala"])
def test_draws_follow_the_key(skewed, method):
    np.testing.assert_array_equal(skewed[method], draw(SKEWED, method, **SHORT))
    assert not np.array_equal(skewed[method], draw(SKEWED, method, seed=1, **SHORT))


def test_thinning_leaves_independent_draws(skewed):
    """One move in ten of MALA's is as good as independent; every one is worth about
    half."""
    thinned = draw(SKEWED, "mala", thinning=10, **SHORT)
    assert thinned.shape == (4, 1000)
    assert az.ess(skewed["mala"]) < 0.65 * 4000
    assert az.ess(thinned) > 0.8 * 4000


def test_mala_moves_as_often_as_its_step_size_was_chosen_for(skewed):
    """Acceptance 0.574, adapted by a pilot of 256 walkers: a draw repeats the one
    before where a move was refused."""
    refused = (np.diff(skewed["mala"], axis=1) == 0).mean()
    assert 0.25 < refused < 0.6


# Models


def two_sites(rows=None):
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 12):
        numpyro.sample(
            "wide",
            ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, NORMAL),
            obs=rows,
        )
    numpyro.sample("moved", ebm.EnergyDistribution(lambda v: -2 * loc * v, NORMAL))


def test_every_site_of_a_model():
    """Parameters by name; a plate repeats the site's rows, not its draws."""
    params = {"rate": jnp.array(3.0), "loc": jnp.array(0.5)}
    draws = ebm.sample(
        random.key(0), two_sites, params, np.zeros(12), num_draws=500, **SHORT
    )
    assert draws.keys() == {"wide", "moved"}
    wide, moved = (np.asarray(draws[name], float) for name in ("wide", "moved"))
    assert wide.shape == moved.shape == (4, 500)
    mean_is(wide, 0.0)
    mean_is(wide**2, 1 / 4)
    mean_is(moved, 1.0)
    assert abs(np.corrcoef(wide.ravel(), moved.ravel())[0, 1]) < 5 / np.sqrt(2000 / 2)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"loc": 0.5}, r"lacks \['rate'\]"),
        ({"loc": 0.5, "rate": 1.0, "scale": 2.0}, r"holds \['scale'\]"),
    ],
)
def test_parameters_that_are_missing_or_unknown(params, match):
    with pytest.raises(ValueError, match=match):
        ebm.sample(random.key(0), two_sites, params)


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "gibbs"}, "method = 'gibbs'; expected one of smc, mala, nuts"),
        ({"num_draws": 0}, "num_draws = 0; expected at least 1"),
        ({"num_chains": 0}, "num_chains = 0; expected at least 1"),
        ({"thinning": 0}, "thinning = 0; expected at least 1"),
        ({"num_temperatures": 0}, "num_temperatures = 0"),
        ({"num_warmup": -1}, "num_warmup = -1"),
    ],
)
def test_options_that_cannot_work(options, match):
    with pytest.raises(ValueError, match=match):
        ebm.sample(random.key(0), SKEWED, **options)


def test_a_bare_distribution_takes_no_parameters():
    with pytest.raises(
        ValueError, match="bare EnergyDistribution holds its parameters"
    ):
        ebm.sample(random.key(0), SKEWED, {"rate": 1.0})


def shares(draws, num_states):
    return np.bincount(np.ravel(draws), minlength=num_states) / np.size(draws)


def assert_are_shares(found, right, num_draws):
    """Every state within 4.5 standard errors; states without mass are never drawn."""
    error = np.sqrt(right * (1 - right) / num_draws)
    assert np.all(np.abs(found - right) <= 4.5 * error)


def test_draws_on_a_finite_support_are_exact():
    """Skewed counts with unequal bounds, a state of infinite energy among them."""
    totals = np.array([2, 5])

    def energy(v):
        # Outside of the support the energy has no value.
        return jnp.where(
            v > jnp.asarray(totals), jnp.nan, jnp.where(v == 1, jnp.inf, v)
        )

    counts = ebm.EnergyDistribution(energy, dist.Binomial(totals, 0.6))
    draws = ebm.sample(random.key(0), counts, num_chains=2, num_draws=20_000)["x"]
    assert draws.shape == (2, 20_000, 2)
    for index, total in enumerate(totals):
        states = np.arange(total + 1)
        right = np.array(jnp.exp(dist.Binomial(total, 0.6).log_prob(states) - states))
        right[1] = 0.0
        right /= right.sum()
        assert_are_shares(shares(draws[..., index], total + 1), right, 40_000)


def test_draws_of_spins():
    """A chain of 13 spins, 8,192 states in blocks: neighbours agree by tanh of the
    coupling; drawn by itself, it is the same."""
    base = dist.TransformedDistribution(
        dist.Bernoulli(0.5).expand([13]), dist.transforms.AffineTransform(-1.0, 2.0)
    ).to_event(1)
    chain = ebm.EnergyDistribution(
        lambda s: -0.4 * (s[..., 1:] * s[..., :-1]).sum(-1) - 1.5 * s[..., 0],
        base,
        log_normalizer=0.0,
    )
    sampled = ebm.sample(random.key(1), chain, num_chains=1, num_draws=5_000)["x"][0]
    drawn = chain.sample(random.key(2), (50, 100)).reshape(5_000, 13)
    for draws in (np.asarray(sampled, float), np.asarray(drawn, float)):
        products = draws[:, 1:] * draws[:, :-1]
        error = np.sqrt((1 - np.tanh(0.4) ** 2) / products.size)
        assert abs(products.mean() - np.tanh(0.4)) < 4 * error
        error = np.sqrt((1 - np.tanh(1.5) ** 2) / len(draws))
        assert abs(draws[:, 0].mean() - np.tanh(1.5)) < 4 * error


def test_states_without_weights():
    for energy in (lambda v: jnp.nan * v, lambda v: jnp.inf * (v + 1)):
        coin = ebm.EnergyDistribution(energy, dist.Bernoulli(0.5), log_normalizer=0.0)
        with pytest.raises(ValueError, match="at site 'x' have no finite sum"):
            ebm.sample(random.key(0), coin)
        compiled = jax.jit(lambda key, coin=coin: coin.sample(key, (3,)))(random.key(0))
        assert not np.any(coin.support(compiled))


def test_a_discrete_support():
    coins = ebm.EnergyDistribution(
        lambda v: v.sum(-1), dist.Bernoulli(0.5).expand([3]).to_event(1)
    )
    with pytest.raises(ValueError, match="site 'x' has a discrete support"):
        ebm.sample(random.key(0), coins, method="nuts")
    counts = ebm.EnergyDistribution(lambda v: 0.1 * v, dist.Poisson(3.0))
    with pytest.raises(ValueError, match=r"site 'x' has a discrete.*not finite"):
        ebm.sample(random.key(0), counts)


def test_an_improper_base_without_a_start():
    flat = dist.ImproperUniform(constraints.real, (), ())
    with pytest.raises(
        ebm.UnknownNormalizerError, match=r"site 'x' is improper.*start="
    ):
        ebm.sample(random.key(0), ebm.EnergyDistribution(lambda v: 0.5 * v**2, flat))


def test_a_start_that_leaves_out_part_of_the_base():
    """Walkers in the coordinates of a half-normal would never be negative."""
    flat = dist.ImproperUniform(constraints.real, (), ())
    narrow = ebm.EnergyDistribution(
        lambda v: 0.5 * v**2, flat, start=dist.HalfNormal(1.0)
    )
    with pytest.raises(
        ValueError,
        match=r"start of the energy at site 'x'.* leaves out part of the base's",
    ):
        ebm.sample(random.key(0), narrow, num_draws=10)
