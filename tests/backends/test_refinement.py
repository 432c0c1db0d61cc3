"""Chains in latent space: a skewed energy under a linear generator, whose density is
Gaussian."""

import dataclasses

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
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer import HMC, MCMC, init_to_sample
from numpyro.infer.util import log_density

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("refinement")

BASE = dist.Normal(jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])).to_event(1)
WEIGHT, BIAS, SCALE = jnp.array([[0.9, 0.2], [-0.4, 0.7]]), jnp.array([0.5, -0.3]), 0.4
ROOT = jnp.array([[0.3, 0.0], [0.5, 2.0]])


def energy(v):
    """Steep to the right of its kink, in base-standard units: skewed to the left."""
    u = (v - BASE.mean) / jnp.sqrt(BASE.variance)
    return (3.0 * jax.nn.softplus(4.0 * u)).sum(-1)


def model(x):
    strength = numpyro.param("strength", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: strength * energy(v), BASE), obs=x
        )


def generator():
    weight, bias = numpyro.param("weight", WEIGHT), numpyro.param("bias", BIAS)
    scale = numpyro.param("scale", SCALE, constraint=constraints.interval(0.01, 1.0))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", ebm.standardized_normal(BASE, weight @ z + bias, scale))


def correlated():
    """x given z has no noise per coordinate."""
    weight = numpyro.param("weight", WEIGHT)
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", dist.MultivariateNormal(weight @ z, scale_tril=ROOT))


DATA = BASE.sample(random.key(0), (4,))


def fitted(program):
    backend = ebm.VERA(model, program, optax.sgd(0.0), optax.sgd(0.0), num_particles=8)
    return backend.run(random.key(0), 1, DATA, progress_bar=False)


@pytest.fixture(scope="module")
def fit():
    return fitted(generator)


def log_generator(x):
    """The linear generator's log q(x)."""
    spread = jnp.sqrt(BASE.variance)
    covariance = WEIGHT @ WEIGHT.T + SCALE**2 * jnp.eye(2)
    u = dist.MultivariateNormal(BIAS, covariance).log_prob((x - BASE.mean) / spread)
    return u - jnp.log(spread).sum()


@pytest.fixture(scope="module")
def refined(fit):
    return ebm.latent_model(random.key(1), fit, model, DATA)


def test_the_density_of_latents_and_noise(fit, refined):
    """Local proposals are the posterior of a linear generator: q̂ is q but for the
    noise of the latents lent to it."""
    noise = random.normal(random.key(2), (200, 2, 2))
    z, errors = noise[:, 0], noise[:, 1]
    x = BASE.mean + jnp.sqrt(BASE.variance) * (z @ WEIGHT.T + BIAS + SCALE * errors)
    expected = (
        dist.Normal(0, 1).log_prob(noise).sum((1, 2)) - energy(x) + BASE.log_prob(x)
    )

    def found(program):
        assert set(trace_of(program)) == {
            "z",
            "x_base_decentered",
            "x_base",
            "x",
            "x_log_weight",
        }
        at = jax.vmap(
            lambda z, e: log_density(program, (), {}, {"z": z, "x_base_decentered": e})[
                0
            ]
        )
        return jax.jit(at)(z, errors)

    bare = found(ebm.latent_model(random.key(1), fit, model, DATA, correct=False))
    np.testing.assert_allclose(bare, expected, atol=1e-3)
    off = found(refined) - (expected - log_generator(x))
    # That of 64 draws of the prior, which all x share.
    assert abs(float(off.mean())) < 2 / np.sqrt(64)
    assert float(off.std()) < 2 / np.sqrt(64)


def flow():
    """No latents: a normal through a transform."""
    weight = numpyro.param("weight", ROOT)
    noise = dist.Normal(0, 1).expand([2]).to_event(1)
    numpyro.sample(
        "x", dist.TransformedDistribution(noise, LowerCholeskyAffine(BIAS, weight))
    )


def test_a_flow_has_noise_alone_and_an_exact_density():
    program = ebm.latent_model(random.key(1), fitted(flow), model, DATA)
    trace = trace_of(program)
    assert set(trace) == {"x_base_decentered", "x_base", "x", "x_log_weight"}
    noise = random.normal(random.key(2), (50, 2))
    found = jax.vmap(
        lambda e: log_density(program, (), {}, {"x_base_decentered": e})[0]
    )(noise)
    x = BIAS + noise @ ROOT.T
    expected = BASE.log_prob(x) - energy(x) + jnp.linalg.slogdet(ROOT)[1]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def trace_of(program):
    return handlers.trace(handlers.seed(program, 0)).get_trace()


def test_a_conditional_without_noise_per_coordinate_is_drawn_as_it_is():
    program = ebm.latent_model(
        random.key(1), fitted(correlated), model, DATA, correct=False
    )
    trace = trace_of(program)
    assert set(trace) == {"z", "x", "x_log_weight"}
    z, x = trace["z"]["value"], trace["x"]["value"]
    found, _ = log_density(program, (), {}, {"z": z, "x": x})
    prior, conditional = (
        dist.Normal(0, 1).log_prob(z).sum(),
        dist.MultivariateNormal(WEIGHT @ z, scale_tril=ROOT),
    )
    expected = prior + conditional.log_prob(x) - energy(x) + BASE.log_prob(x)
    assert found == pytest.approx(float(expected), abs=1e-3)


def test_mala_in_latent_space(fit):
    program = ebm.latent_model(random.key(1), fit, model, DATA, correct=False)
    kernel = HMC(
        program, num_steps=1, trajectory_length=None, init_strategy=init_to_sample
    )
    mcmc = MCMC(
        kernel,
        num_warmup=20,
        num_samples=20,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(2))
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (2, 20, 2)
    assert np.all(x.std(axis=1) > 0)
    idata = ebm.to_arviz(fit, model, DATA, draws={"x": x})
    assert idata["posterior_predictive"]["x"].shape == (2, 20, 2)


def test_scores_that_chains_cannot_follow(fit):
    with pytest.raises(
        TypeError, match="score is a HMCScore; expected an ImportanceScore"
    ):
        ebm.latent_model(random.key(1), fit, model, DATA, score=ebm.HMCScore())


def test_only_a_generators_fit_has_latents(fit):
    other = dataclasses.replace(fit, state=fit.params)
    with pytest.raises(
        TypeError, match=r"latents, but this fit's state is a dict.*method='nuts'"
    ):
        ebm.latent_model(random.key(1), other, model, DATA)


def test_the_site_is_the_generators(fit):
    def renamed(y):
        strength = numpyro.param("strength", 1.0)
        numpyro.sample(
            "y", ebm.EnergyDistribution(lambda v: strength * energy(v), BASE), obs=y
        )

    with pytest.raises(
        ValueError,
        match=r"generator draws 'x', but the model's energy sites are \['y'\]",
    ):
        ebm.latent_model(random.key(1), fit, renamed, DATA[0])
