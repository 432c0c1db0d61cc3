"""An energy is a pure function of one point, in floats, and as it is now."""

import array
import collections
import contextvars
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from jax.tree_util import Partial
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, log_likelihood

import ebm_ppl as ebm
from ebm_ppl.energy.pointwise import require_pointwise
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.content import content_of
from ebm_ppl.programs.snapshot import snapshot

X = (np.random.default_rng(0).normal(size=40) * 0.7).astype(np.float32)
NORMAL = dist.Normal(0.0, 1.0)
KEY = random.key(0)


def model_of(energy, base=NORMAL):
    """A model with one parameter, w = 1, and the energy ``energy(w, v)``."""

    def model(x=None):
        w = numpyro.param("w", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", 40):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: energy(w, v), base), obs=x
            )

    return model


AT_ONE = {"w": jnp.array(1.0)}
BATCHES = {
    "standardised": lambda w, v: 0.5 * w * ((v - v.mean(0)) / (0.1 + v.std(0))) ** 2,
    "less the largest": lambda w, v: w * v**2 - (w * v**2).max(),
    "centred": lambda w, v: w * v**2 - 0.01 * jnp.mean(v**2),
    "over their number": lambda w, v: w * v**2 / len(v),
    "in order": lambda w, v: w * v**2 + 0.1 * jnp.arange(len(v)),
    "running": lambda w, v: w * jnp.cumsum(v**2),
    "ranked": lambda w, v: w * jnp.argsort(v) / 10.0,
    "softmax over rows": lambda w, v: -jnp.log(jax.nn.softmax(w * v, axis=0)),
}
ENTRIES = {
    "Jarzynski": lambda m: ebm.Jarzynski(m, optax.sgd(0.1), num_walkers=4).init(KEY, X),
    "log_normalizer": lambda m: ebm.log_normalizer(
        KEY, m, AT_ONE, X, progress_bar=False
    ),
    "quadrature": lambda m: ebm.log_normalizer(None, m, AT_ONE, X, method="quadrature"),
    "sample": lambda m: ebm.sample(KEY, m, AT_ONE, X),
    "to_arviz": lambda m: ebm.to_arviz({"w": np.ones((1, 2))}, m, X),
    "normalized": lambda m: log_likelihood(ebm.normalized(m), AT_ONE, X, batch_ndims=0),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_that_see_each_other(batch):
    match = (
        r"site 'x' is no function of one value.*among 8 values.*leading "
        r"axis.*base\.expand"
    )
    with pytest.raises(ValueError, match=match):
        ENTRIES["quadrature"](model_of(BATCHES[batch]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_looks_at_rows(entry):
    with pytest.raises(ValueError, match="site 'x' is no function of one value"):
        ENTRIES[entry](model_of(BATCHES["standardised"]))


def test_a_bare_distribution_is_looked_at():
    site = ebm.EnergyDistribution(lambda v: v**2 - v.mean(), NORMAL)
    for call in (
        lambda: ebm.log_normalizer(None, site, method="quadrature"),
        lambda: ebm.log_normalizer(KEY, site, progress_bar=False),
        lambda: ebm.sample(KEY, site),
    ):
        with pytest.raises(ValueError, match="site 'x' is no function of one value"):
            call()


def test_draws_under_a_trace_give_no_number():
    """log_likelihood maps over draws: nothing can be raised, and nothing can be read
    either."""
    found = log_likelihood(
        ebm.normalized(model_of(BATCHES["standardised"])), {"w": jnp.ones(2)}, X
    )["x"]
    assert np.isnan(found).all()
    good = log_likelihood(
        ebm.normalized(model_of(lambda w, v: w * v**2)), {"w": jnp.ones(2)}, X
    )["x"]
    np.testing.assert_allclose(good[0], dist.Normal(0, 3**-0.5).log_prob(X), atol=1e-4)


@pytest.mark.parametrize("num_rows", [3, 5, 8, 40, 2049])
def test_an_entry_per_row(num_rows):
    """Rows and points of a rule may be as many: the shapes then agree, and row i meets
    point i."""
    covariate = jnp.linspace(0, 1, num_rows)

    def model(y):
        a = numpyro.sample("a", NORMAL)
        with numpyro.plate("rows", num_rows):
            energy = lambda v: 0.5 * jnp.exp(a + covariate) * v**2  # noqa: E731
            numpyro.sample(
                "y", ebm.EnergyDistribution(energy, dist.Normal(0, 5)), obs=y
            )

    y, match = (
        jnp.ones(num_rows),
        rf"site 'y' returned {num_rows} numbers for one "
        rf"value.*expand\(\[{num_rows}\]\)",
    )
    with pytest.raises(ValueError, match=match):
        MCMC(
            NUTS(ebm.normalized(model)), num_warmup=1, num_samples=1, progress_bar=False
        ).run(KEY, y)
    with pytest.raises(ValueError, match=match):
        ebm.Jarzynski(model, optax.sgd(0.1), num_walkers=4).init(KEY, y)
    with pytest.raises(ValueError, match=match):
        ebm.log_normalizer(None, model, {"a": jnp.array(0.0)}, y, method="quadrature")


def test_an_entry_per_row_of_vectors():
    weights = jnp.ones((7, 3))
    site = ebm.EnergyDistribution(
        lambda v: (weights * v**2).sum(-1), NORMAL.expand([3]).to_event(1)
    )
    with pytest.raises(
        ValueError, match=r"returned 7 numbers for one value.*expand\(\[7\]\)"
    ):
        ebm.log_normalizer(KEY, site, progress_bar=False)


GOOD = {
    "scalar": (lambda v: v**4, NORMAL),
    "far offset": (lambda v: v**2 + 1e4, NORMAL),
    "cancels its base": (
        lambda v: NORMAL.log_prob(v) - dist.StudentT(3.0).log_prob(v),
        NORMAL,
    ),
    "infinite on a half": (lambda v: jnp.where(v > 0, v, jnp.inf), NORMAL),
    "NaN on a half": (lambda v: jnp.sqrt(v), NORMAL),
    "half precision": (
        lambda v: (v.astype(jnp.bfloat16) ** 2).astype(jnp.float32),
        NORMAL,
    ),
    "conditional": (lambda v: jnp.arange(3.0) * v**2, dist.Normal(jnp.zeros(3), 1.0)),
    "spins": (
        lambda v: -(v[..., 1:] * v[..., :-1]).sum(-1),
        dist.Bernoulli(0.5).expand([4]).to_event(1),
    ),
    "of one row, many": (
        lambda v: (v @ jnp.ones((784, 64))).sum(-1),
        NORMAL.expand([784]).to_event(1),
    ),
}


@pytest.mark.parametrize("good", GOOD)
def test_functions_of_one_point_pass(good):
    assert require_pointwise("x", ebm.EnergyDistribution(*GOOD[good])) == 0


# Types


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, bool, np.float16]
)
def test_values_of_any_type_are_floats(dtype):
    """E(x) = ½ λ x² on N(0, 1): wrapped around in small types, before."""
    site = ebm.EnergyDistribution(
        lambda v: 1.5 * v**2, NORMAL, log_normalizer=-np.log(2.0)
    )
    values = np.array([0, 1, 3, 100, 120]).astype(dtype)
    exact = dist.Normal(0, 0.5).log_prob(values.astype(np.float32))
    np.testing.assert_allclose(site.log_prob(values), exact, rtol=1e-5)
    np.testing.assert_allclose(
        site.energy(values), 1.5 * values.astype(float) ** 2, rtol=1e-5
    )
    log_base = NORMAL.log_prob(values.astype(np.float32))
    np.testing.assert_allclose(
        site.potential(values) - site.energy(values), -log_base, rtol=1e-4
    )


def test_large_integers_do_not_overflow():
    site = ebm.EnergyDistribution(lambda v: v**2, NORMAL)
    assert site.energy(np.array(50_000, np.int32)) == pytest.approx(2.5e9)


def test_small_integers_of_a_discrete_support_do_not_wrap():
    site = ebm.EnergyDistribution(lambda v: v * v, dist.Poisson(3.0))
    assert site.energy(np.array(20, np.int8)) == 400
    coins = ebm.EnergyDistribution(
        lambda v: -v.sum(-1), dist.Bernoulli(0.5).expand([300]).to_event(1)
    )
    assert coins.energy(np.ones(300, bool)) == -300


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_integer_data_fit_as_floats_do(dtype):
    data = np.abs(np.round(X * 20)).astype(dtype)

    def model(x):
        w = numpyro.param("w", 0.01, constraint=constraints.positive)
        with numpyro.plate("rows", 40):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(lambda v: 0.5 * w * v**2, dist.Normal(0, 20)),
                obs=x,
            )

    backend = ebm.Jarzynski(model, optax.adam(0.05), num_walkers=8)
    fits = [
        backend.run(KEY, 3, x, progress_bar=False)
        for x in (data, data.astype(np.float32))
    ]
    np.testing.assert_allclose(
        fits[0].history["loss"], fits[1].history["loss"], rtol=1e-6
    )
    log_z = [
        ebm.log_normalizer(None, model, fits[0].params, x, method="quadrature")
        for x in (data, 1.0 * data)
    ]
    exported = [
        ebm.to_arviz(fits[0], model, data, log_normalizer=z).attrs["mean_log_density"]
        for z in log_z
    ]
    precision = float(fits[0].params["w"]) + 1 / 400
    exact = np.mean(dist.Normal(0, precision**-0.5).log_prob(1.0 * data))
    np.testing.assert_allclose(exported, exact, atol=1e-3)


