"""The energy site: values against closed forms, NumPyro's wrappers, and the guard
against silent wrong answers."""

from dataclasses import replace

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import lax, random
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.util import log_density

import ebm_ppl as ebm
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments

# The problem of design.md, section 1: E(x) = ½λx² with a flat base, λ ~ Gamma(2, 2).
X = np.random.default_rng(0).normal(size=40) * 0.7
FLAT = dist.ImproperUniform(constraints.real, (), ())
POSTERIOR_SHAPE, POSTERIOR_RATE = 2 + len(X) / 2, 2 + (X**2).sum() / 2


def gaussian_log_z(precision):
    return 0.5 * jnp.log(2 * jnp.pi / precision)


def precision_model(x, log_z=None):
    """``log_z``: the normaliser as a function of λ, or None where it is not known."""
    lam = numpyro.sample("lam", dist.Gamma(2.0, 2.0))
    known = None if log_z is None else log_z(lam)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * lam * v**2, FLAT, start=dist.Normal(0, 1), log_normalizer=known
    )
    with numpyro.plate("data", len(X)):
        numpyro.sample("x", energy, obs=x)


def within_five_mcse(draws, truth):
    """``draws``: (chain, draw).  The Monte Carlo error is known only where the chains
    have mixed."""
    ess = effective_sample_size(draws)
    assert ess > 200
    return abs(draws.mean() - truth) < 5 * draws.std() / np.sqrt(ess)


GRID = np.linspace(-8, 8, 20_001)


def skewed_density(v):
    """The unnormalised density of E = v⁴/4 − v on N(0, 1), in NumPy."""
    return np.exp(-(v**4) / 4 + v - v**2 / 2) / np.sqrt(2 * np.pi)


def moment(density, power):
    """E[v^p] under an unnormalised density on GRID."""
    return np.trapezoid(GRID**power * density, GRID) / np.trapezoid(density, GRID)


# Values


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_energy_and_potential_of_vectors_have_their_closed_forms(leading):
    weight = np.array([0.5, 1.0, 3.0])
    distribution = ebm.EnergyDistribution(
        lambda v: (weight * v**3).sum(-1), dist.Normal(0.5, 2.0).expand([3]).to_event(1)
    )
    value = np.random.default_rng(1).normal(size=(*leading, 3))
    energy = (weight * value**3).sum(-1)
    log_base = (-0.5 * ((value - 0.5) / 2) ** 2 - np.log(2 * np.sqrt(2 * np.pi))).sum(
        -1
    )
    assert distribution.energy(value).shape == leading
    np.testing.assert_allclose(distribution.energy(value), energy, rtol=1e-5)
    np.testing.assert_allclose(
        distribution.potential(value), energy - log_base, rtol=1e-5
    )


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_energy_of_scalars_has_its_closed_form(leading):
    distribution = ebm.EnergyDistribution(
        lambda v: v**4 / 4 - v, FLAT, start=dist.Normal(0, 1)
    )
    value = np.random.default_rng(2).normal(size=leading)
    assert distribution.potential(value).shape == leading
    np.testing.assert_allclose(
        distribution.energy(value), value**4 / 4 - value, rtol=1e-5
    )
    np.testing.assert_allclose(
        distribution.potential(value), value**4 / 4 - value, rtol=1e-5
    )


def test_the_energy_is_called_with_one_leading_dimension():
    """A net that takes a batch of events needs no wrapping, whatever the walkers'
    leading dimensions."""
    shapes = []

    def energy(v):
        shapes.append(v.shape)
        return v.sum(-1)

    distribution = ebm.EnergyDistribution(
        energy, dist.Normal(0, 1).expand([2]).to_event(1)
    )
    for leading in ((), (4,), (2, 3)):
        distribution.energy(jnp.zeros((*leading, 2)))
    assert shapes == [(1, 2), (4, 2), (6, 2)]


