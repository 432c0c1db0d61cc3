"""The log density of every row, and fitted energies outside of their model, against
closed forms."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax import random
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer.util import log_density
from scipy import stats

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("log density")

RATE = 2.5
PARAMS = {"rate": jnp.asarray(RATE)}
X = np.random.default_rng(0).normal(size=30).astype(np.float32)
NEW = np.random.default_rng(1).normal(size=47).astype(np.float32)
NORMAL = dist.Normal(0.0, 1.0)


def model(x, num_rows=None, subsample_size=None):
    """E = ½ (λ − 1) v² on N(0, 1): a Gaussian of precision λ."""
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
    num_rows = len(x) if num_rows is None else num_rows
    with numpyro.plate("rows", num_rows, subsample_size=subsample_size):
        batch = x if subsample_size is None else numpyro.subsample(x, event_dim=0)
        numpyro.sample("x", energy, obs=batch)


def at(rate=RATE, rows=X, model=model):
    params = {"rate": jnp.asarray(rate)}
    return ebm.log_normalizer(None, model, params, rows, method="quadrature")


def exact(rows, rate=RATE):
    return stats.norm.logpdf(rows, scale=rate**-0.5)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


# Rows


def test_other_rows_than_those_that_log_z_saw():
    found = ebm.log_density(PARAMS, model, NEW, log_normalizer=at())
    assert list(found) == ["x"]
    close(found["x"], exact(NEW))


def test_handlers_around_a_call_do_not_reach_the_model():
    """A rate of 7 would be scored, and certified, under the label of 2.5."""
    around = handlers.substitute(data={"rate": 7.0}), handlers.mask(mask=False)
    with around[0], around[1], handlers.scale(scale=3.0):
        found = ebm.log_density(PARAMS, model, NEW, log_normalizer=at())
    close(found["x"], exact(NEW))


def test_every_plate_has_its_full_size():
    found = ebm.log_density(PARAMS, model, NEW, subsample_size=5, log_normalizer=at())
    close(found["x"], exact(NEW))


def test_a_plate_of_another_size_than_the_rows():
    """The size of the plate is that of the training rows; new ones are a batch."""
    found = ebm.log_density(PARAMS, model, NEW, len(NEW), 5, log_normalizer=at())
    close(found["x"], exact(NEW))


@pytest.mark.parametrize("batch_size", [1, 7, 47, 1000])
def test_batches_change_nothing(batch_size):
    found = ebm.log_density(
        PARAMS, model, NEW, log_normalizer=at(), batch_size=batch_size
    )
    close(found["x"], exact(NEW))


def test_many_rows_are_computed_in_batches():
    """No array is longer than a batch, and each is compiled once."""
    sizes = []

    def watched(x):
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)

        def energy(v):
            sizes.append(len(v))
            return 0.5 * (rate - 1.0) * v**2

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, NORMAL), obs=x)

    log_z = at(model=watched)
    rows = np.resize(NEW, 5_000)
    sizes.clear()
    found = ebm.log_density(PARAMS, watched, rows, log_normalizer=log_z, batch_size=512)
    close(found["x"], exact(rows))
    marks = len(log_z.fingerprints["x"].points)
    assert sizes == [marks, 512]


def test_a_skewed_energy():
    """E = v⁴/4 − 2v on N(0, 1) against its own integral."""

    def skewed(x):
        a = numpyro.param("a", 0.0)
        energy = ebm.EnergyDistribution(lambda v: 0.25 * v**4 - a * v, NORMAL)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    params = {"a": jnp.asarray(2.0)}
    log_z = ebm.log_normalizer(None, skewed, params, X, method="quadrature")
    grid = np.linspace(-8, 8, 200_001)
    density = np.exp(stats.norm.logpdf(grid) - 0.25 * grid**4 + 2 * grid)
    expected = stats.norm.logpdf(NEW) - 0.25 * NEW**4 + 2 * NEW
    found = ebm.log_density(params, skewed, NEW, log_normalizer=log_z)["x"]
    close(found, expected - np.log(np.trapezoid(density, grid)))


def test_every_observed_site_without_its_scale():
    """A joint model: labels have rows of their own, and a scale that is no likelihood's."""

    def joint(x, y=None):
        weight = numpyro.param("weight", jnp.ones((2, 3)))
        logits = lambda v: v @ weight  # noqa: E731
        base = dist.Normal(0, 1).expand([2]).to_event(1)
        energy = ebm.EnergyDistribution(lambda v: -logsumexp(logits(v), -1), base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)
            with handlers.scale(scale=7.0):
                numpyro.sample("y", dist.Categorical(logits=logits(x)), obs=y)

    weight = np.array([[1.0, -1.0, 0.5], [0.0, 0.5, -1.0]], np.float32)
    rows, labels = NEW[:46].reshape(23, 2), np.arange(23) % 3
    params = {"weight": jnp.asarray(weight)}
    log_z = ebm.log_normalizer(None, joint, params, rows, method="quadrature")
    found = ebm.log_density(params, joint, rows, labels, log_normalizer=log_z)

    # Z = Σ_k exp(½ ‖w_k‖²)
    logits = rows @ weight
    expected = stats.norm.logpdf(rows).sum(1) + logsumexp(logits, 1)
    close(found["x"], expected - logsumexp(0.5 * (weight**2).sum(0)))
    close(found["y"], jax.nn.log_softmax(logits)[np.arange(23), labels])

    # Labels that are unknown are no site with data, and x does not depend on them.
    assert list(ebm.log_density(params, joint, rows, log_normalizer=log_z)) == ["x"]


