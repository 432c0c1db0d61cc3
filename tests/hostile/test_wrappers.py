"""Arguments of every kind, optimisers that want the loss, wrapped energies, messages
without a name."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO, log_likelihood

import ebm_ppl as ebm
from ebm_ppl.programs.arguments import Arguments, is_numeric
from ebm_ppl.programs.equality import content

X = np.random.default_rng(0).normal(size=20).astype(np.float32)
NORMAL = dist.Normal(0, 1)
SETTINGS = {"num_chains": 6, "num_walkers": 8}


def bowl(k, base=NORMAL):
    """N(0, 1 / (1 + 2k)), log Z = −½ log(1 + 2k)."""
    return ebm.EnergyDistribution(lambda v: k * v**2, base)


def exact(k):
    return -0.5 * np.log1p(2 * k)


def learned():
    return numpyro.param("k", 1.0, constraint=constraints.positive)


def model(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", bowl(learned()), obs=x)


def initialise(model, *args, optim=None, **options):
    backend = ebm.Jarzynski(
        model, optax.sgd(0.1) if optim is None else optim, **SETTINGS
    )
    return backend, backend.init(random.key(0), *args, **options)


def log_z(model, *args, params=None):
    params = {"k": 1.0} if params is None else params
    return float(
        ebm.log_normalizer(None, model, params, *args, method="quadrature").estimate[
            "x"
        ]
    )


# What arguments hold


class Plain:
    """Compared by identity, as classes are that say nothing."""

    def __init__(self, k):
        self.k = k
        self.function = np.sqrt
        self.itself = self


@dataclass
class Unhashable:
    k: float


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = np.array([k])


class Tensor:
    """An array of another library."""

    def __init__(self, k):
        self.k = k

    def __array__(self, dtype=None, copy=None):
        return np.array([self.k, self.k], dtype)


class Labelled(Tensor):
    """An array that is the same, with labels that are not."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros(2, dtype)


class Detached(Tensor):
    """One that is no array before it is asked politely."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("detach first")


class Opaque(Tensor):
    """One that nothing can be told of but its array."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle")


def frame(k):
    return pd.DataFrame(
        {"k": [k, 2.0], "name": ["a", "b"]}, index=pd.Index([3, 4], name="row")
    )


def strings(k):
    return np.array([str(k), "b"])


def objects(k):
    return np.array([k, None, "b"], object)


MAKERS = [
    Plain,
    Unhashable,
    Slotted,
    Tensor,
    Labelled,
    Detached,
    Opaque,
    frame,
    strings,
    objects,
    lambda k: frame(k)["k"],
    lambda k: pd.Series(
        ["a", "b"], dtype=pd.CategoricalDtype(["a", "b"] if k == 1.0 else ["b", "a"])
    ),
    lambda k: {"nested": [k, (frame(k), {k, "other"})]},
    lambda k: functools.partial(np.power, k),
    lambda k: float("nan") if k == 1.0 else k,
]


@pytest.mark.parametrize("make", MAKERS)
def test_content_is_what_makes_arguments_equal(make):
    one, copy, other = (
        jax.tree.structure(Arguments((make(k),), {"flag": True}))
        for k in (1.0, 1.0, 3.0)
    )
    assert one == copy
    assert hash(one) == hash(copy)
    assert one != other


@pytest.mark.parametrize(
    ("make", "change"), [(Plain, "k"), (Unhashable, "k"), (Tensor, "k"), (Opaque, "k")]
)
def test_an_object_changed_in_place_is_another_argument(make, change):
    value = make(1.0)
    before = content(value)
    setattr(value, change, 3.0)
    assert content(value) != before


def test_a_frame_changed_in_place_is_another_argument():
    value = frame(1.0)
    before = content(value)
    value.loc[3, "k"] = 5.0
    assert content(value) != before