def test_named_factors_add_up():
    value = jnp.array([-1.0, 0.0, 2.0])
    distribution = ebm.EnergyDistribution(
        {"well": lambda v: v**4, "tilt": lambda v: -3 * v}, dist.Normal(0, 1)
    )
    factors = distribution.factor_energies(value)
    assert list(factors) == ["well", "tilt"]
    np.testing.assert_allclose(factors["well"], [1, 0, 16])
    np.testing.assert_allclose(factors["tilt"], [3, 0, -6])
    np.testing.assert_allclose(distribution.energy(value), [4, 0, 10])


def test_a_batch_shape_has_one_normaliser_per_element():
    precision = jnp.array([0.5, 1.0, 4.0])
    distribution = ebm.EnergyDistribution(
        lambda v: 0.5 * precision * v**2,
        dist.Normal(jnp.zeros(3), 1.0),
        log_normalizer=-0.5 * jnp.log1p(precision),
    )
    assert distribution.batch_shape == (3,)
    value = random.normal(random.key(0), (5, 3))
    twin = dist.Normal(0, 1 / jnp.sqrt(1 + precision))
    np.testing.assert_allclose(
        distribution.log_prob(value), twin.log_prob(value), rtol=1e-5
    )
    assert distribution.energy(value).shape == (5, 3)


# NumPyro's wrappers and JAX's transformations


def bowl(precision, v):
    return 0.5 * precision * v**2


def known_bowl(precision):
    """Base N(0, 1) times exp(−½ s v²): Normal(0, 1/√(1 + s))."""
    return ebm.EnergyDistribution(
        Partial(bowl, precision),
        dist.Normal(0.0, 1.0),
        log_normalizer=-0.5 * jnp.log1p(precision),
    )


def bowl_twin(precision):
    return dist.Normal(0, 1 / jnp.sqrt(1 + precision))


VALUES = jnp.array([0.3, -1.0, 2.0])


def test_expand():
    expanded = known_bowl(3.0).expand([2, 3])
    assert expanded.batch_shape == (2, 3)
    np.testing.assert_allclose(
        expanded.log_prob(VALUES),
        bowl_twin(3.0).expand([2, 3]).log_prob(VALUES),
        rtol=1e-5,
    )


def test_mask():
    mask = jnp.array([True, False, True])
    masked = known_bowl(3.0).expand([3]).mask(mask).log_prob(VALUES)
    np.testing.assert_allclose(
        masked, jnp.where(mask, bowl_twin(3.0).log_prob(VALUES), 0), rtol=1e-5
    )


def test_to_event():
    joined = known_bowl(3.0).expand([3]).to_event(1)
    assert joined.event_shape == (3,)
    np.testing.assert_allclose(
        joined.log_prob(VALUES), bowl_twin(3.0).log_prob(VALUES).sum(), rtol=1e-5
    )


def test_jit_takes_a_distribution_and_returns_one():
    log_prob = jax.jit(lambda d, v: d.log_prob(v))(known_bowl(3.0), VALUES)
    np.testing.assert_allclose(log_prob, bowl_twin(3.0).log_prob(VALUES), rtol=1e-5)
    returned = jax.jit(known_bowl)(3.0)
    np.testing.assert_allclose(
        returned.log_prob(VALUES), bowl_twin(3.0).log_prob(VALUES), rtol=1e-5
    )


def test_vmap_over_the_parameters_of_a_partial():
    precision = jnp.array([0.5, 1.0, 4.0])
    stacked = jax.vmap(known_bowl)(precision)
    log_prob = jax.vmap(lambda d, v: d.log_prob(v))(stacked, VALUES)
    np.testing.assert_allclose(
        log_prob, bowl_twin(precision).log_prob(VALUES), rtol=1e-5
    )


def test_pytree_round_trip():
    distribution = ebm.EnergyDistribution(
        {"a": Partial(bowl, 2.0), "b": Partial(bowl, 1.0)},
        FLAT,
        start=dist.Normal(0, 2),
        log_normalizer=0.7,
    )
    leaves, treedef = jax.tree.flatten(distribution)
    back = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_array_equal(back.log_prob(VALUES), distribution.log_prob(VALUES))
    assert list(back.factors) == ["a", "b"]
    assert back.start.scale == 2
    assert (back.batch_shape, back.event_shape) == (
        distribution.batch_shape,
        distribution.event_shape,
    )