def test_one_log_z_per_row():
    """y given x: a Gaussian of precision 1 + x², which has another Z in every row."""

    def conditional(x, y):
        a = numpyro.param("a", 1.0)
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * a * x**2 * v**2, NORMAL.expand([len(x)])
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", energy, obs=y)

    params = {"a": jnp.asarray(1.0)}
    rows = np.linspace(0, 2, 10, dtype=np.float32)
    log_z = ebm.log_normalizer(
        None, conditional, params, rows, X[:10], method="quadrature"
    )
    found = ebm.log_density(params, conditional, rows, NEW[:10], log_normalizer=log_z)
    close(found["y"], stats.norm.logpdf(NEW[:10], scale=(1 + rows**2) ** -0.5))

    with pytest.raises(ValueError, match=r"belongs to another energy.*site 'y'"):
        ebm.log_density(params, conditional, rows + 1, NEW[:10], log_normalizer=log_z)


def test_elements_with_their_own_log_z_in_one_event():
    def rows_of_two(x):
        rates = numpyro.param("rate", jnp.ones(2))
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * (rates - 1.0) * v**2, NORMAL.expand([2])
        ).to_event(1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    rates, rows = jnp.array([2.0, 5.0]), NEW[:46].reshape(23, 2)
    log_z = ebm.log_normalizer(
        None, rows_of_two, {"rate": rates}, rows, method="quadrature"
    )
    found = ebm.log_density({"rate": rates}, rows_of_two, rows, log_normalizer=log_z)
    assert found["x"].shape == (23,)
    close(found["x"], stats.norm.logpdf(rows, scale=np.asarray(rates) ** -0.5).sum(1))


# Rows that have no density


def test_masked_rows_are_nan_and_others_as_they_were():
    def masked(x, mask):
        with handlers.mask(mask=mask):
            model(x)

    mask = np.arange(len(NEW)) % 3 > 0
    found = ebm.log_density(PARAMS, masked, NEW, mask, log_normalizer=at())["x"]
    assert np.array_equal(np.isnan(found), ~mask)
    close(found[mask], exact(NEW)[mask])


def test_rows_outside_of_the_support_have_no_density():
    def positive(x):
        rate = numpyro.param("rate", 1.0)
        energy = ebm.EnergyDistribution(lambda v: (rate - 1) * v, dist.Exponential(1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    log_z = at(model=positive, rows=np.abs(X))
    found = ebm.log_density(PARAMS, positive, NEW, log_normalizer=log_z)["x"]
    close(found, stats.expon.logpdf(NEW, scale=1 / RATE))
    assert np.isneginf(found).any()


def test_nan_data_are_told():
    rows = NEW.copy()
    rows[3] = np.nan
    with pytest.warns(UserWarning, match=r"NaN at 1 of 47 rows of site 'x'"):
        found = ebm.log_density(PARAMS, model, rows, log_normalizer=at())["x"]
    assert np.array_equal(np.isnan(found), np.isnan(rows))


# Refusals


def test_a_base_of_the_rows_is_another_one_for_other_rows():
    def of_rows(x):
        rate = numpyro.param("rate", 1.0)
        base = dist.Normal(x.mean(), x.std())
        energy = ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    log_z = at(model=of_rows)
    ebm.log_density(PARAMS, of_rows, X, log_normalizer=log_z)
    with pytest.raises(
        ValueError, match=r"site 'x'.*x\.mean\(0\).*outside of the model"
    ):
        ebm.log_density(PARAMS, of_rows, NEW, log_normalizer=log_z)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ebm.UnknownNormalizerError, r"site 'x' needs log Z: log_z = ebm_ppl"),
        (
            {"log_normalizer": 0.3},
            TypeError,
            r"is a float; expected .*LogNormalizer\.exact",
        ),
        (
            {"log_normalizer": ebm.LogNormalizer.exact({"z": 0.0}, PARAMS)},
            ValueError,
            r"has sites \['z'\].*energy site 'x'",
        ),
        (
            {"log_normalizer": ebm.LogNormalizer.exact({"x": 0.0}, {"rate": 1.0})},
            ValueError,
            r"belongs to other parameters: 'rate' differs",
        ),
        ({"batch_size": 0}, ValueError, "batch_size = 0; expected at least 1"),
    ],
)
def test_what_is_no_log_z_of_the_fit(options, error, match):
    with pytest.raises(error, match=match):
        ebm.log_density(PARAMS, model, NEW, **options)


