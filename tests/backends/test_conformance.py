"""What every backend promises, whatever its mathematics.  A new backend joins by an
entry in ``BACKENDS``."""

import dataclasses
import signal
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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

import ebm_ppl as ebm
from ebm_ppl.backends.jarzynski import placement
from ebm_ppl.training import data, loop

pytestmark = pytest.mark.xdist_group("conformance")

JARZYNSKI_HISTORY = {
    "loss",
    "ess",
    "ess_holdout",
    "log_normalizer",
    "log_normalizer_stderr",
    "log_normalizer_training",
    "update_scale",
    "resampled",
    "acceptance",
    "grad_norm",
}


def jarzynski(kernel, model, optim, *, num_walkers=16):
    return ebm.Jarzynski(
        model, optim, kernel=kernel, num_chains=6, num_walkers=num_walkers
    )


VERA_HISTORY = {
    "loss",
    "generator_loss",
    "entropy",
    "log_normalizer_bound",
    "at_bound",
    "grad_norm",
    "generator_grad_norm",
    "generator_ess",
}


def generator():
    """At the first step its draws have the base's density, N(0, I)."""
    weight = numpyro.param("weight", 0.8 * jnp.eye(2))
    bias = numpyro.param("bias", jnp.zeros(2))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", ebm.standardized_normal(BASE, weight @ z + bias, 0.6))


def vera(model, optim, *, num_walkers=16):
    # No momentum, or the two players circle ever wider.
    generator_optim = optax.adam(0.1, b1=0.0)
    return ebm.VERA(
        model,
        generator,
        optim,
        generator_optim,
        num_particles=num_walkers,
        gradient_penalty=0.0,
    )


MONTE_CARLO_HISTORY = {
    "loss",
    "ess",
    "log_normalizer",
    "log_normalizer_stderr",
    "grad_norm",
}


def monte_carlo(model, optim, *, num_walkers=128):
    return ebm.MonteCarloMLE(model, optim, num_draws=num_walkers)


def contrastive(method, model, optim, *, num_walkers=96):
    return ebm.ContrastiveDivergence(
        model, optim, method=method, num_walkers=num_walkers
    )


def noise_contrastive(model, optim, *, num_walkers=128):
    return ebm.NoiseContrastive(model, optim, num_draws=num_walkers)


def score_matching(model, optim, *, num_walkers=0):
    return ebm.ScoreMatching(model, optim)


class Entry(NamedTuple):
    """``make(model, optim)``, or with ``num_walkers=`` for precision; every model here
    has one energy site, 'x'."""

    make: Callable
    history: set[str]
    has_draws: bool = True


BACKENDS = {
    "jarzynski-mala": Entry(partial(jarzynski, ebm.MALA()), JARZYNSKI_HISTORY),
    "jarzynski-ula": Entry(partial(jarzynski, ebm.ULA(0.05)), JARZYNSKI_HISTORY),
    "vera": Entry(vera, VERA_HISTORY),
    "monte carlo": Entry(monte_carlo, MONTE_CARLO_HISTORY),
    "contrastive": Entry(
        partial(contrastive, "persistent"), {"loss", "acceptance", "grad_norm"}
    ),
    "noise contrastive": Entry(
        noise_contrastive, {"loss", "log_normalizer", "grad_norm"}
    ),
    "score matching": Entry(score_matching, {"loss", "grad_norm"}, has_draws=False),
}

# Those that differ in more than a kernel: what is costly and has no kernel in it is
# asked of these alone.
DISTINCT = ["jarzynski-mala", "vera", "monte carlo"]

X = np.random.default_rng(0).gamma(2.0, 0.5, size=(12, 2)).astype(np.float32)
BASE = dist.Normal(0, 1).expand([2]).to_event(1)
ENERGIES = {"x": ebm.EnergyDistribution(lambda v: v.sum(-1), BASE)}


