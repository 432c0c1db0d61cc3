"""Models with known normalisers: NUTS, SVI, likelihoods and predictive draws against
the conjugate closed form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import log_density
from scipy.stats import gamma, norm

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("normalized")

T15_9999 = 5.24  # Student t, 15 degrees of freedom, two-sided 99.99%
X = np.random.default_rng(0).normal(size=40) * 0.7
FLAT = dist.ImproperUniform(constraints.real, (), ())


def model(x=None):
    """E = ½ λ x² over the whole line: a Gaussian of precision λ, whose prior is
    conjugate."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    with numpyro.plate("rows", 40):
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * rate * v**2, FLAT, start=dist.Normal(0.0, 1.0)
        )
        numpyro.sample("x", energy, obs=x)


POSTERIOR = gamma(2 + 20, scale=1 / (2 + 0.5 * np.sum(X**2)))


def exact_log_z(rate):
    return 0.5 * np.log(2 * np.pi / np.asarray(rate, float))


def log_density_of_rows(rate, x=X):
    """``(*rate.shape, rows)``."""
    return norm.logpdf(x, scale=np.asarray(rate, float)[..., None] ** -0.5)


def at_rate(value):
    return ebm.log_normalizer(
        None, model, {"rate": jnp.asarray(value)}, method="quadrature"
    )


@pytest.fixture(scope="module")
def posterior():
    """NUTS over the model with log Z by quadrature: ``(2, 400)`` draws of the rate."""
    settings = {
        "num_warmup": 300,
        "num_samples": 400,
        "num_chains": 2,
        "chain_method": "vectorized",
    }
    mcmc = MCMC(NUTS(ebm.normalized(model)), progress_bar=False, **settings)
    mcmc.run(random.key(0), X)
    assert not mcmc.get_extra_fields()["diverging"].any()
    return mcmc.get_samples(group_by_chain=True)


@pytest.fixture(scope="module")
def at_draws(posterior):
    """Annealed log Z at every 20th draw, ``(2, 20)``."""
    draws = {"rate": posterior["rate"][:, ::20]}
    options = {"num_temperatures": 64, "progress_bar": False}
    return ebm.log_normalizer(random.key(1), model, draws, X, batch_ndims=2, **options)


def mean_is(draws, exact):
    draws = np.asarray(draws, float)
    ess = effective_sample_size(draws)
    assert ess > 200
    assert abs(draws.mean() - exact) < 5 * draws.std() / np.sqrt(ess)


# log Z inside the model, as a function of the parameters


def test_nuts_gives_the_conjugate_posterior(posterior):
    assert POSTERIOR.mean() == pytest.approx(2.714, abs=1e-3)
    rate = posterior["rate"]
    mean_is(rate, POSTERIOR.mean())
    mean_is((rate - POSTERIOR.mean()) ** 2, POSTERIOR.var())


def test_log_likelihood_is_the_closed_form(posterior):
    found = log_likelihood(ebm.normalized(model), posterior, X, batch_ndims=2)["x"]
    assert found.shape == (2, 400, 40)
    np.testing.assert_allclose(
        found, log_density_of_rows(posterior["rate"]), rtol=1e-4, atol=1e-4
    )


def test_log_density_counts_prior_and_rows():
    found, _ = log_density(ebm.normalized(model), (X,), {}, {"rate": 3.0})
    exact = gamma.logpdf(3.0, 2.0, scale=0.5) + log_density_of_rows(np.array(3.0)).sum()
    assert found == pytest.approx(exact, rel=1e-5)


def test_svi_finds_the_mode():
    """A delta guide maximises the joint density: the mode of Gamma(a, b) is (a −
    1)/b."""
    guide = AutoDelta(
        ebm.normalized(model),
        init_loc_fn=numpyro.infer.init_to_value(values={"rate": 1.0}),
    )
    schedule = optax.cosine_decay_schedule(0.1, 400)
    result = SVI(ebm.normalized(model), guide, optax.adam(schedule), Trace_ELBO()).run(
        random.key(0), 400, X, progress_bar=False
    )
    exact = (22 - 1) / (2 + 0.5 * np.sum(X**2))
    assert float(guide.median(result.params)["rate"]) == pytest.approx(exact, rel=1e-3)
    joint = (
        gamma.logpdf(exact, 2.0, scale=0.5) + log_density_of_rows(np.array(exact)).sum()
    )
    assert float(result.losses[-1]) == pytest.approx(-joint, rel=1e-4)


def bits_model(x):
    """E = h Σ v over fair coins: independent bits, one with probability 1/(1 + eʰ)."""
    field = numpyro.param("field", 0.0)
    with numpyro.plate("rows", len(x)):
        base = dist.Bernoulli(0.5).expand([3]).to_event(1)
        numpyro.sample(
            "bits", ebm.EnergyDistribution(lambda v: field * v.sum(-1), base), obs=x
        )