def test_support_and_draws_are_those_of_the_base():
    distribution = ebm.EnergyDistribution(lambda v: v, dist.Exponential(1.0))
    assert distribution.support is constraints.positive
    assert not distribution.has_rsample


# The guard: an unknown normaliser


def fit_by_svi(guide):
    svi = SVI(
        precision_model, guide(precision_model), numpyro.optim.Adam(0.05), Trace_ELBO()
    )
    svi.run(random.key(0), 1, X, progress_bar=False)


def sample_by_nuts(log_z=None):
    mcmc = MCMC(NUTS(precision_model), num_warmup=1, num_samples=1, progress_bar=False)
    mcmc.run(random.key(0), X, log_z)


LAMBDAS = {"lam": jnp.array([1.0, 2.0])}
HOSTS = {
    "svi_delta": lambda: fit_by_svi(AutoDelta),
    "svi_normal": lambda: fit_by_svi(AutoNormal),
    "nuts": sample_by_nuts,
    "log_likelihood": lambda: log_likelihood(precision_model, LAMBDAS, X),
    "prior_predictive": lambda: Predictive(precision_model, num_samples=2)(
        random.key(0), None
    ),
    "posterior_predictive": lambda: Predictive(precision_model, LAMBDAS)(
        random.key(0), None
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_every_numpyro_host_stops_at_an_unknown_normaliser(host):
    with pytest.raises(
        ebm.UnknownNormalizerError,
        match=r"site 'x'.* unknown.*Jarzynski.*log_normalizer=",
    ):
        HOSTS[host]()


def lone(obs=X[:3]):
    numpyro.sample(
        "x",
        ebm.EnergyDistribution(lambda v: v**2, dist.Normal(0, 1)).expand([3]),
        obs=obs,
    )


def in_plate():
    with numpyro.plate("rows", 6, subsample_size=3):
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: v**2, dist.Normal(0, 1)), obs=X[:3]
        )


def joint(model, params=None):
    return log_density(model, (), {}, {} if params is None else params)[0]


def joint_at(scale):
    def model():
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(lambda v: scale * v**2, dist.Normal(0, 1)).expand(
                [3]
            ),
            obs=X[:3],
        )

    return joint(model)