def declare(obs):
    """E = −r a·x on N(0, I), which is N(r a, I) with log Z = ½ r² ‖a‖².  At the first
    step E is 0."""
    a = numpyro.param("a", jnp.zeros(2))
    rate = numpyro.param("rate", 0.5, constraint=constraints.positive)
    numpyro.sample(
        "x", ebm.EnergyDistribution(lambda v: -rate * (v * a).sum(-1), BASE), obs=obs
    )


def model(x):
    with numpyro.plate("data", len(x)):
        declare(x)


@pytest.fixture(params=DISTINCT)
def distinct(request):
    return BACKENDS[request.param]


class Trained(NamedTuple):
    """One backend, a first state, a run of 40 steps from it, the compiled update, and
    how often the model ran."""

    entry: Entry
    backend: object
    state: object
    fit: ebm.Fit
    update: Callable
    traces: dict[str, int]


@pytest.fixture(scope="module", params=BACKENDS)
def entry(request):
    return BACKENDS[request.param]


@pytest.fixture(scope="module")
def trained(entry):
    calls, traces = [], {}

    def counted(x):
        calls.append(1)
        model(x)

    def traced(name, function, *args, **kwargs):
        before = len(calls)
        result = function(*args, **kwargs)
        traces[name] = len(calls) - before
        return result

    backend = entry.make(counted, optax.sgd(0.01))
    state = backend.init(random.key(0), X)
    run = partial(backend.run, random.key(1), init_state=state, progress_bar=False)
    traced("first run", run, 1, X)
    fit = traced("second run", run, 40, X)
    traced("continued run", run, 3, X + 1, init_state=fit.state)
    update = jax.jit(backend.update)
    stepped, _ = traced("first update", update, state, X)
    traced("second update", update, stepped, X)
    traced("update on other data", update, stepped, X + 1)
    return Trained(entry, backend, state, fit, update, traces)


def assert_equal(one, other):
    """Same tree, same numbers to the last bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, raw(one), raw(other))


def raw(tree):
    return jax.tree.map(
        lambda leaf: random.key_data(leaf) if is_key(leaf) else np.asarray(leaf), tree
    )


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_close(one, other, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=rtol, atol=atol), raw(one), raw(other)
    )


def test_handlers_around_a_run_do_not_reach_the_model(distinct):
    """They belong on the model, as in ``handlers.scale(model, 3.0)``."""
    backend = distinct.make(model, optax.sgd(0.01))
    alone = backend.run(random.key(0), 2, X, progress_bar=False)
    jax.clear_caches()
    with (
        handlers.substitute(data={"rate": 7.0, "weight": jnp.zeros((2, 2))}),
        handlers.scale(scale=3.0),
        handlers.mask(mask=False),
    ):
        backend = distinct.make(model, optax.sgd(0.01))
        within = backend.run(random.key(0), 2, X, progress_bar=False)
    assert_equal(within.params, alone.params)
    assert_equal(within.history, alone.history)


# State


def test_state_is_a_pytree_of_arrays(trained):
    leaves, treedef = jax.tree.flatten(trained.state)
    assert leaves
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    # A weak type would be lost in the first step or on the way through a file, and
    # everything compiled again.
    assert not any(leaf.weak_type for leaf in leaves if not is_key(leaf))
    back = jax.tree.unflatten(treedef, leaves)
    assert type(back) is type(trained.state)
    assert_equal(trained.update(back, X), trained.update(trained.state, X))


def test_a_template_has_the_states_shapes(trained, monkeypatch):
    """And reads a saved state's arrays, without a walker annealed."""
    monkeypatch.setattr(placement, "anneal_site", None)
    template = trained.backend.template(random.key(3), X)
    leaves, treedef = jax.tree.flatten(template)
    saved = jax.tree.leaves(trained.fit.state)
    assert treedef == jax.tree.structure(trained.fit.state)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
        (leaf.shape, leaf.dtype) for leaf in saved
    ]
    restored = jax.tree.unflatten(treedef, saved)
    assert_equal(trained.update(restored, X), trained.update(trained.fit.state, X))