def test_a_finite_support_is_summed():
    bits = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 1]])
    found = log_likelihood(
        ebm.normalized(bits_model), {"field": jnp.array([-1.0, 0.5])}, bits
    )["bits"]
    ones = 1 / (1 + np.exp([[-1.0], [0.5]]))
    exact = np.log(ones) * bits.sum(-1) + np.log1p(-ones) * (3 - bits.sum(-1))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_a_known_normaliser_is_left_alone():
    """One site brings its own log Z (a wrong one, to be seen); the other's is found."""

    def two_sites():
        given = ebm.EnergyDistribution(
            lambda v: 0.5 * v**2, dist.Normal(0.0, 1.0), log_normalizer=7.0
        )
        numpyro.sample("given", given, obs=0.0)
        numpyro.sample(
            "found",
            ebm.EnergyDistribution(lambda v: 0.5 * v**2, dist.Normal(0.0, 1.0)),
            obs=0.0,
        )

    trace = handlers.trace(ebm.normalized(two_sites)).get_trace()
    assert trace["given"]["fn"].log_normalizer == 7.0
    assert float(trace["found"]["fn"].log_normalizer) == pytest.approx(
        -0.5 * np.log(2.0), abs=1e-5
    )


def test_points_of_the_quadrature():
    with pytest.raises(ValueError, match="num_points = 10; expected an odd number"):
        log_density(ebm.normalized(model, num_points=10), (X,), {}, {"rate": 3.0})


def test_a_site_that_neither_exact_method_serves():
    def solid():
        base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
        numpyro.sample(
            "solid",
            ebm.EnergyDistribution(lambda v: (v**2).sum(-1), base),
            obs=jnp.zeros(3),
        )

    with pytest.raises(
        ValueError,
        match=r"site 'solid' has 3 unconstrained dimensions.*method='bracket'",
    ):
        log_density(ebm.normalized(solid), (), {}, {})


def cauchy():
    numpyro.sample(
        "x", ebm.EnergyDistribution(lambda v: jnp.log1p(v**2), FLAT), obs=0.0
    )


def test_quadrature_that_cannot_be_trusted():
    """An error where it can be raised, NaN under a trace: never a number."""
    with pytest.raises(
        ebm.UnknownNormalizerError, match=r"site 'x' cannot be trusted.*beyond the ends"
    ):
        log_density(ebm.normalized(cauchy), (), {}, {})
    assert np.isnan(
        jax.jit(lambda: log_density(ebm.normalized(cauchy), (), {}, {})[0])()
    )


# log Z at a point: parameters are fixed there


def with_other_latents(x, y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 40):
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * rate * v**2, FLAT, start=dist.Normal(0.0, 1.0)
        )
        numpyro.sample("x", energy, obs=x)
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_a_point_fixes_the_parameters():
    """λ turns deterministic and its prior leaves the density; ``loc`` stays a latent
    with its own."""
    fixed = ebm.normalized(with_other_latents, at_rate(3.0))
    trace = handlers.trace(handlers.seed(fixed, random.key(0))).get_trace(X, X)
    assert trace["rate"]["type"] == "deterministic"
    assert trace["rate"]["value"] == 3.0
    assert trace["loc"]["type"] == "sample"
    found, _ = log_density(fixed, (X, X), {}, {"loc": 0.4})
    rows = log_density_of_rows(np.array(3.0)).sum() + norm.logpdf(X, loc=0.4).sum()
    assert found == pytest.approx(norm.logpdf(0.4) + rows, rel=1e-5)


def test_a_point_fixes_param_sites():
    bits = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 1]])
    log_z = ebm.log_normalizer(
        None, bits_model, {"field": jnp.array(0.5)}, bits, method="enumeration"
    )
    fixed = ebm.normalized(bits_model, log_z)
    assert handlers.trace(fixed).get_trace(bits)["field"]["value"] == 0.5
    ones = 1 / (1 + np.exp(0.5))
    exact = np.log(ones) * bits.sum() + np.log1p(-ones) * (9 - bits.sum())
    assert log_density(fixed, (bits,), {}, {})[0] == pytest.approx(exact, rel=1e-5)


def test_parameters_stay_at_their_point():
    """Other values of λ with the log Z of this one would be a density that is not
    normalised."""
    draws = {"rate": jnp.array([3.0, 5.0])}
    found = log_likelihood(ebm.normalized(model, at_rate(3.0)), draws, X)["x"]
    np.testing.assert_allclose(
        found[0], log_density_of_rows(np.array(3.0)), rtol=1e-4, atol=1e-4
    )
    assert np.isnan(found[1]).all()


