"""Runs that are watched by a number of one's own."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

import ebm_ppl as ebm

X = np.random.default_rng(0).normal(size=50).astype(np.float32) + 2.0
BASE = dist.Normal(0.0, 1.0)


def model(x):
    """E = −m v on N(0, 1): the maximum of the likelihood is the rows' mean."""
    m = numpyro.param("m", 0.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: -m * v, BASE), obs=x)


def run(monitor, num_steps=150, **options):
    backend = ebm.MonteCarloMLE(model, optax.sgd(1e-4), num_draws=256)
    return backend.run(
        random.key(0), num_steps, X, progress_bar=False, validation=monitor, **options
    )


def test_the_best_state_is_kept():
    """It passes m = 1 on its way to 2."""
    seen = []

    def nearness(params):
        seen.append(float(params["m"]))
        return -jnp.abs(params["m"] - 1.0)

    fit = run(ebm.Monitor(nearness, every=10))
    assert len(seen) == 15
    looks = fit.history["monitor"][9::10]
    np.testing.assert_allclose(looks, -np.abs(np.array(seen) - 1), rtol=1e-6)
    assert np.isnan(np.delete(fit.history["monitor"], np.s_[9::10])).all()
    assert float(fit.params["m"]) == seen[int(np.argmax(looks))]
    assert len(fit.history["loss"]) == 150


def test_patience_ends_the_run():
    fit = run(ebm.Monitor(lambda params: -params["m"], every=10, patience=3))
    # The first look is the best; four more had no better one.
    assert len(fit.history["loss"]) == 50
    assert fit.history["monitor"][9] == -fit.params["m"]


def test_no_number_is_told():
    with pytest.warns(UserWarning, match="gave no finite number, so the last"):
        fit = run(ebm.Monitor(lambda params: np.nan, every=10), num_steps=20)
    assert np.isfinite(fit.params["m"])


def test_it_is_exported_and_drawn():
    fit = run(ebm.Monitor(lambda params: params["m"], every=10), num_steps=20)
    assert ebm.to_arviz(fit, model, X)["training"]["monitor"].shape == (20,)
    assert "monitor" in [ax.get_ylabel() for ax in ebm.plot_training(fit)]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: ebm.Monitor(0.5),
            TypeError,
            "function is a float; expected a function",
        ),
        (
            lambda: ebm.Monitor(len, every=0),
            ValueError,
            "every = 0; expected at least 1",
        ),
        (lambda: ebm.Monitor(len, patience=0), ValueError, "patience = 0; expected"),
    ],
)
def test_what_is_no_monitor(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_several_numbers_are_refused():
    with pytest.raises(TypeError, match=r"value of shape \(2,\); expected one number"):
        run(ebm.Monitor(lambda params: np.ones(2)), num_steps=1)
