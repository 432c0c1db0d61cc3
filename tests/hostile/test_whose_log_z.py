"""A certified log Z belongs to one energy; a constant one to an energy that does not
vary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, DiscreteHMCGibbs, MixedHMC, log_likelihood
from numpyro.infer.hmc import HMC
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.energy.fingerprint import fingerprint

NORMAL = dist.Normal(0.0, 1.0)
COINS = dist.Bernoulli(0.5).expand([4]).to_event(1)
X = np.asarray(np.random.default_rng(0).normal(size=8) * 0.6, np.float32)
OTHER = "log_normalizer belongs to another energy"


def exactly(energy, base, **options):
    method = "enumeration" if base.support.is_discrete else "quadrature"
    return ebm.log_normalizer(
        None, ebm.EnergyDistribution(energy, base, **options), method=method
    )


def bowl(v):
    return 0.5 * v**2


def bump(at, height=1.0, width=0.2):
    """``bowl`` but for a bump where the base has little mass, or much."""
    return lambda v: bowl(v) + height * jnp.exp(-0.5 * ((v - at) / width) ** 2)


@pytest.mark.parametrize("at", [0.0, 1.0, -2.5, 4.0, -6.0])
def test_a_difference_anywhere_on_the_line_is_seen(at):
    log_z = exactly(bowl, NORMAL)
    with pytest.raises(ValueError, match=OTHER):
        ebm.EnergyDistribution(bump(at), NORMAL, log_normalizer=log_z)


DISCRETE = {
    "coins": (COINS, lambda v: 0.1 * v.sum(-1), lambda v: -3.0 * v.sum(-1)),
    "one state of sixteen": (
        COINS,
        lambda v: 0.0 * v.sum(-1),
        lambda v: -1.0 * v.prod(-1),
    ),
    "many spins": (
        dist.Bernoulli(0.5).expand([18]).to_event(1),
        lambda v: 0.1 * v.sum(-1),
        lambda v: 0.1 * v.sum(-1) - 0.01 * (v[..., 1:] * v[..., :-1]).sum(-1),
    ),
    "a category": (
        dist.Categorical(jnp.ones(5) / 5),
        lambda v: 0.0 * v,
        lambda v: jnp.where(v == 3, 0.5, 0.0),
    ),
}


@pytest.mark.parametrize("case", DISCRETE)
def test_discrete_energies_are_told_apart(case):
    base, energy, other = DISCRETE[case]
    log_z = exactly(energy, base)
    same = ebm.EnergyDistribution(energy, base, log_normalizer=log_z)
    assert np.isfinite(same.log_prob(base.sample(random.key(0)))).all()
    with pytest.raises(ValueError, match=OTHER):
        ebm.EnergyDistribution(other, base, log_normalizer=log_z)


def test_an_offset_hides_no_difference():
    def offset(lam, log_normalizer=None):
        base = NORMAL.expand([1]).to_event(1)
        return ebm.EnergyDistribution(
            lambda x: 1e5 + 0.5 * lam * (x**2).sum(-1),
            base,
            log_normalizer=log_normalizer,
        )

    log_z = ebm.LogNormalizer.exact({"x": -1e5 - 0.5 * np.log(2.0)})
    log_z = dataclasses.replace(log_z, fingerprints={"x": fingerprint(offset(1.0))})
    assert np.isfinite(offset(1.0, log_z).log_normalizer)
    with pytest.raises(ValueError, match=OTHER):
        offset(1.3, log_z)


def test_the_mark_knows_the_walkers_and_the_data():
    """Two energies that agree but for a well at the data, far beyond the base."""

    def well(depth, log_normalizer=None):
        energy = lambda v: -depth * jnp.exp(-0.5 * ((v - 2.0) ** 2).sum(-1) / 0.1**2)  # noqa: E731
        base = NORMAL.expand([3]).to_event(1)
        return ebm.EnergyDistribution(energy, base, log_normalizer=log_normalizer)

    def model(depth, x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", well(depth), obs=x)

    x = jnp.full((5, 3), 2.0) + 0.05 * jnp.arange(5)[:, None]
    log_z = ebm.log_normalizer(random.key(0), model, {}, 0.0, x, progress_bar=False)
    with pytest.raises(ValueError, match=OTHER):
        ebm.EnergyDistribution(
            well(5.0).factors, NORMAL.expand([3]).to_event(1), log_normalizer=log_z
        )


@pytest.mark.parametrize(
    "base", [dist.Beta(2.0, 2.0), dist.Gamma(2.0, 1.0), dist.Cauchy(0.0, 1.0)]
)
def test_its_own_energy_takes_it_on_any_support(base):
    log_z = exactly(lambda v: jnp.sin(v), base)
    log_z = dataclasses.replace(log_z, flags={"x": ()})
    known = ebm.EnergyDistribution(lambda v: jnp.sin(v), base, log_normalizer=log_z)
    assert np.isfinite(known.log_prob(0.3))
    with pytest.raises(ValueError, match=OTHER):
        ebm.EnergyDistribution(
            lambda v: jnp.sin(v) + 0.01 * v, base, log_normalizer=log_z
        )


def test_a_batch_of_rows_in_another_order():
    precision = jnp.array([0.5, 1.0, 4.0])
    base = dist.Normal(jnp.zeros(3), 1.0)
    log_z = exactly(lambda v: 0.5 * precision * v**2, base)
    ebm.EnergyDistribution(lambda v: 0.5 * precision * v**2, base, log_normalizer=log_z)
    with pytest.raises(ValueError, match=OTHER):
        ebm.EnergyDistribution(
            lambda v: 0.5 * precision[::-1] * v**2, base, log_normalizer=log_z
        )


def test_an_energy_that_changes_after_its_certificate_was_taken():
    """A training step, an array written to, other factors: the certificate is held
    against what the energy is now."""
    weight = np.array([1.0])
    energy = lambda v: 0.5 * weight[0] * v**2  # noqa: E731
    known = ebm.EnergyDistribution(
        energy, NORMAL, log_normalizer=exactly(energy, NORMAL)
    )
    assert known.log_prob(0.0) == pytest.approx(
        float(dist.Normal(0, 0.5**0.5).log_prob(0.0)), abs=1e-4
    )
    weight[:] = 24.0
    with pytest.raises(ValueError, match=OTHER):
        known.log_prob(0.0)
    weight[:] = 1.0
    assert np.isfinite(known.log_prob(0.0))
    known.factors = {"energy": Partial(lambda v: 12.0 * v**2)}
    with pytest.raises(ValueError, match=OTHER):
        known.log_prob(0.0)


def scaled(x=None, scale=1.0):
    a = numpyro.sample("a", dist.Gamma(2.0, 2.0))
    with numpyro.plate("rows", 8):
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: scale * a * v**2, NORMAL), obs=x
        )


def ising(x, beta=1.0):
    coupling = numpyro.param("J", 0.5)
    with numpyro.plate("n", len(x)):
        energy = ebm.EnergyDistribution(lambda v: -beta * coupling * v.sum(-1), COINS)
        numpyro.sample("x", energy, obs=x)


def test_other_arguments_of_a_discrete_model():
    states = jnp.array([[(i >> j) & 1 for j in range(4)] for i in range(16)])
    log_z = ebm.log_normalizer(
        None, ising, {"J": jnp.array(0.5)}, states, method="enumeration"
    )
    known = ebm.normalized(ising, log_z)
    total = np.exp(log_likelihood(known, {}, states, batch_ndims=0)["x"]).sum()
    assert total == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match=OTHER):
        log_likelihood(known, {}, states, beta=8.0, batch_ndims=0)


def test_other_arguments_with_log_z_at_draws():
    draws = {"a": jnp.array([0.5, 1.0, 2.0])}
    log_z = ebm.log_normalizer(
        None, scaled, draws, X, method="quadrature", batch_ndims=1
    )
    known = ebm.normalized(scaled, log_z)
    found = log_likelihood(known, log_z.samples, X)["x"]
    exact = jax.vmap(lambda a: dist.Normal(0, (1 + 2 * a) ** -0.5).log_prob(X))(
        draws["a"]
    )
    np.testing.assert_allclose(found, exact, atol=1e-4)
    with pytest.raises(ValueError, match=OTHER):
        log_likelihood(known, log_z.samples, X, scale=2.0)


def test_other_values_of_fixed_parameters():
    log_z = ebm.log_normalizer(
        None, scaled, {"a": jnp.array(1.0)}, X, method="quadrature"
    )
    with pytest.raises(
        ValueError, match=r"Site 'a' was given another value.*batch_ndims"
    ):
        handlers.trace(
            handlers.substitute(ebm.normalized(scaled, log_z), {"a": 2.0})
        ).get_trace(X)


def test_a_mismatch_inside_a_trace_that_could_be_seen_is_raised():
    """The energy is made of numbers, the values are traced: compared when traced, not
    by NaN in every step."""
    log_z = exactly(bowl, NORMAL)

    def log_prob(v):
        return ebm.EnergyDistribution(bump(1.0), NORMAL, log_normalizer=log_z).log_prob(
            v
        )

    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(ValueError, match=OTHER):
            transform(log_prob)(jnp.ones(3) if transform is jax.vmap else 1.0)


def beside_a_latent(x, y):
    """The energy has a fixed parameter; ``loc`` is sampled."""
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    loc = numpyro.sample("loc", NORMAL)
    with numpyro.plate("n", 8):
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, NORMAL), obs=x
        )
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)


def test_other_latents_are_sampled_beside_a_fixed_energy():
    """The posterior of ``loc`` in closed form: the energy's log Z is a constant and
    does no harm."""
    log_z = ebm.log_normalizer(
        None, beside_a_latent, {"rate": jnp.array(3.0)}, X, X, method="quadrature"
    )
    known = ebm.normalized(beside_a_latent, log_z)
    mcmc = MCMC(NUTS(known), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(random.key(0), X, X)
    draws = mcmc.get_samples()["loc"]
    assert abs(float(draws.mean()) - X.sum() / 9) < 5 * (1 / 3) / np.sqrt(300)
    found = log_likelihood(known, {"loc": draws[:3]}, X, X)["x"]
    np.testing.assert_allclose(
        found, np.tile(dist.Normal(0, 0.5).log_prob(X), (3, 1)), atol=1e-4
    )


# A constant log Z and an energy that varies

FLAT = dist.ImproperUniform(constraints.real, (), ())
PRECISIONS = jnp.array([1.0, 4.0])


def of_state(k, log_normalizer):
    return ebm.EnergyDistribution(
        lambda v: 0.5 * PRECISIONS[k] * v**2,
        FLAT,
        start=NORMAL,
        log_normalizer=log_normalizer,
    )


def discrete_model(log_normalizer):
    def model(x):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("mu", NORMAL)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", of_state(k, log_normalizer(k)), obs=x)

    return model


def gibbs(log_normalizer):
    kernel = DiscreteHMCGibbs(NUTS(discrete_model(log_normalizer), max_tree_depth=2))
    mcmc = MCMC(kernel, num_warmup=50, num_samples=1000, progress_bar=False)
    mcmc.run(random.key(0), X)
    return mcmc.get_samples()["k"]


LOG_Z = [0.5 * np.log(2 * np.pi / lam) for lam in (1.0, 4.0)]


@pytest.mark.parametrize("constant", [0.0, LOG_Z[0], LOG_Z[1]])
def test_a_discrete_latent_in_the_energy_beside_a_constant(constant):
    with pytest.raises(
        ebm.UnknownNormalizerError, match=r"site 'x' varies while sites .*'k'.*constant"
    ):
        gibbs(lambda k: constant)


def test_a_certified_log_z_of_one_state():
    certified = [
        exactly(lambda v, lam=lam: 0.5 * lam * v**2, FLAT, start=NORMAL)
        for lam in (1.0, 4.0)
    ]
    for log_z in certified:
        with pytest.raises(
            (ValueError, ebm.UnknownNormalizerError),
            match=r"another energy|varies while",
        ):
            gibbs(lambda k, log_z=log_z: log_z)


def test_mixed_hmc_beside_a_constant():
    kernel = MixedHMC(HMC(discrete_model(lambda k: 0.0), trajectory_length=0.3))
    with pytest.raises(ebm.UnknownNormalizerError, match="varies while sites"):
        MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False).run(
            random.key(0), X
        )


def test_a_log_z_per_state_is_right():
    """P(k = 1 | x) in closed form."""
    draws = gibbs(lambda k: jnp.array(LOG_Z)[k])
    joint = [float(dist.Normal(0, lam**-0.5).log_prob(X).sum()) for lam in (1.0, 4.0)]
    exact = 1 / (1 + np.exp(joint[0] - joint[1]))
    # Draws of k are nearly independent: its conditional does not depend on mu.
    assert abs(float(draws.mean()) - exact) < 5 * np.sqrt(exact * (1 - exact) / 300)


def test_draws_mapped_over_beside_a_constant():
    def model(x):
        lam = numpyro.sample("lam", dist.Gamma(2.0, 2.0))
        with numpyro.plate("n", len(x)):
            energy = ebm.EnergyDistribution(
                lambda v: 0.5 * lam * v**2, FLAT, log_normalizer=0.7
            )
            numpyro.sample("x", energy, obs=x)

    with pytest.raises(
        ebm.UnknownNormalizerError, match="site 'x' varies while sites 'lam'"
    ):
        log_likelihood(model, {"lam": jnp.array([1.0, 2.0])}, X)


# Pytrees


def partial_bowl(lam, v):
    return 0.5 * lam * v**2


def with_constant(lam):
    return ebm.EnergyDistribution(
        Partial(partial_bowl, lam), NORMAL, log_normalizer=jnp.array(-0.3466)
    )


def through_ravel(lam):
    flat, back = ravel_pytree(with_constant(lam))
    return back(flat).log_prob(1.0)


PYTREES = {
    "the distribution itself": lambda: jax.grad(lambda d: d.log_prob(1.0))(
        with_constant(1.0)
    ),
    "under jit": lambda: jax.grad(lambda d: jax.jit(lambda d: d.log_prob(1.0))(d))(
        with_constant(1.0)
    ),
    "ravel_pytree": lambda: jax.grad(through_ravel)(1.0),
    "tree.map": lambda: jax.grad(
        lambda lam: jax.tree.map(
            lambda leaf: leaf + 0 * lam, with_constant(lam)
        ).log_prob(1.0)
    )(1.0),
    "tree.map with a scale": lambda: jax.grad(
        lambda s: jax.tree.map(lambda leaf: s * leaf, with_constant(1.0)).log_prob(1.0)
    )(1.0),
}


@pytest.mark.parametrize("case", PYTREES)
def test_a_constant_is_no_leaf(case):
    with pytest.raises(ebm.UnknownNormalizerError, match="constant"):
        PYTREES[case]()


def test_arrays_changed_behind_a_constant():
    changed = jax.tree.map(lambda leaf: 1.1 * leaf, with_constant(1.0))
    with pytest.raises(
        ValueError,
        match=r"arrays inside the energy were changed.*constant log_normalizer",
    ):
        changed.log_prob(1.0)
    same = jax.tree.map(lambda leaf: 1.0 * leaf, with_constant(1.0))
    assert same.log_prob(1.0) == with_constant(1.0).log_prob(1.0)


def test_log_z_that_follows_the_parameters_stays_a_leaf():
    def known(lam):
        log_z = -0.5 * jnp.log1p(lam)
        return ebm.EnergyDistribution(
            Partial(partial_bowl, lam), NORMAL, log_normalizer=log_z
        )

    slope = jax.grad(
        lambda lam: jax.tree.map(lambda leaf: leaf + 0.0, known(lam)).log_prob(1.0)
    )(1.0)
    assert slope == pytest.approx(-0.5 + 0.25, rel=1e-5)


def test_a_distribution_out_of_vmap():
    def known(lam):
        base = NORMAL.expand([2]).to_event(1)
        energy = Partial(lambda lam, v: 0.5 * lam * (v**2).sum(-1), lam)
        return ebm.EnergyDistribution(energy, base, log_normalizer=-jnp.log1p(lam))

    lams = jnp.array([1.0, 2.0, 3.0])
    stacked = jax.vmap(known)(lams)
    right = jax.vmap(lambda d, v: d.log_prob(v))(stacked, jnp.ones((3, 2)))
    np.testing.assert_allclose(
        right,
        [dist.Normal(0, (1 + lam) ** -0.5).log_prob(np.ones(2)).sum() for lam in lams],
    )
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    assert one.log_prob(jnp.ones(2)) == pytest.approx(float(right[1]))
    for call in (
        lambda: stacked.log_prob(jnp.ones((3, 2))),
        lambda: stacked.energy(jnp.ones((4, 3, 2))),
        lambda: stacked.sample(random.key(0), (3,)),
        lambda: ebm.log_normalizer(random.key(0), stacked, progress_bar=False),
        lambda: ebm.sample(random.key(0), stacked),
    ):
        with pytest.raises(
            ValueError, match=r"came out of jax\.vmap.*jax\.vmap\(lambda d, v"
        ):
            call()


# Several energy sites


def chain(x1=None, x2=None):
    t = numpyro.param("t", 1.0)
    a = numpyro.sample(
        "x1", ebm.EnergyDistribution(lambda v: 0 * t * v, dist.Normal(5.0, 1.0)), obs=x1
    )
    numpyro.sample(
        "x2",
        ebm.EnergyDistribution(
            lambda v: 2.0 * (v - a) ** 2 * v**2, dist.Normal(0.0, 1.0)
        ),
        obs=x2,
    )


T = {"t": jnp.array(1.0)}


def test_a_site_that_depends_on_one_left_out():
    for call in (
        lambda: ebm.sample(random.key(0), chain, T),
        lambda: ebm.log_normalizer(None, chain, T, method="quadrature"),
        lambda: ebm.log_normalizer(random.key(0), chain, T, progress_bar=False),
    ):
        with pytest.raises(
            ValueError,
            match="site 'x2' depends on the value of energy site 'x1', which has none",
        ):
            call()


def test_a_site_that_depends_on_data_says_so():
    log_z = ebm.log_normalizer(None, chain, T, 4.0, method="quadrature")
    grid = np.linspace(-8, 8, 40_001)
    exact = np.log(
        np.trapezoid(np.exp(-2 * (grid - 4) ** 2 * grid**2 - grid**2 / 2), grid)
        / np.sqrt(2 * np.pi)
    )
    assert float(log_z.estimate["x2"]) == pytest.approx(exact, abs=1e-4)
    assert log_z.conditions == {"x1": (), "x2": ("x1",)}
    assert "x2: log Z at the model's present value of 'x1'" in str(log_z)
    with pytest.raises(ValueError, match=OTHER):
        handlers.trace(ebm.normalized(chain, log_z)).get_trace(5.0, 0.0)


def test_independent_sites_need_no_value():
    def model():
        numpyro.sample("x1", ebm.EnergyDistribution(bowl, NORMAL))
        numpyro.sample("x2", ebm.EnergyDistribution(bowl, NORMAL))

    log_z = ebm.log_normalizer(None, model, method="quadrature")
    assert log_z.conditions == {"x1": (), "x2": ()}


def test_a_mask_that_changed_ends_a_constant_log_z():
    """Boolean arrays belong to the energy as numbers do."""
    keep = jnp.array([True, False])
    energy = Partial(lambda keep, v: jnp.where(keep, v**2, 0.0).sum(-1), keep)
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    log_z = -0.5 * np.log(3.0)
    known = ebm.EnergyDistribution(energy, base, log_normalizer=log_z)
    assert np.isfinite(known.log_prob(jnp.zeros(2)))
    changed = jax.tree.map(
        lambda a: ~a if jnp.issubdtype(jnp.result_type(a), bool) else a, known
    )
    with pytest.raises(ValueError, match="were changed"):
        changed.log_prob(jnp.zeros(2))


def test_a_masked_base_that_counts_without_end_has_marks():
    base = dist.Poisson(3.0).mask(True)
    energy = ebm.EnergyDistribution(lambda v: 0.1 * v, base)
    assert len(fingerprint(energy).points) > 0


def test_another_structure_than_the_one_log_z_belongs_to():
    def model(x=None):
        net = numpyro.param("net", {"a": jnp.ones(()), "b": jnp.zeros(())})
        energy = ebm.EnergyDistribution(
            lambda v: net["a"] * v**2 + sum(net.values()), NORMAL
        )
        numpyro.sample("x", energy, obs=x)

    params = {"net": {"a": jnp.ones(()), "b": jnp.zeros(())}}
    log_z = ebm.log_normalizer(None, model, params, method="quadrature")
    known = ebm.normalized(model, log_z)
    given = handlers.substitute(known, data={"net": {"a": jnp.ones(())}})
    with pytest.raises(ValueError, match="'net' was given a value of structure"):
        handlers.seed(given, random.key(0))(jnp.zeros(()))


@pytest.mark.parametrize("around", [handlers.do, handlers.condition])
def test_values_given_around_a_normalised_model(around):
    """They act on sample sites, which a constant log Z has fixed: they were ignored."""

    def model(x):
        lam = numpyro.sample("lam", dist.Gamma(2.0, 2.0))
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda v: 0.5 * lam * v**2, NORMAL)
            numpyro.sample("x", energy, obs=x)

    params = {"lam": jnp.float32(2.0)}
    log_z = ebm.log_normalizer(None, model, params, X, method="quadrature")
    known = ebm.normalized(model, log_z)
    draws = {"other": jnp.zeros(1)}
    with pytest.raises(ValueError, match="Site 'lam' was given another value"):
        log_likelihood(around(known, data={"lam": 3.0}), draws, X)
    same = log_likelihood(around(known, data={"lam": jnp.float32(2.0)}), draws, X)
    expected = norm.logpdf(X, 0, 3**-0.5)
    np.testing.assert_allclose(same["x"][0], expected, rtol=1e-5)


def test_one_sites_value_is_a_number_if_it_is_certified():
    log_z = exactly(bowl, NORMAL)
    assert float(log_z) == pytest.approx(-0.5 * np.log(2.0), rel=1e-5)
    assert log_z.value is log_z.estimate["x"]

    two = ebm.LogNormalizer.exact({"x": 0.0, "y": 1.0})
    with pytest.raises(
        ValueError, match=r"one log Z for each of the sites \['x', 'y'\]"
    ):
        float(two)
    with pytest.raises(ebm.UncertifiedNormalizerError):
        float(ebm.LogNormalizer.exact({"x": np.inf}))