def test_flags_are_refused_unless_they_are_allowed():
    flagged = ebm.LogNormalizer.exact({"x": np.nan}, PARAMS)
    with pytest.raises(ebm.UncertifiedNormalizerError, match="not a finite number"):
        ebm.log_density(PARAMS, model, NEW, log_normalizer=flagged)
    with pytest.warns(UserWarning, match="NaN at 47 of 47"):
        ebm.log_density(
            PARAMS, model, NEW, log_normalizer=flagged, allow_uncertified=True
        )


def test_parameters_of_another_model():
    params = PARAMS | {"other": jnp.zeros(())}
    log_z = ebm.LogNormalizer.exact({"x": 0.0}, params)
    with pytest.raises(ValueError, match=r"holds \['other'\]"):
        ebm.log_density(params, model, NEW, log_normalizer=log_z)


def test_densities_that_depend_on_what_is_drawn_at_random():
    """A latent that the fit has no value of: one draw of it is not its density."""

    def with_latent(x):
        shift = numpyro.sample("shift", NORMAL)
        numpyro.sample("z", dist.Normal(shift, 1.0).expand([3]), obs=jnp.zeros(3))
        model(x)

    with pytest.raises(ValueError, match=r"site 'z' depends .*\['shift'\]"):
        ebm.log_density(PARAMS, with_latent, NEW, log_normalizer=at())


def test_no_data_no_density():
    with pytest.raises(ValueError, match="no site is observed"):
        ebm.log_density(PARAMS, model, None, 4, log_normalizer=at())


# Energies outside of their model


def test_a_fitted_energy_is_a_distribution():
    (energy,) = ebm.fitted(PARAMS, model, X, log_normalizer=at()).values()
    close(energy.log_prob(NEW), exact(NEW))
    close(energy.energy(NEW), 0.5 * (RATE - 1) * NEW**2)


