"""How much training islands count in the gradient of log Z."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions.transforms import IdentityTransform
from scipy.special import logsumexp, softmax

import ebm_ppl as ebm
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.walkers.state import MAX_LEAN, Walkers

RNG = np.random.default_rng(0)


def walkers_of(log_weight, past, position=None):
    """The last island is held out."""
    position = jnp.zeros_like(log_weight) if position is None else position
    ensemble = Ensemble(position, jnp.zeros_like(log_weight), log_weight, past)
    return Walkers(ensemble, jnp.ones(()), IdentityTransform(), None, 1)


def test_islands_that_agree_count_as_one_pool():
    """Up to a nat from their median, walkers count by their weights and the past's."""
    log_weight = RNG.normal(size=(4, 50, 3)).astype(np.float32)
    past = RNG.uniform(-0.4, 0.4, size=(4, 3)).astype(np.float32)
    found = walkers_of(jnp.asarray(log_weight), jnp.asarray(past)).training_weights()
    pooled = softmax((log_weight + past[:, None])[:3].reshape(150, 3), axis=0)
    np.testing.assert_allclose(found, pooled.reshape(3, 50, 3), rtol=1e-4)


def test_none_speaks_for_all():
    log_weight = jnp.asarray(RNG.normal(size=(6, 50)), jnp.float32)
    level = logsumexp(log_weight, axis=1)
    # Their log Z: 0, 0, 0, 30 and -30, and one held out.
    past = jnp.array([0.0, 0.0, 0.0, 30.0, -30.0, 99.0]) - level
    island = walkers_of(log_weight, past).training_weights().sum(1)
    np.testing.assert_allclose(island[3] / island[0], np.exp(MAX_LEAN), rtol=1e-4)
    np.testing.assert_allclose(island[4] / island[0], np.exp(-MAX_LEAN), rtol=1e-4)
    assert float(island.sum()) == pytest.approx(1.0, rel=1e-5)


def test_the_bias_of_a_share_is_that_of_all_islands_not_of_one():
    """A mode's mass is found as 1 by all, but by each with an error of 0.4 nats.

    The share of one island is then off by -V / 8 in the mean, V = e^0.16 - 1; that of
    11 islands by an 11th of it.
    """
    num, spread = 20_000, 0.4
    mass = np.exp(spread * RNG.normal(size=(12, num)) - 0.5 * spread**2)
    log_weight = np.log(np.stack([np.ones_like(mass), mass], axis=1))
    weights = walkers_of(
        jnp.asarray(log_weight, jnp.float32), jnp.zeros((12, num))
    ).training_weights()

    share = np.asarray(weights[:, 1].sum(0), float)
    equal = np.mean(mass[:11] / (1 + mass[:11]), axis=0)
    error = share.std() / np.sqrt(num)
    expected = -(np.exp(spread**2) - 1) / 8
    assert np.mean(equal) - 0.5 == pytest.approx(expected, rel=0.15)
    assert abs(np.mean(share) - 0.5 - expected / 11) < 4 * error + 0.1 * abs(expected)


@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=["one log Z", "two"])
def test_the_gradient_has_these_weights(batch_shape):
    """That of the next update too, where one log Z saves it."""

    def model(x):
        slope = numpyro.param("slope", jnp.full(batch_shape, 0.3))
        base = dist.Normal(jnp.zeros(batch_shape), 1.0)
        energy = ebm.EnergyDistribution(lambda v: slope * v, base)
        with numpyro.plate("rows", len(x), dim=-1 - len(batch_shape)):
            numpyro.sample("x", energy, obs=x)

    x = RNG.normal(size=(20, *batch_shape)).astype(np.float32)
    backend = ebm.Jarzynski(model, optax.sgd(1e-3), num_chains=8, num_walkers=32)
    state = backend.init(jax.random.key(0), x)
    site = state.walkers["x"]
    tilted = site.ensemble.past.at[0].add(0.9).at[1].add(-5.0)
    site = replace(site, ensemble=site.ensemble._replace(past=tilted))
    state = replace(state, walkers={"x": site})

    after, _ = jax.jit(backend.update)(state, x)
    if not batch_shape:
        # The saved gradient is that of before the islands were told apart.
        state, (after, _) = after, jax.jit(backend.update)(after, x)
        # Saved by the switch, before the move: at the last positions, the new weights.
        saved = float(after.walkers["x"].gradient["slope"])
        weight = after.walkers["x"].training_weights()
        before = state.walkers["x"].values[:4]
        assert saved == pytest.approx(-float(jnp.sum(weight * before)), rel=1e-4)
        return

    site = state.walkers["x"]
    mean = jnp.sum(site.training_weights() * site.values[:4], axis=(0, 1))
    gradient = x.sum(0) - len(x) * mean
    step = state.params["slope"] - after.params["slope"]
    np.testing.assert_allclose(step, 1e-3 * gradient, rtol=1e-4)
