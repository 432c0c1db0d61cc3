"""Langevin moves and their weights: exact invariants, then Monte Carlo on a skewed
target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from pages import definitions_of

from ebm_ppl import MALA, ULA
from ebm_ppl.kernels.base import Potential, move
from ebm_ppl.kernels.langevin import log_transition_difference
from ebm_ppl.smc.weights import ess_fraction

(RandomWalk,) = definitions_of("docs/extending.md", "RandomWalk")


def skewed(u):
    """U(u) = u²/2 + 2 log(1 + exp(2u)): skewed, its slope Lipschitz (ULA needs that),
    moments by quadrature."""
    return u**2 / 2 + 2 * jnp.logaddexp(0.0, 2 * u)


GRID = np.linspace(-9, 9, 20_001)
DENSITY = np.exp(-np.asarray(skewed(GRID), float))
DENSITY /= DENSITY.sum()


def expectation(f):
    return float((f(GRID) * DENSITY).sum())


def exact_draws(key, shape):
    return jnp.interp(
        random.uniform(key, shape), jnp.asarray(np.cumsum(DENSITY)), jnp.asarray(GRID)
    )


TARGET = Potential(skewed)


def run(kernel, position, step_size, num_steps, seed=0):
    state = kernel.evaluate(TARGET, position)
    return move(
        kernel, random.key(seed), state, TARGET, jnp.asarray(step_size), num_steps
    )


def test_transition_difference_is_the_log_ratio_of_the_two_proposals():
    """Against the normal densities written out: log π(y) q(y→x) - log π(x) q(x→y)."""
    h = 0.3
    x, y = (TARGET.value_and_grad(jnp.array([[u]])) for u in (0.7, -0.4))

    def log_q(a, b):
        return -((b.position - a.position + h * a.grad) ** 2) / (4 * h)

    expected = (-y.potential + log_q(y, x)) - (-x.potential + log_q(x, y))
    np.testing.assert_allclose(
        log_transition_difference(x, y, jnp.asarray(h)), expected, rtol=1e-5
    )


def test_step_size_zero_leaves_everything_in_place():
    position = exact_draws(random.key(0), (2, 50))
    for kernel in (ULA(), MALA()):
        state, info = run(kernel, position, 0.0, 3)
        np.testing.assert_array_equal(state.position, position)
        np.testing.assert_allclose(info.log_weight, 0.0, atol=1e-6)


# Kernels that leave the target invariant, without weights.
KERNELS = {"MALA": MALA, "random walk, of a page": RandomWalk}


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_kernels_leave_weights_alone_and_the_target_invariant(kernel):
    n = 40_000
    state, info = run(KERNELS[kernel](), exact_draws(random.key(1), (1, n)), 0.4, 5)
    np.testing.assert_array_equal(info.log_weight, 0.0)
    for power in (1, 2, 3):
        values = np.asarray(state.position, float) ** power
        error = values.std() / np.sqrt(n)
        assert abs(values.mean() - expectation(lambda u, p=power: u**p)) < 5 * error


@pytest.mark.parametrize("kernel", KERNELS)
def test_acceptance_is_the_rate_at_which_walkers_move(kernel):
    n = 40_000
    position = exact_draws(random.key(2), (1, n))
    state, info = run(KERNELS[kernel](), position, 0.8, 1)
    moved = float((state.position != position).mean())
    assert 0.2 < moved < 0.9
    assert abs(moved - float(info.acceptance.mean())) < 5 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_kernels_reject_what_is_not_finite(kernel):
    class Broken(Potential):
        def value_and_grad(self, position):
            return self.value(position)._replace(grad=jnp.ones_like(position))

    broken = Broken(lambda u: jnp.where(u > 0, jnp.nan, skewed(u)))
    position = -jnp.abs(random.normal(random.key(3), (1, 500)))
    state = KERNELS[kernel]().evaluate(broken, position)
    state, info = KERNELS[kernel]().step(random.key(4), state, broken, jnp.asarray(2.0))
    assert np.all(np.isfinite(state.potential))
    assert np.all(np.asarray(state.position) <= 0)
    assert np.all(np.isfinite(info.acceptance))


def test_ula_weights_have_mean_one_from_exact_draws():
    n = 40_000
    _, info = run(ULA(), exact_draws(random.key(5), (1, n)), 0.1, 4)
    weights = np.exp(np.asarray(info.log_weight, float))
    assert weights.std() > 0.05  # single weights are not one
    assert abs(weights.mean() - 1) < 5 * weights.std() / np.sqrt(n)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_ula_weights_correct_its_bias(power):
    """At h = 0.3 the raw walkers are biased by many standard errors; the weighted ones
    are not."""
    n = 100_000
    state, info = run(ULA(), exact_draws(random.key(6), (1, n)), 0.3, 4)
    values = np.asarray(state.position, float) ** power
    weights = np.asarray(jax.nn.softmax(info.log_weight[0]), float)
    ess = n * float(ess_fraction(info.log_weight)[0])
    assert ess > 0.1 * n
    truth = expectation(lambda u: u**power)
    weighted = (weights * values[0]).sum()
    error = np.sqrt((weights**2 * (values[0] - weighted) ** 2).sum())
    assert abs(weighted - truth) < 5 * error
    if power == 2:
        assert abs(values.mean() - truth) > 10 * values.std() / np.sqrt(n)


def test_a_step_size_per_batch_element():
    """Shapes (chains, walkers, batch, event): element 0 stands still, element 1
    moves."""

    bowl = Potential(lambda position: 0.5 * (position**2).sum(-1))
    state = bowl.value_and_grad(random.normal(random.key(7), (2, 5, 2, 3)))
    moved, info = MALA().step(random.key(8), state, bowl, jnp.array([0.0, 0.5]))
    np.testing.assert_array_equal(moved.position[:, :, 0], state.position[:, :, 0])
    assert not np.array_equal(moved.position[:, :, 1], state.position[:, :, 1])
    assert info.acceptance.shape == (2, 5, 2)


def test_initial_step_size_scales_with_dimension():
    np.testing.assert_allclose(MALA().init_tuning(64, (2,)), [1.36 / 4] * 2, rtol=1e-6)
    np.testing.assert_allclose(MALA(0.2).init_tuning(64, ()), 0.2, rtol=1e-6)


def test_the_exact_form_of_a_kernel():
    assert ULA(0.3).exactly() == MALA(0.3)
    assert MALA(0.3).exactly() == MALA(0.3)


def test_scaled_moves_are_longer_by_the_factor():
    """At U = 0 a step is √(2h) ξ: four times h doubles it."""
    flat = Potential(jnp.zeros_like)
    for kernel in (MALA(), RandomWalk()):
        state = kernel.evaluate(flat, jnp.zeros((1, 100)))
        short, long = (
            kernel.step(
                random.key(9), state, flat, kernel.scaled(jnp.asarray(0.1), factor)
            )[0].position
            for factor in (1.0, 4.0)
        )
        np.testing.assert_allclose(long, 2 * short, rtol=1e-5)