CONTEXTS = {
    "plate": lambda: joint(handlers.seed(in_plate, 0)),
    "mask": lambda: joint(handlers.mask(lone, mask=jnp.array([True, False, True]))),
    "scale": lambda: joint(handlers.scale(lone, scale=2.0)),
    "condition": lambda: joint(handlers.condition(lambda: lone(None), {"x": X[:3]})),
    "substitute": lambda: joint(lambda: lone(None), {"x": X[:3]}),
    "jit": lambda: jax.jit(joint_at)(1.0),
    "vmap": lambda: jax.vmap(joint_at)(jnp.array([1.0, 2.0])),
    "grad": lambda: jax.grad(joint_at)(1.0),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_no_context_hides_an_unknown_normaliser(context):
    with pytest.raises(ebm.UnknownNormalizerError, match="site 'x'"):
        CONTEXTS[context]()


def test_the_error_is_one_that_numpyro_expects_of_a_distribution_without_sampler():
    distribution = ebm.EnergyDistribution(lambda v: v**2, dist.Normal(0, 1))
    for call in (
        lambda: distribution.log_prob(0.0),
        lambda: distribution.sample(random.key(0)),
    ):
        with pytest.raises(NotImplementedError, match="unknown") as caught:
            call()
        assert caught.type is ebm.UnknownNormalizerError


def test_a_known_normaliser_does_not_give_an_improper_base_a_start():
    distribution = ebm.EnergyDistribution(
        lambda v: v**2, FLAT, log_normalizer=0.5 * np.log(np.pi)
    )
    np.testing.assert_allclose(
        distribution.log_prob(1.0), -1 - 0.5 * np.log(np.pi), rtol=1e-6
    )
    with pytest.raises(ebm.UnknownNormalizerError, match="start="):
        distribution.sample(random.key(0))


# A known normaliser makes everything right


def test_svi_finds_the_posterior_mode():
    guide = AutoDelta(precision_model)
    svi = SVI(precision_model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    result = svi.run(random.key(0), 1500, X, gaussian_log_z, progress_bar=False)
    mode = (POSTERIOR_SHAPE - 1) / POSTERIOR_RATE
    assert round(mode, 3) == 2.590
    assert result.params["lam_auto_loc"] == pytest.approx(mode, rel=1e-3)


def test_nuts_finds_the_posterior_mean():
    mcmc = MCMC(
        NUTS(precision_model), num_warmup=300, num_samples=1500, progress_bar=False
    )
    mcmc.run(random.key(1), X, gaussian_log_z)
    mean = POSTERIOR_SHAPE / POSTERIOR_RATE
    assert round(mean, 3) == 2.714
    assert within_five_mcse(
        np.asarray(mcmc.get_samples(group_by_chain=True)["lam"], float), mean
    )


def test_log_likelihood_is_that_of_the_normalised_normal():
    lam = jnp.array([0.5, 2.0, 3.0])
    pointwise = log_likelihood(precision_model, {"lam": lam}, X, gaussian_log_z)["x"]
    assert pointwise.shape == (3, len(X))
    np.testing.assert_allclose(
        pointwise, dist.Normal(0, lam[:, None] ** -0.5).log_prob(X), rtol=1e-5
    )


def test_predictive_draws_follow_a_skewed_energy():
    """Draws are resampled walkers: their repeats tell the ESS."""
    log_z = np.log(np.trapezoid(skewed_density(GRID), GRID))

    def model():
        energy = ebm.EnergyDistribution(
            lambda v: v**4 / 4 - v, dist.Normal(0, 1), log_normalizer=log_z
        )
        with numpyro.plate("rows", 4000):
            numpyro.sample("x", energy)

    draws = np.asarray(Predictive(model, num_samples=1)(random.key(3))["x"][0], float)
    repeats = np.unique(draws, return_counts=True)[1]
    ess = len(draws) ** 2 / (repeats**2).sum()
    assert ess > 1000
    for power in (1, 2, 3):
        values = draws**power
        assert abs(
            values.mean() - moment(skewed_density(GRID), power)
        ) < 5 * values.std() / np.sqrt(ess)


# The guard: a constant normaliser while parameters are learned


def learned_energy(theta):
    return ebm.EnergyDistribution(
        lambda v: 0.5 * theta * v**2, dist.Normal(0, 1), log_normalizer=jnp.array(-0.2)
    ).log_prob(jnp.asarray(0.7))


def learned_base(theta):
    return ebm.EnergyDistribution(
        lambda v: 0.5 * v**2, dist.Normal(theta, 1), log_normalizer=-0.2
    ).log_prob(0.7)


def learned_partial(theta):
    return ebm.EnergyDistribution(
        Partial(bowl, theta), dist.Normal(0, 1), log_normalizer=-0.2
    ).log_prob(0.7)


def stopped_normaliser(theta):
    log_z = lax.stop_gradient(-0.5 * jnp.log1p(theta))
    return ebm.EnergyDistribution(
        Partial(bowl, theta), dist.Normal(0, 1), log_normalizer=log_z
    ).log_prob(0.7)


def wrapped(theta):
    distribution = ebm.EnergyDistribution(
        Partial(bowl, theta), dist.Normal(0, 1), log_normalizer=-0.2
    )
    return (
        distribution.expand([3])
        .mask(jnp.array([True, False, True]))
        .to_event(1)
        .log_prob(VALUES)
    )


def in_scan(theta):
    return lax.scan(
        lambda total, v: (total + learned_energy(theta + v), None), 0.0, VALUES
    )[0]


LEARNED = {
    f.__name__: f
    for f in (
        learned_energy,
        learned_base,
        learned_partial,
        stopped_normaliser,
        wrapped,
        in_scan,
    )
}
DERIVATIVES = {
    "grad": lambda f: jax.grad(f)(1.0),
    "jacfwd": lambda f: jax.jacfwd(f)(1.0),
    "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,)),
    "linearize": lambda f: jax.linearize(f, 1.0),
    "hessian": lambda f: jax.hessian(f)(1.0),
    "grad_in_jit": lambda f: jax.jit(jax.grad(f))(1.0),
    "grad_of_jit": lambda f: jax.grad(jax.jit(f))(1.0),
    "grad_in_vmap": lambda f: jax.vmap(jax.grad(f))(jnp.array([1.0, 2.0])),
    "grad_of_vmap": lambda f: jax.grad(lambda t: jax.vmap(f)(t * VALUES).sum())(1.0),
    "grad_of_checkpoint": lambda f: jax.grad(jax.checkpoint(f))(1.0),
    "grad_in_scan": lambda f: lax.scan(
        lambda t, _: (t - jax.grad(f)(t), None), 1.0, length=2
    ),
    "grad_of_cond": lambda f: jax.grad(lambda t: lax.cond(t > 0, f, lambda s: s, t))(
        1.0
    ),
}


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_constant_normaliser_cannot_be_used_while_parameters_are_differentiated(
    learned, derivative
):
    with pytest.raises(ebm.UnknownNormalizerError, match="constant"):
        DERIVATIVES[derivative](LEARNED[learned])


def svi_with_a_constant():
    svi = SVI(
        precision_model,
        AutoDelta(precision_model),
        numpyro.optim.Adam(0.05),
        Trace_ELBO(),
    )
    svi.run(random.key(0), 1, X, lambda lam: 0.0, progress_bar=False)


def nuts_with_a_constant():
    sample_by_nuts(lambda lam: 0.0)


def svi_on_base_parameters():
    def model(x):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(
                lambda v: v**2, dist.Normal(loc, 1), log_normalizer=0.0
            ),
            obs=x,
        )

    SVI(model, lambda x: None, numpyro.optim.Adam(0.05), Trace_ELBO()).run(
        random.key(0), 1, 0.5, progress_bar=False
    )


@pytest.mark.parametrize(
    "host", [svi_with_a_constant, nuts_with_a_constant, svi_on_base_parameters]
)
def test_svi_and_nuts_stop_at_a_constant_normaliser_of_learned_parameters(host):
    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*constant"):
        host()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_normaliser_that_is_differentiated_too_passes(transform):
    def log_prob(theta):
        return known_bowl(theta).log_prob(jnp.asarray(0.7))

    expected = jax.grad(lambda theta: bowl_twin(theta).log_prob(0.7))(2.0)
    np.testing.assert_allclose(jax.grad(transform(log_prob))(2.0), expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jacfwd(transform(log_prob))(2.0), expected, rtol=1e-5
    )


def test_a_constant_passes_while_only_x_is_differentiated():
    theta = jnp.array(2.0)  # fixed, but an array inside the energy's closure
    distribution = ebm.EnergyDistribution(
        lambda v: theta * v**3, dist.Normal(0, 1), log_normalizer=-0.2
    )
    slope = jax.grad(distribution.log_prob)(0.7)
    np.testing.assert_allclose(slope, -0.7 - 6 * 0.7**2, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(distribution.log_prob)))(jnp.full(2, 0.7)),
        slope,
        rtol=1e-5,
    )