def test_a_fitted_energy_without_log_z_is_guarded():
    energy = ebm.fitted(PARAMS, model, X)["x"]
    with pytest.raises(ebm.UnknownNormalizerError, match=r"log_normalizer=0\.0"):
        energy.log_prob(NEW)


def test_a_fitted_energy_is_a_prior():
    """z with precision λ, seen with noise of variance 1: the posterior's density ratio."""
    prior = ebm.fitted(PARAMS, model, X)["x"].with_log_normalizer(0.0)

    def seen(y):
        z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    values = [
        log_density(seen, (1.5,), {}, {"z": jnp.asarray(z)})[0] for z in (0.3, 1.1)
    ]
    posterior = stats.norm(1.5 / (1 + RATE), (1 + RATE) ** -0.5)
    expected = posterior.logpdf(1.1) - posterior.logpdf(0.3)
    close(values[1] - values[0], expected)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 4, rngs=rngs)

    def __call__(self, v):
        return nnx.tanh(self.hidden(v)).sum(-1)


NETS = {
    "linen": lambda: flax_module("net", nn.Dense(1), input_shape=(2,)),
    "nnx": lambda: nnx_module("net", NnxNet(nnx.Rngs(0))),
    "equinox": lambda: jax.vmap(
        eqx_module("net", eqx.nn.MLP(2, "scalar", 4, 1, key=random.key(0)))
    ),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_nets_outside_of_their_model(net):
    """The energy that the model has, and its density."""
    base = dist.Normal(0, 1).expand([2]).to_event(1)

    def of_net(x):
        apply = net()
        energy = ebm.EnergyDistribution(lambda v: apply(v).reshape(v.shape[:1]), base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    rows = NEW[:46].reshape(23, 2)
    trace = handlers.trace(handlers.seed(of_net, 0)).get_trace(rows)
    params = {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
    log_z = ebm.log_normalizer(None, of_net, params, rows, method="quadrature")
    energy = ebm.fitted(params, of_net, rows, log_normalizer=log_z)["x"]
    close(energy.energy(rows), trace["x"]["fn"].base_dist.energy(rows))
    found = ebm.log_density(params, of_net, rows, log_normalizer=log_z)["x"]
    close(found, energy.log_prob(rows))


def test_the_right_site_gets_its_log_z():
    def two(x):
        model(x)
        shift = numpyro.param("shift", 1.0)
        numpyro.sample(
            "z", ebm.EnergyDistribution(lambda v: -shift * v, NORMAL), obs=0.0
        )

    params = PARAMS | {"shift": jnp.asarray(0.7)}
    log_z = ebm.log_normalizer(None, two, params, X, method="quadrature")
    energies = ebm.fitted(params, two, X, log_normalizer=log_z)
    close(energies["x"].log_prob(NEW), exact(NEW))
    close(energies["z"].log_prob(NEW), stats.norm.logpdf(NEW, 0.7))


def test_a_fitted_energy_refuses_another_log_z():
    with pytest.raises(ValueError, match="belongs to other parameters"):
        ebm.fitted(PARAMS, model, X, log_normalizer=at(rate=2.0))
    flagged = ebm.LogNormalizer.exact({"x": np.nan}, PARAMS)
    with pytest.raises(ebm.UncertifiedNormalizerError):
        ebm.fitted(PARAMS, model, X, log_normalizer=flagged)
    with pytest.raises(ValueError, match="no energy site"):
        ebm.fitted({}, lambda: numpyro.sample("a", NORMAL))


# What a second pair of eyes found


def hidden(x, y):
    """y is x and noise: with x unknown its density is an integral."""
    rate = numpyro.param("rate", 1.0)
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
    with numpyro.plate("rows", len(y)):
        v = numpyro.sample("x", energy, obs=x)
        numpyro.sample("y", dist.Normal(v, 1.0), obs=y)


def test_densities_that_depend_on_an_energy_without_a_value():
    """0 was put in its place, and nothing said."""
    log_z = ebm.log_normalizer(None, hidden, PARAMS, NEW, NEW, method="quadrature")
    found = ebm.log_density(PARAMS, hidden, NEW, NEW + 1, log_normalizer=log_z)
    close(found["y"], stats.norm.logpdf(NEW + 1, NEW))
    with pytest.raises(ValueError, match=r"site 'y' depends on the values of \['x'\]"):
        ebm.log_density(PARAMS, hidden, None, NEW, log_normalizer=log_z)


def test_an_energy_given_another_that_has_no_value():
    def given(a, b):
        rate = numpyro.param("rate", 1.0)
        first = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
        v = numpyro.sample("a", first, obs=a)
        second = ebm.EnergyDistribution(lambda w: -v * w, NORMAL)
        numpyro.sample("b", second, obs=b)

    log_z = ebm.log_normalizer(None, given, PARAMS, 0.0, 1.0, method="quadrature")
    with pytest.raises(ValueError, match=r"site 'b' depends on the values of \['a'\]"):
        ebm.log_density(PARAMS, given, None, 1.0, log_normalizer=log_z)


def indexed(x):
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
    with numpyro.plate("rows", 47) as rows:
        numpyro.sample("x", energy, obs=x[rows])


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_rows_that_a_plate_indexes_beyond_their_end(convert):
    """JAX takes the last row for every one beyond it."""
    log_z = at(model=indexed, rows=NEW)
    found = ebm.log_density(PARAMS, indexed, convert(NEW), log_normalizer=log_z)
    close(found["x"], exact(NEW))
    with pytest.raises(ValueError, match=r"rows that it was not given.*len\(x\)"):
        ebm.log_density(PARAMS, indexed, convert(NEW[:20]), log_normalizer=log_z)


def test_arguments_that_a_loop_indexes():
    """A traced index is nothing for NumPy."""

    def summed(x):
        total = jax.lax.fori_loop(0, 3, lambda i, t: t + x[i], 0.0)
        numpyro.deterministic("total", total)
        model(x)

    found = ebm.log_density(PARAMS, summed, NEW, log_normalizer=at())
    close(found["x"], exact(NEW))


@pytest.mark.parametrize("rows", [NEW[:1], NEW[:7]])
def test_fewer_rows_than_a_plate_has(rows):
    with pytest.raises(ValueError, match=r"site 'x' has shape .*len\(x\)"):
        ebm.log_density(PARAMS, model, rows, 10, log_normalizer=at())


def test_no_rows():
    with pytest.raises(ValueError, match="Plate 'rows' has size 0"):
        ebm.log_density(PARAMS, model, NEW[:0], log_normalizer=at())


@pytest.mark.parametrize("estimate", [np.zeros(4), np.zeros(47)])
def test_a_log_z_of_another_shape(estimate):
    log_z = ebm.LogNormalizer.exact({"x": estimate}, PARAMS)
    with pytest.raises(
        ValueError, match=r"log Z of shape .*site 'x', whose batch shape"
    ):
        ebm.log_density(PARAMS, model, NEW, log_normalizer=log_z)


def test_a_batch_axis_of_one():
    def one(x):
        rate = numpyro.param("rate", 1.0)
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL.expand([1])
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    log_z = ebm.LogNormalizer.exact({"x": np.zeros(1)}, PARAMS)
    with pytest.raises(ValueError, match=r"has shape \(47,\); expected \(\.\.\., 1\)"):
        ebm.log_density(PARAMS, one, NEW, log_normalizer=log_z)


def test_arguments_in_the_wrong_places():
    with pytest.raises(
        TypeError, match="model is a ndarray; expected the NumPyro model"
    ):
        ebm.log_density(PARAMS, NEW, log_normalizer=at())
    with pytest.raises(TypeError, match="give it by name: log_normalizer=log_z"):
        ebm.log_density(PARAMS, model, NEW, at())
