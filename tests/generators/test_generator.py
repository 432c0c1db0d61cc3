"""Generator programs: densities, draws and their derivatives, and every program that is
refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.generators.inspection import inspect_generator

LOC, SCALE_TRIL = jnp.array([1.0, -2.0]), jnp.array([[2.0, 0.0], [0.5, 0.3]])
BASES = {
    "normal": dist.Normal(LOC, jnp.array([2.0, 0.5])).to_event(1),
    "multivariate": dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL),
    "positive": dist.LogNormal(LOC, 0.5).to_event(1),
    "simplex": dist.Dirichlet(jnp.ones(3)),
}


def energy_on(base):
    return ebm.EnergyDistribution(lambda v: 0.0 * v.sum(-1), base)


def latents(num=2):
    return numpyro.sample("z", dist.Normal(0, 1).expand([num]).to_event(1))


def linear(base):
    def program():
        weight = numpyro.param("weight", jnp.array([[1.0, 0.5], [-0.3, 0.8]]))
        scale = numpyro.param("scale", 0.3, constraint=constraints.interval(0.01, 1.0))
        numpyro.sample("x", ebm.standardized_normal(base, weight @ latents(), scale))

    return program


@pytest.mark.parametrize("name", BASES)
def test_draws_and_densities_are_those_of_the_base_standard_normal(name):
    """x = T(W z + σ ε) stays in the support; log q(x|z) is NumPyro's own, Jacobian
    included."""
    base = BASES[name]
    generator, params = inspect_generator(
        random.key(0), linear(base), "x", energy_on(base)
    )
    flat, x = jax.vmap(lambda key: generator.draw(params, key))(
        random.split(random.key(1), 50)
    )
    assert flat.shape == (50, 2)
    assert x.shape == (50, *base.event_shape)
    assert bool(base.support(x).all())
    values = generator.constrain(params)
    for z, value in zip(flat[:3], x[:3], strict=True):
        expected = dist.Normal(0, 1).log_prob(z).sum()
        expected += ebm.standardized_normal(base, values["weight"] @ z, 0.3).log_prob(
            value
        )
        np.testing.assert_allclose(
            generator.log_joint(params, z, value), expected, rtol=1e-5
        )


def test_an_affine_base_moves_and_scales():
    base = BASES["multivariate"]
    found = ebm.standardized_normal(base, jnp.array([0.5, -1.0]), 0.1)
    expected = dist.MultivariateNormal(
        LOC + SCALE_TRIL @ jnp.array([0.5, -1.0]), scale_tril=0.1 * SCALE_TRIL
    )
    x = expected.sample(random.key(0), (5,))
    np.testing.assert_allclose(found.log_prob(x), expected.log_prob(x), rtol=1e-4)


def test_draws_are_differentiable_in_every_parameter():
    base = BASES["normal"]
    generator, params = inspect_generator(
        random.key(0), linear(base), "x", energy_on(base)
    )
    z, _ = generator.draw(params, random.key(1))
    slope = jax.jacobian(lambda p: generator.draw(p, random.key(1))[1])(params)
    np.testing.assert_allclose(slope["weight"][0, 0], 2.0 * z, rtol=1e-5)
    assert np.all(slope["scale"] != 0)


def test_latents_of_several_sites_and_nets():
    base = BASES["normal"]

    def program():
        net = flax_module("net", nn.Dense(2), input_shape=(3,))
        both = jnp.concatenate(
            [latents(), numpyro.sample("more", dist.Normal(1.0, 2.0))[None]]
        )
        numpyro.sample("x", ebm.standardized_normal(base, net(both), 0.5))

    generator, params = inspect_generator(random.key(0), program, "x", energy_on(base))
    assert generator.num_latents == 3
    z, x = generator.draw(params, random.key(1))
    more, first = z[0], z[1:]
    kernel = params["net$params"]["kernel"]
    loc = jnp.concatenate([first, more[None]]) @ kernel + params["net$params"]["bias"]
    expected = dist.Normal(0, 1).log_prob(first).sum() + dist.Normal(1.0, 2.0).log_prob(
        more
    )
    expected += ebm.standardized_normal(base, loc, 0.5).log_prob(x)
    np.testing.assert_allclose(generator.log_joint(params, z, x), expected, rtol=1e-5)


def test_latents_of_a_batched_multivariate_normal():
    """Residuals are its own: half their squares is its log density, up to a
    constant."""
    root = jnp.array([[2.0, 0.0], [0.5, 0.3]])

    def program():
        prior = (
            dist.MultivariateNormal(jnp.ones(2), scale_tril=root)
            .expand([3])
            .to_event(1)
        )
        z = numpyro.sample("z", prior)
        numpyro.sample(
            "x",
            ebm.standardized_normal(
                BASES["normal"], z.sum(0) * numpyro.param("a", 1.0), 0.5
            ),
        )

    generator, params = inspect_generator(
        random.key(0), program, "x", energy_on(BASES["normal"])
    )
    assert generator.is_normal
    half_squares, log_joints = [], []
    for key in random.split(random.key(1), 4):
        z, x = generator.draw(params, key)
        residuals = jnp.concatenate(generator.residuals(params, z, x))
        half_squares.append(0.5 * residuals @ residuals)
        log_joints.append(generator.log_joint(params, z, x))
    np.testing.assert_allclose(
        np.diff(half_squares), -np.diff(log_joints), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("scale", "share"), [(0.0101, 1.0), (0.5, 0.0), (0.999, -1.0)])
def test_parameters_at_the_ends_of_their_interval(scale, share):
    base = BASES["normal"]

    def program():
        scales = numpyro.param(
            "scale", jnp.full(2, scale), constraint=constraints.interval(0.01, 1.0)
        )
        numpyro.sample("x", ebm.standardized_normal(base, latents(), scales))

    generator, params = inspect_generator(random.key(0), program, "x", energy_on(base))
    assert generator.at_bounds(params)["scale"] == share


# Programs that are refused


def x_given_z(distribution):
    def program():
        z = latents() * numpyro.param("a", 1.0)
        numpyro.sample("x", distribution(z))

    return program


def latent(distribution):
    def program():
        z = numpyro.sample("z", distribution)
        a = numpyro.param("a", 1.0)
        numpyro.sample("x", dist.Normal(a * z * jnp.ones(2), 1.0).to_event(1))

    return program


def other_name():
    numpyro.sample(
        "image", dist.Normal(latents() * numpyro.param("a", 1.0), 1.0).to_event(1)
    )


def no_latents():
    numpyro.sample("x", dist.Normal(numpyro.param("a", jnp.zeros(2)), 1.0).to_event(1))


class OneWay(dist.transforms.Transform):
    domain = codomain = constraints.real_vector

    def __call__(self, x):
        return x + 0.1 * jnp.tanh(x)


def has_no_inverse():
    noise = dist.Normal(numpyro.param("a", jnp.zeros(2)), 1.0).to_event(1)
    numpyro.sample("x", dist.TransformedDistribution(noise, OneWay()))


def no_params():
    numpyro.sample("x", dist.Normal(latents(), 1.0).to_event(1))


def observes():
    x_given_z(lambda z: dist.Normal(z, 1.0).to_event(1))()
    numpyro.sample("y", dist.Normal(0, 1), obs=1.0)


def has_a_factor():
    x_given_z(lambda z: dist.Normal(z, 1.0).to_event(1))()
    numpyro.factor("f", 1.0)


def draws_more_after_x():
    x_given_z(lambda z: dist.Normal(z, 1.0).to_event(1))()
    numpyro.sample("late", dist.Normal(0, 1))


def is_masked():
    with numpyro.handlers.mask(mask=False):
        x_given_z(lambda z: dist.Normal(z, 1.0).to_event(1))()


REFUSED = [
    (draws_more_after_x, "latent 'late' is drawn after 'x'"),
    (is_masked, "is masked"),
    (other_name, r"sample sites \['image', 'z'\], but none named 'x'"),
    (
        x_given_z(lambda z: dist.Poisson(jnp.exp(z)).to_event(1)),
        "is a Independent, which is discrete",
    ),
    (x_given_z(lambda z: dist.VonMises(z, 1.0).to_event(1)), "not reparametrised"),
    (
        x_given_z(lambda z: dist.Normal(z, 1.0)),
        r"batch shape \(2,\) and event shape \(\)",
    ),
    (
        x_given_z(lambda z: dist.Normal(z[:1], 1.0).to_event(1)),
        r"event shape \(1,\); expected one event of shape \(2,\)",
    ),
    (latent(dist.Gamma(2.0)), "latent 'z' has support"),
    (latent(dist.Bernoulli(0.5)), "latent 'z' has support"),
    (has_no_inverse, "one of its transforms has no inverse"),
    (no_params, "no parameters to learn"),
    (observes, "site 'y' is observed"),
    (has_a_factor, "site 'f' is observed, or a factor"),
]


@pytest.mark.parametrize(
    ("program", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", "")
)
def test_programs_that_cannot_generate(program, message):
    with pytest.raises(ValueError, match=message):
        inspect_generator(random.key(0), program, "x", energy_on(BASES["normal"]))


def test_a_program_without_latents_has_a_density_of_its_own():
    generator, params = inspect_generator(
        random.key(0), no_latents, "x", energy_on(BASES["normal"])
    )
    z, x = generator.draws(params, random.split(random.key(1), 5))
    assert z.shape == (5, 0)
    found = jax.vmap(partial(generator.log_joint, params))(z, x)
    np.testing.assert_allclose(
        found, dist.Normal(0.0, 1.0).log_prob(x).sum(-1), rtol=1e-6
    )


def test_draws_outside_the_support():
    program = x_given_z(lambda z: dist.Normal(z, 1.0).to_event(1))
    with pytest.raises(ValueError, match="leaves the base's support"):
        inspect_generator(random.key(0), program, "x", energy_on(BASES["positive"]))


def test_a_generator_is_a_program():
    with pytest.raises(TypeError, match="generator is a int"):
        inspect_generator(random.key(0), 3, "x", energy_on(BASES["normal"]))