def test_nuts_samples_a_latent_under_an_energy_prior():
    """Prior ∝ N(0, 1) exp(−v⁴/4 + v), one datum y ~ N(v, 1): any constant normaliser
    serves."""

    def model(y):
        v = numpyro.sample(
            "v",
            ebm.EnergyDistribution(
                lambda v: v**4 / 4 - v, dist.Normal(0, 1), log_normalizer=0.0
            ),
        )
        numpyro.sample("y", dist.Normal(v, 1), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(random.key(2), 2.0)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["v"], float)
    posterior = skewed_density(GRID) * np.exp(-0.5 * (2.0 - GRID) ** 2)
    for power in (1, 2):
        assert within_five_mcse(draws**power, moment(posterior, power))


# log Z enters the joint with NumPyro's own scale

# Each case declares site "x" through `site(loc)`, its energy or its normalised twin;
# beside it stands Σ scale·mask.
ROWS = np.linspace(-1.5, 2.0, 10)
MASK = np.arange(10) % 3 > 0


def plain(site):
    numpyro.sample("x", site(0.0), obs=0.3)


def one_plate(site):
    with numpyro.plate("rows", 10):
        numpyro.sample("x", site(0.0), obs=ROWS)


def subsampled(site):
    with numpyro.plate("rows", 10, subsample_size=4):
        numpyro.sample("x", site(0.0), obs=numpyro.subsample(ROWS, event_dim=0))