def test_types_belong_to_content():
    assert len({content(value) for value in (1, 1.0, True, "1", b"1", 1j)}) == 6
    assert content(0.0) != content(-0.0)
    for function in (np.sqrt, jax.nn.relu, jax.jit(jnp.square), jnp.add, "".join):
        assert content(function) == content(function)
    assert content(functools.partial(lambda: 0)) != content(
        functools.partial(lambda: 0)
    )


def test_numbers_are_traced_and_nothing_else_is():
    values = (
        X,
        jnp.ones(2),
        np.float32(1),
        np.ones(2, np.int8),
        np.array(["a"]),
        np.array([1], object),
        "a",
        1.0,
    )
    leaves = jax.tree.leaves(Arguments(values))
    assert [leaf.shape for leaf in leaves] == [(20,), (2,), (), (2,)]
    assert is_numeric(jnp.bfloat16)
    assert not is_numeric(np.longdouble)
    rebuilt = jax.tree.map(lambda leaf: leaf, Arguments(values, {"f": frame(1.0)}))
    assert rebuilt.args[4] is values[4]
    assert rebuilt.args[6:] == ("a", 1.0)


def from_frame(df):
    """Its energy and its data are in a frame."""
    with numpyro.plate("rows", len(df)):
        numpyro.sample("x", bowl(learned() * float(df["weight"].iloc[0])), obs=df["x"])


def table(weight):
    return pd.DataFrame({"x": X, "weight": weight})


def test_a_model_of_a_frame_meets_the_frame_at_hand():
    df = table(1.0)
    assert log_z(from_frame, df) == pytest.approx(exact(1.0), abs=1e-5)
    assert log_z(from_frame, df.copy()) == pytest.approx(exact(1.0), abs=1e-5)
    df["weight"] = 2.0
    assert log_z(from_frame, df) == pytest.approx(exact(2.0), abs=1e-5)
    assert log_z(from_frame, df.iloc[:7]) == pytest.approx(exact(2.0), abs=1e-5)


def test_a_model_of_a_frame_is_fitted_and_exported():
    train, test = table(1.0).iloc[:12], table(1.0).iloc[12:]
    backend = ebm.Jarzynski(from_frame, optax.adam(0.03), **SETTINGS)
    fit = backend.run(random.key(0), 2, train, progress_bar=False)
    again = backend.run(random.key(0), 2, train.copy(), progress_bar=False)
    assert fit.params == again.params
    for df in (train, test):
        found = ebm.log_normalizer(
            None, from_frame, fit.params, df, method="quadrature"
        )
        data = ebm.to_arviz(fit, from_frame, df, log_normalizer=found)
        precision = 1 + 2 * float(fit.params["k"])
        density = 0.5 * (
            np.log(precision / (2 * np.pi)) - precision * df["x"].to_numpy() ** 2
        )
        assert data.attrs["mean_log_density"] == pytest.approx(density.mean(), rel=1e-4)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        pd.Series,
        lambda x: x.astype(object),
        lambda x: x.astype(np.longdouble),
    ],
)
def test_data_of_any_kind_that_holds_numbers(convert):
    _, state = initialise(model, X)
    _, other = initialise(model, convert(X))
    np.testing.assert_array_equal(state.walkers["x"].values, other.walkers["x"].values)
    assert log_z(model, convert(X)) == pytest.approx(exact(1.0), abs=1e-5)
    data = ebm.to_arviz({"k": np.ones((1, 2))}, model, convert(X))
    np.testing.assert_allclose(data["observed_data"]["x"], X, rtol=1e-6)