def test_a_fit_is_written_and_read(trained, tmp_path):
    ebm.save(tmp_path / "fit.npz", trained.fit)
    again = ebm.load(tmp_path / "fit.npz", trained.backend, X).fit
    assert_equal(again.params, trained.fit.params)
    assert_equal(again.history, trained.fit.history)
    assert_equal(again.state, trained.fit.state)


def test_a_state_survives_a_trip_to_the_host(trained):
    """What a checkpoint does: arrays to NumPy and back."""
    host = jax.tree.map(
        lambda leaf: leaf if is_key(leaf) else jnp.asarray(np.asarray(leaf)),
        trained.fit.state,
    )
    assert_equal(trained.update(host, X), trained.update(trained.fit.state, X))


def test_jit_changes_nothing(trained):
    state, info = trained.backend.update(trained.fit.state, X)
    jit_state, jit_info = trained.update(trained.fit.state, X)
    assert_close(jit_info, info)
    assert_close(jit_state, state)


def test_update_is_what_run_repeats(trained):
    state = trained.state
    for step in range(3):
        state, info = trained.update(state, X)
        history = jax.tree.map(lambda h, step=step: h[step], trained.fit.history)
        assert info.pop("finite").everywhere()
        assert_close(info, history)


def test_only_the_first_step_traces_the_model(trained):
    assert trained.traces["first update"] > 0
    assert trained.traces["second update"] == 0
    assert trained.traces["update on other data"] == 0


def test_only_the_first_run_traces_the_model(trained):
    """Not its later chunks, nor another number of steps, other data or a continued
    state."""
    assert trained.traces["first run"] > 0
    assert trained.traces["second run"] == 0
    assert trained.traces["continued run"] == 0


# Runs


def test_same_key_same_result(trained):
    again = trained.backend.init(random.key(0), X)
    assert_equal(again, trained.state)
    fit = trained.backend.run(
        random.key(1), 40, X, init_state=again, progress_bar=False
    )
    assert_equal(fit.state, trained.fit.state)
    assert_equal(fit.history, trained.fit.history)
    other = trained.backend.init(random.key(2), X)
    is_other = not np.array_equal(
        trained.update(other, X)[1]["grad_norm"],
        trained.update(again, X)[1]["grad_norm"],
    )
    assert is_other == trained.entry.has_draws


def test_a_continued_run_is_the_uninterrupted_one(trained):
    first = trained.backend.run(
        random.key(1), 15, X, init_state=trained.state, progress_bar=False
    )
    second = trained.backend.run(
        random.key(9), 25, X, init_state=first.state, progress_bar=False
    )
    assert_equal(second.state, trained.fit.state)
    assert_equal(second.params, trained.fit.params)
    joined = jax.tree.map(
        lambda a, b: np.concatenate([a, b]), first.history, second.history
    )
    assert_equal(joined, trained.fit.history)
    for state in (trained.state, first.state):
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_run_without_a_state_starts_with_init(trained):
    fit = trained.backend.run(random.key(0), 40, X, progress_bar=False)
    assert_equal(fit.state, trained.fit.state)


def test_history_has_one_entry_per_step_and_pinned_keys(trained):
    declared = trained.backend.diagnostics
    assert set(trained.fit.history) == trained.entry.history
    assert {diagnostic.key for diagnostic in declared} == trained.entry.history
    for diagnostic in declared:
        assert isinstance(trained.fit.history[diagnostic.key], dict) == (
            diagnostic.by_site
        )
    for leaf in jax.tree.leaves(trained.fit.history):
        assert isinstance(leaf, np.ndarray)
        assert len(leaf) == 40
        assert np.isfinite(leaf).all()
    for diagnostic in declared:
        if diagnostic.by_site:
            assert set(trained.fit.history[diagnostic.key]) == {"x"}