def test_vera_takes_integers():
    def generator():
        w = numpyro.param("s", 1.0)
        z = numpyro.sample("z", NORMAL)
        numpyro.sample("x", ebm.standardized_normal(NORMAL, w * z, 0.5))

    def model(x):
        w = numpyro.param("w", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", 4):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: 0.5 * w * v**2, NORMAL), obs=x
            )

    rate = optax.sgd(1e-3)
    losses = [
        ebm.VERA(model, generator, rate, rate)
        .run(KEY, 1, x, progress_bar=False)
        .history["loss"][0]
        for x in (np.array([2, -3, 1, 0]), np.array([2.0, -3.0, 1.0, 0.0], np.float32))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_energies_in_half_precision_come_back_as_floats(dtype):
    site = ebm.EnergyDistribution(
        lambda v: (0.5 * v**2).astype(dtype), NORMAL, log_normalizer=-0.5 * np.log(2.0)
    )
    assert site.energy(jnp.ones(3)).dtype == jnp.float32
    slope = jax.grad(lambda v: site.log_prob(v))(0.5)
    assert slope == pytest.approx(-1.0, abs=0.01)
    bracket = ebm.log_normalizer(
        KEY, ebm.EnergyDistribution(site.factors, NORMAL), progress_bar=False
    )
    assert (
        abs(float(bracket.estimate["x"]) + 0.5 * np.log(2.0))
        < 5 * float(bracket.stderr["x"]) + 2**-8
    )


def test_an_energy_of_integers():
    site = ebm.EnergyDistribution(lambda v: (v > 0).astype(jnp.int8), NORMAL)
    assert site.energy(jnp.array([-1.0, 1.0])).dtype == jnp.float32
    with pytest.raises(TypeError, match="returned complex64; expected real numbers"):
        ebm.EnergyDistribution(lambda v: v * 1j, NORMAL).energy(jnp.ones(2))


# State


class Bowl:
    """An energy object, ``½ λ v²``."""

    lam = 1.0

    def __call__(self, v):
        return 0.5 * self.lam * v**2


class NnxBowl(nnx.Module):
    def __init__(self):
        self.lam = nnx.Param(jnp.array(1.0))

    def __call__(self, v):
        return 0.5 * self.lam[...] * v**2


def set_attribute(energy, value):
    energy.lam = value


def set_param(energy, value):
    energy.lam[...] = jnp.array(value)


STATEFUL = {"attribute": (Bowl, set_attribute), "nnx": (NnxBowl, set_param)}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize(
    "wrap", [lambda e: e, lambda e: Partial(e), lambda e: lambda v: e(v)]
)
def test_an_energy_that_changed_is_compiled_anew(kind, wrap):
    make, change = STATEFUL[kind]
    energy = make()
    factor = wrap(energy)
    for lam in (1.0, 9.0):
        change(energy, lam)
        log_z = ebm.log_normalizer(
            KEY, ebm.EnergyDistribution(factor, NORMAL), progress_bar=False
        )
        assert abs(float(log_z.estimate["x"]) + 0.5 * np.log1p(lam)) < 6 * float(
            log_z.stderr["x"]
        )
        draws = ebm.sample(KEY, ebm.EnergyDistribution(factor, NORMAL), num_draws=500)[
            "x"
        ]
        assert float(draws.var()) == pytest.approx(1 / (1 + lam), rel=0.3)


def test_a_model_whose_closure_changed_is_compiled_anew():
    """The same model and backend objects: fits and log Z follow what the closure holds
    now."""
    settings = {"scale": np.ones(1)}

    def model(x):
        w = numpyro.param("w", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", 40):
            energy = lambda v: 0.5 * settings["scale"] * w * v**2  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, NORMAL), obs=x)

    backend = ebm.Jarzynski(model, optax.sgd(1e-3), num_walkers=8)
    losses = []
    for scale in (1.0, 4.0, 1.0):
        settings["scale"][0] = scale
        losses.append(backend.run(KEY, 1, X, progress_bar=False).history["loss"][0])
        log_z = ebm.log_normalizer(KEY, model, AT_ONE, X, progress_bar=False)
        assert abs(float(log_z.estimate["x"]) + 0.5 * np.log1p(scale)) < 6 * float(
            log_z.stderr["x"]
        )
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 0.1