def test_a_list_that_is_subsampled():
    def subsampled(x):
        with numpyro.plate("rows", len(x), subsample_size=5):
            numpyro.sample("x", bowl(learned()), obs=numpyro.subsample(x, event_dim=0))

    assert log_z(subsampled, X.tolist()) == pytest.approx(exact(1.0), abs=1e-5)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            np.array(["1", "2"]),
            r"site 'x' is a ndarray of type <U1, which does not hold "
            r"numbers.*np.asarray",
        ),
        (np.array([1.0, "2"], object), r"site 'x' is a ndarray of type object.*'2'"),
        (
            np.array(["2020-01-01", "2021-01-01"], "M8[D]"),
            r"site 'x' is a ndarray of type datetime64",
        ),
        (
            pd.Series(["a", "b"]),
            r"site 'x' is a Series of type .*which does not hold numbers",
        ),
        (
            [[1.0], [1.0, 2.0]],
            r"site 'x' is a list that is no array.*numbers of one shape",
        ),
        ([1.0, None], r"site 'x' is NaN or infinite in 1 of 2 rows"),
        (
            np.ma.array([1.0, -99.0], mask=[False, True]),
            r"site 'x' is a NumPy masked array.*handlers.mask",
        ),
    ],
)
def test_data_that_hold_no_numbers(data, match):
    with pytest.raises(ValueError, match=match):
        initialise(model, data)


def test_a_masked_array_that_a_model_hides():
    hidden = np.ma.array(X, mask=X > 1)
    with pytest.raises(
        ValueError,
        match=r"masked array of shape .* among the model's arguments.*handlers.mask",
    ):
        initialise(lambda x: model(np.asarray(x)), hidden)
    assert log_z(model, np.ma.array(X)) == pytest.approx(exact(1.0), abs=1e-5)


# Optimisers


def remembers_value():
    """Plain gradient descent whose state is what it was told."""

    def init(params):
        return jnp.zeros(())

    def update(grads, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: -0.001 * g, grads), value

    return optax.GradientTransformationExtraArgs(init, update)


def test_jarzynski_tells_the_optimiser_its_loss():
    backend, state = initialise(model, X, optim=remembers_value())
    state, info = jax.jit(backend.update)(state, X)
    assert state.optim_state == info["loss"] != 0


def program():
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    numpyro.sample(
        "x", ebm.standardized_normal(NORMAL, numpyro.param("w", jnp.ones(2)) @ z, scale)
    )


def test_vera_tells_both_optimisers_their_losses():
    backend = ebm.VERA(
        model, program, remembers_value(), remembers_value(), num_particles=16
    )
    state, info = jax.jit(backend.update)(backend.init(random.key(0), X), X)
    assert state.optim_state == info["loss"] != 0
    assert state.generator_optim_state == pytest.approx(info["generator_loss"]) != 0


HANDED = {
    "plateau": lambda: optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau()),
    "polyak": lambda: optax.polyak_sgd(0.001),
    "grouped": lambda: optax.multi_transform(
        {"a": optax.polyak_sgd(0.001)}, lambda tree: jax.tree.map(lambda _: "a", tree)
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
    "lbfgs": lambda: optax.lbfgs(0.001, linesearch=None),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.001), optax.sgd(0.001)),
}


@pytest.mark.parametrize("name", HANDED)
def test_optimisers_with_and_without_the_loss_run(name):
    backend, state = initialise(model, X, optim=HANDED[name]())
    fit = backend.run(random.key(0), 3, X, init_state=state, progress_bar=False)
    assert np.isfinite(fit.params["k"])
    assert fit.params["k"] != 1.0