def test_an_export_holds_the_draws_of_the_state(trained):
    exported = ebm.to_arviz(trained.fit, model, X)
    if not trained.entry.has_draws:
        assert trained.fit.state.populations(random.key(0), ENERGIES) == {}
        with pytest.raises(KeyError):
            exported["posterior_predictive"]
        return

    (population,) = trained.fit.state.populations(random.key(0), ENERGIES).values()
    drawn = exported["posterior_predictive"]["x"]
    assert drawn.dims[:2] == ("chain", "draw")
    assert drawn.shape == population.values.shape
    assert exported["sample_stats"]["energy"].shape == drawn.shape[:2]
    assert ("log_weight" in exported["sample_stats"]) == (
        population.log_weight is not None
    )


def test_params_and_state_belong_to_one_step(trained):
    assert_equal(trained.fit.params, trained.backend.get_params(trained.fit.state))


def test_fit_is_frozen(trained):
    with pytest.raises(dataclasses.FrozenInstanceError):
        trained.fit.params = {}


def test_get_params_are_constrained_values(trained):
    assert set(trained.fit.params) == {"a", "rate"}
    assert trained.backend.get_params(trained.state)["rate"] == pytest.approx(
        0.5, rel=1e-6
    )
    assert trained.fit.params["rate"] > 0
    unconstrained = trained.fit.state.params["rate"]
    assert trained.fit.params["rate"] == pytest.approx(np.exp(unconstrained), rel=1e-5)


def test_init_params_are_where_training_starts(entry):
    backend = entry.make(model, optax.sgd(0.01))
    state = backend.init(random.key(0), X, init_params={"rate": jnp.array(2.0)})
    params = backend.get_params(state)
    assert params["rate"] == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_array_equal(params["a"], [0, 0])


# Ctrl-C and progress


class Bar:
    """Stands in for tqdm: notes what it is fed."""

    def __init__(self, total, disable):
        self.total, self.disable, self.fed, self.texts = total, disable, [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self, steps):
        self.fed.append(steps)

    def set_postfix_str(self, text, refresh):
        self.texts.append(text)


@pytest.fixture
def bars(monkeypatch):
    made = []

    def tqdm(**options):
        made.append(Bar(**options))
        return made[-1]

    monkeypatch.setattr(loop, "tqdm", tqdm)
    return made


@pytest.fixture
def default_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_progress_is_fed_once_per_chunk(trained, bars, monkeypatch):
    chunks = []
    compiled = data.run_chunk

    def chunk(*args):
        chunks.append(1)
        return compiled(*args)

    monkeypatch.setattr(data, "run_chunk", chunk)
    trained.backend.run(random.key(1), 100, X, init_state=trained.state)
    (bar,) = bars
    assert (bar.total, bar.disable) == (100, False)
    assert sum(bar.fed) == 100
    assert len(bar.fed) == len(bar.texts) == len(chunks)
    assert bar.fed[0] == 1
    assert max(bar.fed) >= 16
    assert all("loss" in text for text in bar.texts)


def test_progress_bar_can_be_switched_off(trained, bars):
    trained.backend.run(
        random.key(1), 2, X, init_state=trained.state, progress_bar=False
    )
    assert bars[0].disable


def test_ctrl_c_returns_the_finished_chunks(
    trained, bars, monkeypatch, default_interrupt
):
    """10⁹ steps, Ctrl-C after the second chunk; the fit continues as if nothing had
    happened."""

    def update(bar, steps):
        bar.fed.append(steps)
        if bar is bars[0]:
            assert len(bar.fed) <= 2, "the run went on"
            if len(bar.fed) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "update", update)
    fit = trained.backend.run(random.key(1), 10**9, X, init_state=trained.state)
    assert bars[0].fed == [1, 16]
    assert all(len(leaf) == 17 for leaf in jax.tree.leaves(fit.history))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    rest = trained.backend.run(
        random.key(1), 40 - 17, X, init_state=fit.state, progress_bar=False
    )
    assert_equal(rest.state, trained.fit.state)


def test_a_second_ctrl_c_interrupts_at_once(
    trained, bars, monkeypatch, default_interrupt
):
    def update(bar, steps):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the run went on")

    monkeypatch.setattr(Bar, "update", update)
    with pytest.raises(KeyboardInterrupt):
        trained.backend.run(random.key(1), 10**9, X, init_state=trained.state)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Plates, subsampling, masks, scales


