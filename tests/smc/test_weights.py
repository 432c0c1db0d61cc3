"""Log-weight arithmetic against exact values."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from ebm_ppl.smc.weights import (
    conditional_ess_fraction,
    ess_fraction,
    jackknife_log_mean_exp,
    log_mean_exp,
    pooled_ess_fraction,
)


def test_log_mean_exp_is_exact_far_from_zero():
    log_weights = jnp.array([-1000.0, -1000.0 + np.log(3.0)])
    assert log_mean_exp(log_weights) == pytest.approx(-1000.0 + np.log(2.0), rel=1e-6)
    assert log_mean_exp(jnp.full(5, -jnp.inf)) == -jnp.inf


def test_equal_weights_give_full_ess_whatever_their_size():
    for level in (-1e4, 0.0, 1e4):
        assert ess_fraction(jnp.full(7, level)) == pytest.approx(1.0, rel=1e-6)


def test_one_weight_gives_one_walker():
    assert ess_fraction(
        jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    ) == pytest.approx(0.25)


def test_ess_against_its_definition():
    log_weights = random.normal(random.key(0), (3, 50))
    weights = np.exp(np.asarray(log_weights, float))
    expected = weights.sum(1) ** 2 / (weights**2).sum(1) / 50
    np.testing.assert_allclose(ess_fraction(log_weights, axis=1), expected, rtol=1e-5)


def test_pooled_ess_is_that_of_the_pooled_weights():
    """Island-wise softmax over the number of islands, then the plain definition."""
    log_weights = (
        random.normal(random.key(1), (4, 25))
        + jnp.array([0.0, 3.0, -5.0, 100.0])[:, None]
    )
    weights = np.exp(np.asarray(log_weights, float))
    weights /= weights.sum(1, keepdims=True) * 4
    assert pooled_ess_fraction(log_weights) == pytest.approx(
        1 / (weights**2).sum() / 100, rel=1e-5
    )


def test_conditional_ess_against_its_definition():
    key_w, key_d = random.split(random.key(2))
    log_weights, increments = (
        random.normal(key_w, (4, 25)),
        0.5 * random.normal(key_d, (4, 25)),
    )
    weights = np.exp(np.asarray(log_weights, float))
    weights /= weights.sum(1, keepdims=True) * 4
    ratio = np.exp(np.asarray(increments, float))
    expected = (weights * ratio).sum() ** 2 / (weights * ratio**2).sum()
    assert conditional_ess_fraction(log_weights, increments) == pytest.approx(
        expected, rel=1e-5
    )


def test_conditional_ess_ignores_a_constant_increment():
    log_weights = random.normal(random.key(3), (2, 30))
    assert conditional_ess_fraction(
        log_weights, jnp.full((2, 30), 7.0)
    ) == pytest.approx(1.0, rel=1e-5)


def test_jackknife_against_the_loop():
    log_values = np.asarray(random.normal(random.key(4), (6, 2)), float)
    estimate, stderr = jackknife_log_mean_exp(jnp.asarray(log_values))
    full = np.log(np.exp(log_values).mean(0))
    left_out = np.stack(
        [np.log(np.exp(np.delete(log_values, c, 0)).mean(0)) for c in range(6)]
    )
    np.testing.assert_allclose(estimate, 6 * full - 5 * left_out.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        stderr, np.sqrt(5 / 6 * ((left_out - left_out.mean(0)) ** 2).sum(0)), rtol=1e-5
    )


def test_jackknife_removes_the_bias_of_the_log():
    """Log-normal estimates with mean 1: averaging logs is off by -σ²/2, the jackknife
    by O(1/C²)."""
    sigma, islands, repeats = 0.5, 4, 20_000
    log_values = sigma * random.normal(random.key(5), (islands, repeats)) - sigma**2 / 2
    estimate, stderr = jackknife_log_mean_exp(log_values)
    error = np.std(estimate) / np.sqrt(repeats)
    assert abs(float(jnp.mean(estimate))) < 5 * error + sigma**4 / islands**2
    assert abs(float(log_values.mean())) > 0.9 * sigma**2 / 2
    # The standard error is that of the estimate, to the few per cent that four islands
    # allow.
    assert float(jnp.sqrt(jnp.mean(stderr**2))) == pytest.approx(
        float(np.std(estimate)), rel=0.1
    )