def external_batch(site):
    with numpyro.plate("rows", 10, subsample_size=4):
        numpyro.sample("x", site(0.0), obs=ROWS[:4])


def masked(site):
    with numpyro.plate("rows", 10), handlers.mask(mask=MASK):
        numpyro.sample("x", site(0.0), obs=ROWS)


def masked_distribution(site):
    with numpyro.plate("rows", 10):
        numpyro.sample("x", site(0.0).mask(MASK), obs=ROWS)


def scaled(site):
    with numpyro.plate("rows", 10), handlers.scale(scale=0.3):
        numpyro.sample("x", site(0.0), obs=ROWS)


def scaled_masked_subsample(site):
    with (
        numpyro.plate("rows", 10, subsample_size=4),
        handlers.scale(scale=0.5),
        handlers.mask(mask=MASK[:4]),
    ):
        numpyro.sample("x", site(0.0), obs=ROWS[:4])


def two_plates(site):
    with numpyro.plate("columns", 2), numpyro.plate("rows", 5):
        numpyro.sample("x", site(0.0), obs=ROWS.reshape(5, 2))


def two_plates_subsampled(site):
    with numpyro.plate("columns", 2), numpyro.plate("rows", 20, subsample_size=5):
        numpyro.sample("x", site(0.0), obs=ROWS.reshape(5, 2))


def to_event(site):
    with numpyro.plate("rows", 5):
        numpyro.sample("x", site(np.zeros(2)).to_event(1), obs=ROWS.reshape(5, 2))


def own_batch(site):
    with numpyro.plate("rows", 10):
        numpyro.sample("x", site(ROWS / 2), obs=ROWS)


def own_batch_masked(site):
    with numpyro.plate("rows", 10), handlers.mask(mask=MASK):
        numpyro.sample("x", site(ROWS / 2), obs=ROWS)


def own_batch_in_a_larger_plate(site):
    with numpyro.plate("columns", 2), numpyro.plate("rows", 5):
        numpyro.sample("x", site(np.array([0.0, 0.5])), obs=ROWS.reshape(5, 2))


COEFFICIENTS = [
    (plain, 1),
    (one_plate, 10),
    (subsampled, 10 / 4 * 4),
    (external_batch, 10 / 4 * 4),
    (masked, MASK.sum()),
    (masked_distribution, MASK.sum()),
    (scaled, 0.3 * 10),
    (scaled_masked_subsample, 0.5 * 10 / 4 * MASK[:4].sum()),
    (two_plates, 10),
    (two_plates_subsampled, 2 * 20),
    (to_event, np.array([5, 5])),
    (own_batch, np.ones(10)),
    (own_batch_masked, MASK),
    (own_batch_in_a_larger_plate, np.array([5, 5])),
]