REFUSED = {
    "lbfgs": lambda: optax.lbfgs(),
    "line search": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)
    ),
    "grouped": lambda: optax.multi_transform(
        {"a": optax.lbfgs()}, lambda tree: jax.tree.map(lambda _: "a", tree)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_line_searches_are_refused_at_once(name):
    match = r"optim cannot be used here.*value_fn.*Line searches.*linesearch=None"
    with pytest.raises(TypeError, match=match):
        ebm.Jarzynski(model, REFUSED[name]())
    with pytest.raises(TypeError, match=match):
        ebm.VERA(model, program, REFUSED[name](), optax.sgd(0.1))
    with pytest.raises(TypeError, match="generator_" + match):
        ebm.VERA(model, program, optax.sgd(0.1), REFUSED[name]())


def test_line_searches_for_named_parameters_are_refused_before_walkers_are_placed():
    groups = optax.multi_transform({"a": optax.lbfgs()}, {"k": "a"})
    backend = ebm.Jarzynski(model, groups, num_walkers=10**9)
    with pytest.raises(TypeError, match=r"optim cannot be used here.*value_fn"):
        backend.init(random.key(0), X)


# Energies inside other distributions

AFFINE = dist.transforms.AffineTransform(3.0, 2.0)
WRAPPERS = {
    "transformed": (
        lambda d: dist.TransformedDistribution(d, AFFINE),
        r"lambda y: energy\(transform.inv\(y\)\)",
    ),
    "transformed, under others": (
        lambda d: (
            dist.TransformedDistribution(d.expand([1]).to_event(1), AFFINE)
            .mask(True)
            .to_event(0)
        ),
        r"lambda y: energy\(transform.inv\(y\)\)",
    ),
    "mixture": (
        lambda d: dist.MixtureGeneral(
            dist.Categorical(jnp.array([0.3, 0.7])), [d, dist.Normal(1, 1)]
        ),
        "MixtureGeneral.*every component's normaliser",
    ),
    "one family": (
        lambda d: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])), d.expand([2])
        ),
        "MixtureSameFamily.*every component's normaliser",
    ),
    "base": (
        lambda d: ebm.EnergyDistribution(jnp.square, d),
        "base: EnergyDistribution.*Add the energies up",
    ),
    "start": (
        lambda d: ebm.EnergyDistribution(
            jnp.square, NORMAL, start=dist.TransformedDistribution(d, AFFINE)
        ),
        "start: EnergyDistribution of TransformedDistribution",
    ),
}


def wrapped(x, wrap, beside):
    k = learned()
    with numpyro.plate("rows", len(x)):
        numpyro.sample("hidden", wrap(bowl(k)), obs=x)
        if beside:
            numpyro.sample("x", bowl(k), obs=x)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_an_energy_inside_another_distribution(name, beside):
    wrap, remedy = WRAPPERS[name]
    hiding = functools.partial(wrapped, wrap=wrap, beside=beside)
    for step in (
        lambda: initialise(hiding, X),
        lambda: ebm.log_normalizer(None, hiding, {"k": 1.0}, X, method="quadrature"),
        lambda: ebm.sample(random.key(0), hiding, {"k": 1.0}, X),
        lambda: ebm.to_arviz({"k": np.ones((1, 2))}, hiding, X),
        lambda: handlers.trace(handlers.seed(ebm.normalized(hiding), 0)).get_trace(X),
    ):
        with pytest.raises(
            ValueError,
            match=rf"Site 'hidden' holds an energy with an unknown.*{remedy}",
        ):
            step()


def test_what_the_message_says_to_write_is_the_same_density():
    """y = 3 + 2x of x from N(0, 1 / (1 + 2k)): the energy undoes the transform, the
    base is transformed."""
    base = dist.TransformedDistribution(NORMAL, AFFINE)
    moved = ebm.EnergyDistribution(lambda y: AFFINE.inv(y) ** 2, base)
    found = ebm.log_normalizer(None, moved, method="quadrature").estimate["x"]
    assert found == pytest.approx(exact(1.0), abs=1e-5)
    known = moved.with_log_normalizer(found)
    np.testing.assert_allclose(
        known.log_prob(X), dist.Normal(3, 2 / np.sqrt(3)).log_prob(X), rtol=1e-4
    )


