"""Data that come in batches: every update sees its own, and nothing is lost on the way."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("batches")

NUM_ROWS = 1_000
X = np.random.default_rng(0).normal(size=(NUM_ROWS,)).astype(np.float32) / 2
NORMAL = dist.Normal(0.0, 1.0)


def model(x, num_rows=NUM_ROWS, weight=1.0):
    """A precision, by rows that stand for ``num_rows``."""
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (weight * rate - 1.0) * v**2, NORMAL
    )
    with numpyro.plate("rows", num_rows, subsample_size=len(x)):
        numpyro.sample("x", energy, obs=x)


def monte_carlo(rate=1e-4):
    return ebm.MonteCarloMLE(model, optax.sgd(rate), num_draws=64)


def jarzynski():
    # No acceptance, which rounding could turn.
    options = {"kernel": ebm.ULA(0.05), "num_chains": 6, "num_walkers": 8}
    return ebm.Jarzynski(model, optax.sgd(1e-4), **options)


def slices(size, rows=X):
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def failing_after(rows):
    yield from slices(10, rows)
    raise OSError("the disk is gone")


def by_hand(backend, batches):
    state, update, losses = None, jax.jit(backend.update), []
    for batch in batches:
        if state is None:
            state = backend.init(random.key(0), batch)
        state, info = update(state, batch)
        losses.append(info["loss"])
    return backend.get_params(state), np.array(losses)


def run(backend, batches, num_steps=1_000, **options):
    return backend.run(
        random.key(0), num_steps, batches=batches, progress_bar=False, **options
    )


@pytest.mark.parametrize("make", [monte_carlo, jarzynski])
def test_every_update_has_the_next_batch(make):
    """100 batches, more than a stack holds, and a last one that is shorter."""
    batches = [*slices(9), X[:4]]
    params, losses = by_hand(make(), batches)
    fit = run(make(), iter(batches))
    np.testing.assert_allclose(fit.history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(fit.params["rate"], params["rate"], rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 65, 130])
def test_a_run_ends_with_its_steps_or_with_its_batches(num_steps):
    fit = run(monte_carlo(), slices(10), num_steps)
    assert len(fit.history["loss"]) == min(num_steps, 100)


def test_a_run_goes_on_with_the_next_batches():
    whole = run(monte_carlo(), slices(10))
    first = run(monte_carlo(), slices(10, X[:300]))
    second = run(monte_carlo(), slices(10, X[300:]), init_state=first.state)
    np.testing.assert_allclose(second.params["rate"], whole.params["rate"], rtol=1e-6)


def test_rows_in_batches_are_fitted_as_one():
    """Ten epochs of shuffled batches; the rate falls, so that their noise does."""
    rng = np.random.default_rng(1)
    epochs = (slices(50, rng.permutation(X)) for _ in range(30))
    rate = optax.cosine_decay_schedule(1e-3, 600)
    fit = run(monte_carlo(rate), itertools.chain.from_iterable(epochs))
    right = 1 / np.mean(X**2)
    error = right * np.sqrt(2 / NUM_ROWS)
    assert abs(fit.params["rate"] - right) < error


@pytest.mark.parametrize(
    ("batches", "args", "kwargs"),
    [
        ([(X[:10],)] * 3, (), {}),
        ([X[:10]] * 3, (), {}),
        ([[X[:10]]] * 3, (NUM_ROWS,), {}),
        ([{"x": X[:10]}] * 3, (), {"num_rows": NUM_ROWS}),
        ([{"x": X[:10], "weight": 1.0}] * 3, (), {}),
        ([X[:10].astype(float)] * 3, (), {"weight": np.ones(())}),
        ([jnp.asarray(X[:10])] * 3, (), {}),
    ],
)
def test_batches_are_arguments(batches, args, kwargs):
    expected = monte_carlo().run(random.key(0), 3, X[:10], progress_bar=False)
    fit = monte_carlo().run(
        random.key(0), 3, *args, batches=batches, progress_bar=False, **kwargs
    )
    np.testing.assert_allclose(fit.params["rate"], expected.params["rate"], rtol=1e-6)


def test_few_batches_are_read_ahead():
    read = []

    def endless():
        for index in itertools.count():
            read.append(index)
            yield X[:10]

    # None that a run does not use: another may go on with the same iterator.
    source = endless()
    run(monte_carlo(), source, 5)
    assert len(read) == 5
    run(monte_carlo(), source, 300)
    assert len(read) == 305


def test_a_run_goes_on_with_the_same_iterator():
    whole = run(monte_carlo(), slices(10), 60)
    source = slices(10)
    first = run(monte_carlo(), source, 25)
    second = run(monte_carlo(), source, 35, init_state=first.state)
    np.testing.assert_allclose(second.params["rate"], whole.params["rate"], rtol=1e-6)


def test_a_loader_may_fill_the_same_memory_again():
    def reused():
        memory = np.empty(10, np.float32)
        for batch in slices(10):
            memory[:] = batch
            yield memory

    expected = run(monte_carlo(), slices(10))
    fit = run(monte_carlo(), reused())
    np.testing.assert_array_equal(fit.history["loss"], expected.history["loss"])


def test_a_mask_of_numpy_is_refused():
    batch = np.ma.masked_array(X[:10], mask=np.arange(10) < 3)
    with pytest.raises(ValueError, match="batch 0 of batches is a NumPy masked array"):
        run(monte_carlo(), [batch])


def test_what_the_first_stack_raises_comes_after_its_batches():
    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(monte_carlo(), failing_after(X[:50]))
    assert len(caught.value.fit.history["loss"]) == 5


def test_the_second_stack_compiles_nothing():
    traces = []

    def counted(x):
        traces.append(1)
        model(x)

    backend = ebm.MonteCarloMLE(counted, optax.sgd(1e-4), num_draws=64)
    state, counts = run(backend, slices(10, X[:20])).state, []
    for rows in (X[:600], X[:600], X):
        before = len(traces)
        run(backend, slices(10, rows), init_state=state)
        counts.append(len(traces) - before)
    # What a finished run is asked runs the model too, as often after either.
    assert counts[1] == counts[2]


def test_what_the_batches_raise_keeps_the_fit():
    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(monte_carlo(), failing_after(X[:700]))
    fit = caught.value.fit
    assert len(fit.history["loss"]) == 70
    assert "error.fit.state" in caught.value.__notes__[0]
    again = run(monte_carlo(), slices(10, X[:10]), init_state=fit.state)
    assert np.isfinite(again.params["rate"])


def test_what_the_model_refuses_keeps_the_fit():
    """A batch of another number of columns, after 70 good ones."""
    batches = [*slices(10, X[:700]), np.ones((10, 3), np.float32)]
    with pytest.raises((TypeError, ValueError)) as caught:
        run(monte_carlo(), batches)
    assert len(caught.value.fit.history["loss"]) == 70
    notes = "".join(caught.value.__notes__)
    assert "Raised in update 70 by its batch" in notes
    again = run(monte_carlo(), batches[:3], init_state=caught.value.fit.state)
    assert np.isfinite(again.params["rate"])


def test_an_argument_in_the_batch_and_beside_it():
    with pytest.raises(TypeError, match=r"Batch 0 of batches holds \['x'\], which run"):
        run(monte_carlo(), [{"x": X[:10]}], x=X[:10])


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        (X, TypeError, "batches is a ndarray; expected an iterable of batches"),
        (7, TypeError, "batches is a int"),
        ([], ValueError, "batches holds none"),
        (iter([]), ValueError, "batches holds none"),
        ([("a",)], ValueError, r"batch 0 of batches"),
        ({"x": X}, TypeError, "batches is a dict; expected an iterable of batches"),
    ],
)
def test_what_is_no_batches(batches, error, match):
    with pytest.raises(error, match=match):
        run(monte_carlo(), batches)


def test_a_fit_of_batches_is_exported():
    fit = run(monte_carlo(), slices(10))
    log_z = ebm.log_normalizer(None, model, fit, X, method="quadrature")
    idata = ebm.to_arviz(fit, model, X, log_normalizer=log_z)
    assert idata["observed_data"]["x"].shape == (NUM_ROWS,)
    assert np.isfinite(idata.attrs["mean_log_density"])