def latent_energy(y):
    """An energy as a prior: x under E = ½ λ x², seen as y = x + noise."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * rate * v**2, FLAT, start=dist.Normal(0.0, 1.0)
    )
    x = numpyro.sample("x", energy)
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_nuts_over_other_latents():
    log_z = ebm.log_normalizer(
        None, latent_energy, {"rate": jnp.array(3.0)}, 2.0, method="quadrature"
    )
    settings = {
        "num_warmup": 300,
        "num_samples": 500,
        "num_chains": 2,
        "chain_method": "vectorized",
    }
    mcmc = MCMC(
        NUTS(ebm.normalized(latent_energy, log_z)), progress_bar=False, **settings
    )
    mcmc.run(random.key(0), 2.0)
    draws = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(draws["rate"], 3.0)
    mean_is(draws["x"], 2.0 / 4.0)
    mean_is((draws["x"] - 0.5) ** 2, 1 / 4.0)


def test_predictive_draws_at_a_point():
    """Fifty data sets of forty rows: variance 1/λ, by draws that may be copies of each
    other within a data set."""
    predictive = Predictive(ebm.normalized(model, at_rate(3.0)), num_samples=50)
    draws = np.asarray(predictive(random.key(0))["x"], float)
    assert draws.shape == (50, 40)
    for power, exact in ((1, 0.0), (2, 1 / 3)):
        means = (draws**power).mean(1)
        assert abs(means.mean() - exact) < 5 * means.std(ddof=1) / np.sqrt(50)
    assert (draws**2).mean(1).std() < 3 * np.sqrt(2 / 40) / 3


def test_annealed_values_serve_as_well():
    log_z = ebm.log_normalizer(
        random.key(0),
        model,
        {"rate": jnp.array(3.0)},
        X,
        num_temperatures=64,
        progress_bar=False,
    )
    found, _ = log_density(ebm.normalized(model, log_z), (X,), {}, {})
    error = found - log_density_of_rows(np.array(3.0)).sum()
    assert abs(error) < 40 * T15_9999 * log_z.stderr["x"]
    assert error != 0


def test_a_point_without_the_site():
    def other(x):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 2.0))
        numpyro.sample(
            "z",
            ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, dist.Normal(0.0, 1.0)),
            obs=x,
        )

    with pytest.raises(ValueError, match=r"has sites \['x'\].*energy site 'z'"):
        log_density(ebm.normalized(other, at_rate(3.0)), (0.5,), {}, {})


# log Z at posterior draws


def test_bridged_log_z_is_that_of_every_draw(at_draws, posterior):
    rate = posterior["rate"][:, ::20]
    error = np.asarray(at_draws.estimate["x"], float) - exact_log_z(rate)
    assert error.shape == (2, 20)
    assert at_draws.is_certified
    assert at_draws.batch_ndims == 2
    assert at_draws.log_normalizers["x"].shape == (16, 2, 20)
    assert np.all(np.abs(error) < T15_9999 * np.asarray(at_draws.stderr["x"]))
    assert np.all(np.abs(error) < 0.05)
    # Limits of 97.5%, their errors shared by neighbouring draws: a few may fail.
    assert np.mean(at_draws.lower["x"] < exact_log_z(rate)) >= 0.9
    assert np.mean(at_draws.upper["x"] > exact_log_z(rate)) >= 0.9
    # The bridges follow the draws: what is left of log Z's own spread is noise.
    assert error.std() < 0.1 * exact_log_z(rate).std()


def test_bridges_are_unbiased_between_parameters(at_draws, posterior):
    """Differences of log Z between draws owe nothing to the reference: they are far
    more precise than log Z."""
    exact = exact_log_z(posterior["rate"][:, ::20])
    far = np.argmax(np.abs(exact - np.median(exact)))
    middle = np.argmin(np.abs(exact - np.median(exact)))
    found = np.asarray(at_draws.estimate["x"], float).ravel()
    assert found[far] - found[middle] == pytest.approx(
        (exact.ravel()[far] - exact.ravel()[middle]), abs=0.02
    )


def test_one_leading_axis_is_the_same(at_draws, posterior):
    draws = {"rate": posterior["rate"][:, ::20].reshape(-1)}
    options = {"num_temperatures": 64, "progress_bar": False}
    log_z = ebm.log_normalizer(random.key(1), model, draws, X, batch_ndims=1, **options)
    assert log_z.batch_ndims == 1
    np.testing.assert_array_equal(
        log_z.estimate["x"], at_draws.estimate["x"].reshape(-1)
    )
    assert log_z.log_normalizers["x"].shape == (16, 40)
    found = log_likelihood(ebm.normalized(model, log_z), log_z.samples, X)["x"]
    assert found.shape == (40, 40)


def test_log_likelihood_at_draws(at_draws):
    assert at_draws.samples.keys() == {"rate", "x_log_normalizer"}
    found = log_likelihood(
        ebm.normalized(model, at_draws), at_draws.samples, X, batch_ndims=2
    )["x"]
    rate, log_z = (
        np.asarray(at_draws.samples[name], float)[..., None]
        for name in ("rate", "x_log_normalizer")
    )
    np.testing.assert_allclose(found, -0.5 * rate * X**2 - log_z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, log_density_of_rows(rate[..., 0]), atol=0.05)


def test_predictive_draws_at_draws(at_draws):
    """Each draw of λ gives data of its own variance."""
    predictive = Predictive(
        ebm.normalized(model, at_draws), at_draws.samples, batch_ndims=2
    )
    draws = np.asarray(predictive(random.key(0))["x"], float)
    assert draws.shape == (2, 20, 40)
    ratio = (draws**2).mean(-1) * np.asarray(at_draws.samples["rate"])
    assert abs(ratio.mean() - 1) < 5 * ratio.std(ddof=1) / np.sqrt(40)


def test_draws_without_their_log_z(at_draws):
    with pytest.raises(
        ebm.UnknownNormalizerError,
        match=r"site 'x' has one log Z per parameter draw.*samples",
    ):
        log_likelihood(
            ebm.normalized(model, at_draws),
            {"rate": at_draws.params["rate"]},
            X,
            batch_ndims=2,
        )


# Certificates


def test_an_uncertified_log_z_is_refused():
    doubtful = replace(at_rate(3.0), flags={"x": ("because of this.",)})
    with pytest.raises(
        ebm.UncertifiedNormalizerError, match="site 'x': because of this"
    ):
        ebm.normalized(model, doubtful)
    accepted = ebm.normalized(model, doubtful, allow_uncertified=True)
    certified = ebm.normalized(model, at_rate(3.0))
    assert (
        log_density(accepted, (X,), {}, {})[0]
        == log_density(certified, (X,), {}, {})[0]
    )


def test_uncertified_draws_are_refused(at_draws):
    doubtful = replace(at_draws, flags={"x": ("because of this.",)})
    with pytest.raises(
        ebm.UncertifiedNormalizerError, match="site 'x': because of this"
    ):
        ebm.normalized(model, doubtful)
    accepted = ebm.normalized(model, doubtful, allow_uncertified=True)
    assert np.isfinite(
        log_likelihood(accepted, at_draws.samples, X, batch_ndims=2)["x"]
    ).all()


# Other energies


def scaled(x=None, scale=1.0):
    """An argument that changes the energy and is no parameter."""
    a = numpyro.param("a", 0.5)
    with numpyro.plate("rows", 40):
        energy = ebm.EnergyDistribution(
            lambda v: scale * a * v**2, dist.Normal(0.0, 1.0)
        )
        numpyro.sample("x", energy, obs=x)


def test_a_log_normalizer_of_another_energy_is_refused():
    """Same parameters, another argument: an error where numbers are at hand, NaN under
    a trace."""
    log_z = ebm.log_normalizer(
        None, scaled, {"a": jnp.array(0.5)}, scale=2.0, method="quadrature"
    )
    assert log_z.estimate["x"] == pytest.approx(-0.5 * np.log(3.0), abs=1e-5)
    known = ebm.normalized(scaled, log_z)
    right, _ = log_density(known, (X,), {"scale": 2.0}, {})
    np.testing.assert_allclose(right, norm.logpdf(X, scale=3**-0.5).sum(), rtol=1e-5)
    with pytest.raises(
        ValueError, match="belongs to another energy than that at site 'x'"
    ):
        log_density(known, (X,), {}, {})
    assert np.isfinite(
        jax.jit(lambda s: log_density(known, (X,), {"scale": s}, {})[0])(2.0)
    )
    assert np.isnan(
        jax.jit(lambda s: log_density(known, (X,), {"scale": s}, {})[0])(1.0)
    )


def test_a_distribution_takes_the_log_normalizer_of_its_own_energy_alone():
    bowl = ebm.EnergyDistribution(lambda v: v**2, dist.Normal(0.0, 1.0))
    log_z = ebm.log_normalizer(None, bowl, method="quadrature")
    same = ebm.EnergyDistribution(
        lambda v: v**2, dist.Normal(0.0, 1.0), log_normalizer=log_z
    )
    assert same.log_prob(0.3) == pytest.approx(
        norm.logpdf(0.3, scale=3**-0.5), abs=1e-5
    )
    for energy, base in (
        (lambda v: 1.01 * v**2, same.base),
        (lambda v: v**2, dist.Normal(0.02, 1.0)),
    ):
        with pytest.raises(ValueError, match="belongs to another energy"):
            ebm.EnergyDistribution(energy, base, log_normalizer=log_z)
    # A number carries no such mark.
    ebm.EnergyDistribution(
        lambda v: 1.01 * v**2, same.base, log_normalizer=log_z.estimate["x"]
    )