@pytest.mark.parametrize(
    ("case", "coefficient"), COEFFICIENTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_the_coefficient_of_log_z_is_the_sum_of_scale_times_mask(case, coefficient):
    """At the true log Z the joint is that of the normalised twin: Normal(loc, ½) for E
    = 3/2 (v − loc)² on " "N(loc, 1)."""

    def model():
        case(
            lambda loc: ebm.EnergyDistribution(
                lambda v: 1.5 * (v - loc) ** 2, dist.Normal(loc, 1)
            )
        )

    bound = BoundModel(model, {}, random.key(0), Arguments())
    log_z = jnp.full(np.shape(coefficient), -np.log(2.0))

    def joint_given(log_z):
        return bound.negative_log_joint(
            {}, lambda name, distribution: distribution.with_log_normalizer(log_z)
        )

    joint, slope = jax.value_and_grad(joint_given)(log_z)
    np.testing.assert_allclose(slope, coefficient, rtol=1e-6)
    twin = handlers.seed(lambda: case(lambda loc: dist.Normal(loc, 0.5)), random.key(0))
    np.testing.assert_allclose(joint, -log_density(twin, (), {}, {})[0], rtol=1e-5)


# Nets of three libraries


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, v):
        return nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(4)(v)))[..., 0]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = (
            nnx.Linear(2, 4, rngs=rngs),
            nnx.Linear(4, 1, use_bias=False, rngs=rngs),
        )

    def __call__(self, v):
        return self.out(nnx.tanh(self.hidden(v)))[..., 0]


def eqx_net():
    return eqx_module(
        "net",
        eqx.nn.MLP(
            2, "scalar", 4, 1, jnp.tanh, use_final_bias=False, key=random.key(1)
        ),
    )


NETS = {
    "linen": lambda: flax_module("net", LinenNet(), input_shape=(1, 2)),
    "nnx": lambda: nnx_module("net", NnxNet(nnx.Rngs(0))),
    "equinox": lambda: jax.vmap(eqx_net()),
}


@pytest.mark.parametrize("library", NETS)
def test_nets_of_every_library_are_trained(library):
    def model(x):
        net = NETS[library]()
        with numpyro.plate("rows", len(x)):
            # So weak that walkers start at the base: no annealing, whose compilation
            # would take most of the test.
            base = dist.Normal(0, 1).expand([2]).to_event(1)
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: 0.003 * net(v), base), obs=x
            )

    jarzynski = ebm.Jarzynski(
        model, optax.sgd(1.0), num_chains=6, num_walkers=16, ess_target=None
    )
    x = np.random.default_rng(3).normal(1.0, 0.5, (12, 2))
    update = jax.jit(jarzynski.update)
    initial = jarzynski.init(random.key(0), x)
    first, _ = update(initial, x)
    second, _ = update(first, x)
    for before, after in ((initial, first), (first, second)):
        change = jax.tree.map(
            lambda a, b: np.abs(a - b).max(),
            jarzynski.get_params(after),
            jarzynski.get_params(before),
        )
        assert len(jax.tree.leaves(change)) == 3
        assert all(0 < c < np.inf for c in jax.tree.leaves(change))


# A certificate as the normaliser


def certificate(flags=(), **estimates):
    found = ebm.LogNormalizer.exact(estimates)
    return replace(found, flags=dict.fromkeys(estimates, flags))


def test_a_certified_log_normalizer_is_accepted():
    energy = lambda v: 0.5 * v**2  # noqa: E731
    base = dist.Normal(0, 1)
    known = ebm.EnergyDistribution(
        energy, base, log_normalizer=certificate(x=-0.5 * np.log(2.0))
    )
    np.testing.assert_allclose(
        known.log_prob(0.7), dist.Normal(0, 0.5**0.5).log_prob(0.7), rtol=1e-6
    )


def test_a_flagged_log_normalizer_is_refused():
    with pytest.raises(
        ebm.UncertifiedNormalizerError, match=r"site 'x': too wide.*log_z\.estimate"
    ):
        ebm.EnergyDistribution(
            jnp.square,
            dist.Normal(0, 1),
            log_normalizer=certificate(("too wide.",), x=0.0),
        )


def test_a_log_normalizer_of_two_sites_is_refused():
    with pytest.raises(ValueError, match=r"sites \['x', 'y'\].*expected one site"):
        ebm.EnergyDistribution(
            jnp.square, dist.Normal(0, 1), log_normalizer=certificate(x=0.0, y=0.0)
        )
