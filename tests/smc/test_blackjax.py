"""log Z against an independent implementation: BlackJAX's adaptive tempered sequential
Monte Carlo."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax import adaptive_tempered_smc
from blackjax.smc import extend_params
from blackjax.smc.resampling import systematic
from jax import lax, random

import ebm_ppl as ebm

BASE = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
NUM_PARTICLES, NUM_RUNS = 1_000, 16
T15_9999 = 5.24  # Student t, 15 degrees of freedom, two-sided 99.99%


def energy(v):
    """Skewed, and its coordinates depend on each other."""
    return (
        0.25 * (v**4).sum(-1)
        - v[..., 0]
        + 0.5 * v[..., 0] * v[..., 1] ** 2
        + v[..., 2] ** 3 / 3
    )


def tempered_smc(rng_key):
    sampler = adaptive_tempered_smc(
        BASE.log_prob,
        lambda v: -energy(v),
        blackjax.mala.build_kernel(),
        blackjax.mala.init,
        extend_params({"step_size": 0.1}),
        systematic,
        target_ess=0.9,
        num_mcmc_steps=10,
    )
    key_start, key_run = random.split(rng_key)
    state = sampler.init(BASE.sample(key_start, (NUM_PARTICLES,)))

    def step(carry):
        key, state, log_z = carry
        key, key_step = random.split(key)
        state, info = sampler.step(key_step, state)
        return key, state, log_z + info.log_likelihood_increment

    unfinished = lambda carry: carry[1].tempering_param < 1.0  # noqa: E731
    return lax.while_loop(unfinished, step, (key_run, state, jnp.zeros(())))[2]


def test_log_z_agrees_with_tempered_smc():
    theirs = np.asarray(
        jax.jit(jax.vmap(tempered_smc))(random.split(random.key(0), NUM_RUNS)), float
    )
    log_z = ebm.log_normalizer(
        random.key(1), ebm.EnergyDistribution(energy, BASE), progress_bar=False
    )
    assert log_z.is_certified, str(log_z)
    stderr = np.hypot(theirs.std(ddof=1) / np.sqrt(NUM_RUNS), float(log_z.stderr["x"]))
    assert stderr < 0.02
    assert abs(theirs.mean() - float(log_z.estimate["x"])) < T15_9999 * stderr