def test_what_has_not_changed_is_not_compiled_again():
    net = NnxBowl()

    def model(x):
        return net(x) + X.sum() + Bowl.lam

    first = snapshot(model)
    net(jnp.ones(3))
    assert snapshot(model) == first
    assert hash(snapshot(model)) == hash(first)
    assert snapshot(first) is first
    set_param(net, 2.0)
    assert snapshot(model) != first


class Slots:
    __slots__ = ("__lam", "shown")

    def __init__(self, lam):
        self.__lam, self.shown = lam, 0.0

    def change(self):
        self.__lam += 1.0


CONTEXT = contextvars.ContextVar("context", default=1.0)
CONTAINERS = {
    "deque": (lambda: collections.deque([1.0]), lambda c: c.append(2.0)),
    "array": (lambda: array.array("d", [1.0]), lambda c: c.__setitem__(0, 2.0)),
    "bytearray": (lambda: bytearray(b"1"), lambda c: c.extend(b"2")),
    "private slot": (lambda: Slots(1.0), lambda c: c.change()),
    "mask": (
        lambda: np.ma.masked_array([1.0, 2.0], [False, False]),
        lambda c: c.__setitem__(0, np.ma.masked),
    ),
    "context variable": (lambda: CONTEXT, lambda c: c.set(2.0)),
    "list subclass": (lambda: collections.UserList([1.0]), lambda c: c.append(2.0)),
    "default dict": (
        lambda: collections.defaultdict(float),
        lambda c: c.__setitem__("a", 1.0),
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_looked_into(kind):
    make, change = CONTAINERS[kind]
    held = make()

    def fn(x):
        return x, held

    before = snapshot(fn)
    assert snapshot(fn) == before
    change(held)
    assert snapshot(fn) != before


def test_a_view_of_a_dict_is_looked_into():
    inside = {"lam": 1.0}
    view = types.MappingProxyType(inside)

    def fn(x):
        return view["lam"] * x

    before = snapshot(fn)
    inside["lam"] = 2.0
    assert snapshot(fn) != before


def test_a_model_that_changes_what_it_counts_with_is_not_compiled_again():
    """A counter of its own runs is no other model; a change from outside is."""
    runs = {"count": 0, "scale": 1.0}

    def fn(x):
        runs["count"] += 1
        return runs["scale"] * x

    first = snapshot(fn)
    first(1.0)
    assert snapshot(fn) is first
    runs["scale"] = 2.0
    assert snapshot(fn) != first


def test_everything_that_a_function_refers_to_counts(monkeypatch):
    table = {"a": [1.0, np.zeros(2)]}
    default = np.zeros(2)

    def inner():
        return table["a"]

    def fn(x, given=default):
        return inner(), given, STATEFUL

    changes = [
        lambda: table["a"][1].__setitem__(0, 1.0),
        lambda: table["a"].append(2),
        lambda: default.__setitem__(1, 3.0),
        lambda: monkeypatch.setitem(STATEFUL, "more", 1),
        lambda: monkeypatch.setattr(Bowl, "lam", 2.0),
    ]
    for change in changes:
        before = snapshot(fn)
        assert before == snapshot(fn)
        change()
        assert before != snapshot(fn)


SCALE = {"of a call": 1.0, "of a base class": 1.0}


class Inherited:
    def inherited(self, x):
        return SCALE["of a base class"] * x


class Called(Inherited):
    def __call__(self, x):
        return SCALE["of a call"] * self.inherited(x)


@pytest.mark.parametrize("name", SCALE)
def test_methods_of_any_name_and_of_base_classes_are_looked_into(monkeypatch, name):
    called = Called()
    before = snapshot(called)
    assert before == snapshot(called)
    monkeypatch.setitem(SCALE, name, 2.0)
    assert before != snapshot(called)


def test_a_method_as_an_argument_counts_with_its_object():
    bowl = Bowl()

    def arguments():
        return jax.tree.structure(Arguments((bowl.__call__,)))

    before = arguments()
    assert before == arguments()
    bowl.lam = 7.0
    assert before != arguments()


def test_the_neighbour_of_a_library_is_none(monkeypatch):
    """Its globals count, although its path begins as the library's does."""
    root = pathlib.Path(ebm.__file__).parent
    code = "def fn(x):\n    return held[0] * x\n"
    scope = {"held": [1.0], "__name__": "neighbour"}
    exec(compile(code, f"{root}_models/neighbour.py", "exec"), scope)
    before = snapshot(scope["fn"])
    scope["held"][0] = 2.0
    assert before != snapshot(scope["fn"])


def test_a_cached_inverse_is_no_change():
    """NumPyro's transforms keep a weak reference to their inverse, another one each time:
    with a log-normal base every call compiled everything anew."""
    base = dist.LogNormal(0.5, 0.7)
    (transform,) = base.transforms
    contents = []
    for _ in range(2):
        transform.inv(jnp.ones(()))
        contents.append(content_of(base))
    assert contents[0] == contents[1]