def test_a_known_normaliser_may_be_anywhere():
    def known(x):
        k = learned()
        inside = ebm.EnergyDistribution(jnp.square, NORMAL, log_normalizer=exact(1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.TransformedDistribution(inside, AFFINE), obs=x)
            numpyro.sample("x", bowl(k), obs=x)

    assert log_z(known, X) == pytest.approx(exact(1.0), abs=1e-5)


def test_a_wrapped_distribution_in_place_of_a_model():
    with pytest.raises(
        TypeError, match="model is a TransformedDistribution; expected a NumPyro model"
    ):
        ebm.log_normalizer(
            None, dist.TransformedDistribution(bowl(1.0), AFFINE), method="quadrature"
        )


# Messages without a name, loops and branches


def subsampled(x):
    k = learned()
    numpyro.prng_key()
    numpyro.deterministic("twice", 2 * k)
    with numpyro.plate("rows", len(x), subsample_size=5):
        numpyro.sample("x", bowl(k), obs=numpyro.subsample(x, event_dim=0))


@pytest.fixture(scope="module")
def known():
    found = ebm.log_normalizer(None, subsampled, {"k": 1.0}, X, method="quadrature")
    return ebm.normalized(subsampled, found)


def test_log_likelihood_has_one_number_for_every_row(known):
    expected = dist.Normal(0, 3**-0.5).log_prob(X)
    for every in (known, handlers.seed(known, 0), handlers.seed(known, 1)):
        np.testing.assert_allclose(
            log_likelihood(every, {}, X)["x"][0], expected, rtol=1e-4
        )


def test_log_likelihood_of_a_batch_from_outside():
    def batched(x, size):
        with numpyro.plate("rows", size, subsample_size=len(x)):
            numpyro.sample("x", bowl(learned()), obs=x)

    found = ebm.log_normalizer(
        None, batched, {"k": 1.0}, X[:5], 20, method="quadrature"
    )
    values = log_likelihood(ebm.normalized(batched, found), {}, X[:5], 20)["x"][0]
    np.testing.assert_allclose(
        values, dist.Normal(0, 3**-0.5).log_prob(X[:5]), rtol=1e-4
    )
    draws = {"k": np.ones((1, 2))}
    found = ebm.log_normalizer(
        None, batched, draws, X[:5], 20, method="quadrature", batch_ndims=2
    )
    data = ebm.to_arviz(draws, batched, X[:5], 20, log_normalizer=found)
    np.testing.assert_allclose(data["log_likelihood"]["x"][0, 0], values, rtol=1e-4)


def test_predictive_and_svi_keep_their_batches(known):
    drawn = Predictive(known, num_samples=3)(random.key(0), X)
    assert drawn["x"].shape == (3, 5)
    assert set(np.unique(drawn["x"])) <= set(X)
    np.testing.assert_allclose(drawn["twice"], 2.0)

    free = ebm.normalized(subsampled)
    svi = SVI(free, lambda x: None, optax.sgd(1e-3), Trace_ELBO())
    state = svi.init(random.key(0), X)
    losses = {
        float(svi.evaluate(svi.init(random.key(seed), X), X)) for seed in range(4)
    }
    assert len(losses) > 1, "every loss is that of another batch"
    assert np.isfinite(svi.update(state, X)[1])


def series(x):
    """A latent series, an observed one, and an energy that depends on the latent."""
    k = learned()

    def latent(carry, _):
        carry = numpyro.sample("z", dist.Normal(0.5 * carry, 1))
        return carry, carry

    _, z = scan(latent, 0.0, None, length=3)

    def seen(carry, y):
        numpyro.sample("y", dist.Normal(carry, 1.0), obs=y)
        return carry, None

    scan(seen, 0.0, jnp.ones(4))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", bowl(k + z.sum() ** 2), obs=x)


def branching(x):
    k = learned()
    z = cond(
        jnp.array(True),
        lambda _: numpyro.sample("z", dist.Normal(0, 1)),
        lambda _: numpyro.sample("z", dist.Normal(1, 1)),
        None,
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", bowl(k + z**2), obs=x)


@pytest.mark.parametrize(
    ("looped", "z"), [(series, np.array([0.3, -0.2, 0.5])), (branching, np.array(0.6))]
)
def test_latents_of_loops_and_branches(looped, z):
    """z sums to 0.6 in both."""
    _, state = initialise(looped, X)
    assert state.params["z"].shape == z.shape
    params = {"k": 1.0, "z": z}
    found = ebm.log_normalizer(None, looped, params, X, method="quadrature")
    assert found.estimate["x"] == pytest.approx(exact(1.36), abs=1e-5)
    expected = dist.Normal(0, (1 + 2 * 1.36) ** -0.5).log_prob(X)

    fixed = log_likelihood(ebm.normalized(looped, found), {}, X)
    np.testing.assert_allclose(fixed["x"][0], expected, rtol=1e-4)
    if looped is series:
        np.testing.assert_allclose(
            fixed["y"][0], np.full(4, NORMAL.log_prob(1.0)), rtol=1e-5
        )

    draws = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (1, 2, *np.shape(leaf))), params
    )
    at_draws = ebm.log_normalizer(
        None, looped, draws, X, method="quadrature", batch_ndims=2
    )
    data = ebm.to_arviz(draws, looped, X, log_normalizer=at_draws)
    np.testing.assert_allclose(data["log_likelihood"]["x"][0, 1], expected, rtol=1e-4)