def test_batches_masks_and_scales_keep_numpyros_meaning(trained):
    """A batch of half a plate, 3 rows of rubbish masked, at half the scale: the same
    updates as by all 12 rows."""
    rubbish = np.full((3, 2), 50.0, np.float32)
    mask = np.arange(15) < 12

    def batched(batch):
        with (
            numpyro.plate("data", 30, subsample_size=15),
            handlers.scale(scale=0.5),
            handlers.mask(mask=mask),
        ):
            declare(batch)

    batch = np.concatenate([X, rubbish])
    backend = trained.entry.make(batched, optax.sgd(0.01))
    update = jax.jit(backend.update)
    expected, state = trained.state, backend.init(random.key(0), batch)
    for _ in range(2):
        expected, expected_info = trained.update(expected, X)
        state, info = update(state, batch)
        assert_close(info["loss"], expected_info["loss"])
    moved = backend.get_params(state)
    assert_close(moved, trained.backend.get_params(expected))
    assert np.abs(moved["a"]).min() > 0.05
    assert abs(moved["rate"] - 0.5) > 0.001
    # Another batch each time.
    _, other = update(state, batch[::-1])
    _, same = update(state, batch)
    assert other["loss"] != same["loss"]


@pytest.mark.filterwarnings("ignore:Not at a maximum")
def test_a_subsampled_plate_draws_new_rows_each_step_and_is_unbiased(distinct):
    """With rate 0 the losses are the scaled losses of random mini-batches; their mean
    is the full loss."""

    def subsampled(x):
        with numpyro.plate("data", len(x), subsample_size=4):
            declare(numpyro.subsample(x, event_dim=1))

    backend = distinct.make(subsampled, optax.sgd(0.0))
    loss = (
        backend.run(random.key(3), 300, X, progress_bar=False)
        .history["loss"]
        .astype(float)
    )
    full = -BASE.log_prob(X).sum()
    assert len(np.unique(loss)) > 100
    assert abs(loss.mean() - full) < 5 * loss.std() / np.sqrt(len(loss))


# Sample sites, precision


def test_sample_sites_are_fitted_by_map(distinct):
    """Prior N(0, 0.1² I) on a: the mode is Σx / (N + 100), a ninth of the
    maximum-likelihood value.

    Gradient noise is that of E[x] over 2 × 400 walkers; an error in E[x] moves the mode
    by N / (N + 100) of it.
    """

    def with_prior(x):
        a = numpyro.sample("a", dist.Normal(0, 0.1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: -(v * a).sum(-1), BASE), obs=x
            )

    x = X + 3.0
    backend = distinct.make(with_prior, optax.sgd(0.002), num_walkers=400)
    fit = backend.run(
        random.PRNGKey(0), 60, x, init_params={"a": jnp.zeros(2)}, progress_bar=False
    )
    mode, likelihood = x.sum(0) / (len(x) + 100), x.mean(0)
    if "ess" in fit.history:
        assert fit.history["ess"]["x"][-1] > 0.5
    error = len(x) / (len(x) + 100) / np.sqrt(2 * 400 * 0.5)
    assert np.all(np.abs(fit.params["a"] - mode) < 5 * error)
    assert np.all(np.abs(likelihood - mode) > 20 * error)


def test_double_precision(distinct):
    with jax.enable_x64(True):
        backend = distinct.make(model, optax.sgd(0.01))
        state = backend.init(random.key(0), X.astype(np.float64))
        after, info = jax.eval_shape(backend.update, state, X.astype(np.float64))
        assert (
            floating_types(state)
            == floating_types((after, info))
            == {jnp.dtype("float64")}
        )
        assert backend.get_params(state)["rate"] == pytest.approx(0.5, rel=1e-14)


def test_single_precision_stays_single(trained):
    assert floating_types((trained.fit.state, trained.fit.history)) == {
        jnp.dtype("float32")
    }


def floating_types(tree):
    return {
        leaf.dtype
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
