"""The kernel seam in a finite space: heat-bath moves of a 4×4 Ising model.

A kernel without a step size, a gradient or anything to tune, held against the sum over
all 65,536 states.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from ebm_ppl import systematic
from ebm_ppl.kernels.base import (
    Kernel,
    KernelInfo,
    Potential,
    Space,
    choose,
    move,
)
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.passes import pass_of
from ebm_ppl.smc.path import Path
from ebm_ppl.smc.pilot import refine_ladder, run_pilot

SIDE = 4
COUPLING, FIELD = 0.35, 0.2


@dataclass(frozen=True)
class Gibbs(Kernel):
    """Every spin in turn from its conditional (Geman and Geman 1984)."""

    space = Space.FINITE

    def step(self, rng_key, state, target, tuning):
        def flip(carry, site_and_key):
            state, spin = carry, site_and_key[0]
            flipped = target.value(state.position.at[..., spin].multiply(-1.0))
            odds = jax.nn.sigmoid(state.potential - flipped.potential)
            is_flipped = random.uniform(site_and_key[1], odds.shape) < odds
            return choose(is_flipped, flipped, state), odds

        spins = jnp.arange(state.position.shape[-1])
        keys = random.split(rng_key, len(spins))
        state, odds = lax.scan(flip, state, (spins, keys))
        return state, KernelInfo(jnp.zeros_like(state.potential), odds.mean(0))


def ising(spins):
    """U(s) = −J Σ s_i s_j − h Σ s_i on a torus: not symmetric under s → −s."""
    grid = spins.reshape(*spins.shape[:-1], SIDE, SIDE)
    bonds = sum((grid * jnp.roll(grid, 1, axis)).sum((-1, -2)) for axis in (-1, -2))
    return -COUPLING * bonds - FIELD * spins.sum(-1)


STATES = 1.0 - 2.0 * ((np.arange(2**16)[:, None] >> np.arange(16)) & 1)
LOG_WEIGHTS = -np.asarray(ising(STATES.astype(np.float32)), float)
LOG_Z = float(np.logaddexp.reduce(LOG_WEIGHTS)) - 16 * np.log(2.0)
PROBABILITIES = np.exp(LOG_WEIGHTS - np.logaddexp.reduce(LOG_WEIGHTS))

MOMENTS = {
    "magnetisation": lambda s: s.mean(-1),
    "its cube": lambda s: s.mean(-1) ** 3,
    "energy": lambda s: np.asarray(ising(jnp.asarray(s, jnp.float32)), float),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_gibbs_leaves_the_model_invariant(moment):
    n = 20_000
    picked = np.random.default_rng(0).choice(len(STATES), (1, n), p=PROBABILITIES)
    kernel, target = Gibbs(), Potential(ising)
    state = kernel.evaluate(target, jnp.asarray(STATES[picked], jnp.float32))
    moved, info = move(kernel, random.key(0), state, target, (), 3)
    np.testing.assert_array_equal(info.log_weight, 0.0)
    assert 0.1 < float((moved.position != state.position).mean())

    values = MOMENTS[moment](np.asarray(moved.position, float))
    truth = (PROBABILITIES * MOMENTS[moment](STATES)).sum()
    assert abs(values.mean() - truth) < 5 * values.std() / np.sqrt(n)


def annealed(seed, num_islands=64):
    """Islands of 64 walkers from uniform states, on a ladder that a pilot chose."""
    key_pilot, key_draw, key_run = random.split(random.key(seed), 3)
    path = Path(lambda s: jnp.full(s.shape[:-1], 16 * jnp.log(2.0)), ising)
    options = AnnealingOptions(1, ess_threshold=0.5, resampling=systematic)
    kernel = Gibbs()

    def uniform(key, shape):
        return random.rademacher(key, (*shape, 16), jnp.float32)

    pilot = run_pilot(
        kernel,
        key_pilot,
        path,
        uniform(key_pilot, (1, 256)),
        kernel.init_tuning(16, ()),
        options,
        max_rungs=100,
    )
    ladder = refine_ladder(pilot, 16)
    start = uniform(key_draw, (num_islands, 64))
    return pass_of(*anneal(kernel, key_run, path, start, ladder, options))


def test_annealing_by_gibbs_is_unbiased_for_z():
    """E[Ẑ_c] = Z, by enumeration, within the islands' own standard error."""
    ratios = np.exp(np.asarray(jax.jit(annealed)(1).log_ratios, float) - LOG_Z)
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    assert 0.001 < error < 0.05
    assert abs(ratios.mean() - 1) < 4 * error


def test_walkers_of_a_finite_space_are_refused_on_a_continuous_site():
    import numpyro.distributions as dist

    import ebm_ppl as ebm

    energy = ebm.EnergyDistribution(lambda v: 0.3 * v**4, dist.Normal(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"site 'x'.*continuous.*Gibbs moves in a finite.*MALA\(\)"
    ):
        ebm.log_normalizer(random.key(0), energy, kernel=Gibbs(), method="bracket")