def energy_in_a_loop(x):
    k = learned()

    def step(carry, y):
        numpyro.sample("x", bowl(k), obs=y)
        return carry, None

    scan(step, 0.0, jnp.asarray(x))


def energy_in_a_branch(x):
    k = learned()
    branches = [
        lambda _, n=n: numpyro.sample("x", bowl(n * k), obs=x[0]) for n in (1, 2)
    ]
    cond(jnp.array(True), *branches, None)


@pytest.mark.parametrize("looped", [energy_in_a_loop, energy_in_a_branch])
def test_an_energy_in_a_loop_or_a_branch(looped):
    for step in (
        lambda: initialise(looped, X),
        lambda: log_z(looped, X),
        lambda: ebm.to_arviz({"k": np.ones((1, 2))}, looped, X),
        lambda: handlers.trace(handlers.seed(ebm.normalized(looped), 0)).get_trace(X),
    ):
        with pytest.raises(
            ValueError,
            match=r"Energy site 'x' is inside numpyro's scan or cond.*Sample it outside",
        ):
            step()


def test_a_parameter_in_a_loop():
    def looped(x):
        def step(carry, _):
            return carry + numpyro.param("k", 1.0), None

        total, _ = scan(step, 0.0, None, length=3)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", bowl(total), obs=x)

    with pytest.raises(
        ValueError,
        match=r"Parameter 'k' is declared inside numpyro's scan or cond.*outside",
    ):
        initialise(looped, X)


# Parameters that no gradient can move


def with_param(value, **options):
    def model(x):
        k = numpyro.param("k", value, **options)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", bowl(jnp.sum(jax.tree.leaves(k)[0])), obs=x)

    return model


@pytest.mark.parametrize("value", [3, np.int64(3), lambda key: 3])
def test_a_whole_number_is_a_float_parameter(value):
    backend, state = initialise(with_param(value), X, optim=optax.sgd(0.01))
    assert state.params["k"] == 3.0
    state, _ = backend.update(state, X)
    assert state.params["k"].dtype == jnp.float32
    assert 0 < abs(state.params["k"] - 3) < 1
    assert log_z(with_param(value), X, params={"k": 3}) == pytest.approx(
        exact(3.0), abs=1e-5
    )


def test_a_generators_whole_number_is_a_float_parameter():
    def generator():
        z = numpyro.sample("z", NORMAL)
        numpyro.sample(
            "x", ebm.standardized_normal(NORMAL, numpyro.param("w", 1) * z, 0.5)
        )

    backend = ebm.VERA(
        model, generator, optax.sgd(0.01), optax.sgd(0.01), num_particles=8
    )
    assert backend.init(random.key(0), X).generator_params["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("value", "options", "match"),
    [
        (True, {}, r"Parameter 'k' starts at bool values.*numpyro.param\('k', 1.0\)"),
        ({"w": np.arange(3)}, {}, r"Parameter 'k'\['w'\] starts at int"),
        (
            3,
            {"constraint": constraints.nonnegative_integer},
            "Parameter 'k' has the discrete constraint",
        ),
    ],
)
def test_parameters_that_no_gradient_can_move(value, options, match):
    with pytest.raises(ValueError, match=match):
        initialise(with_param(value, **options), X)
