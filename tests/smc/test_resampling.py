"""Resampling schemes: unbiased counts, sorted indices, no dead walkers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from ebm_ppl import multinomial, residual, systematic

SCHEMES = pytest.mark.parametrize("scheme", [systematic, residual, multinomial])


@SCHEMES
def test_expected_counts_follow_the_weights(scheme):
    weights = np.array([0.5, 0.25, 0.0, 0.2, 0.05])
    num, repeats = len(weights), 20_000
    indices = jax.vmap(lambda key: scheme(key, jnp.log(weights)))(
        random.split(random.key(0), repeats)
    )
    counts = (np.asarray(indices)[..., None] == np.arange(num)).sum(1)
    error = counts.std(0) / np.sqrt(repeats)
    assert np.all(np.abs(counts.mean(0) - num * weights) <= 5 * error + 1e-6)


def test_systematic_counts_differ_from_expectation_by_less_than_one():
    log_weights = random.normal(random.key(1), (64,))
    counts = np.bincount(systematic(random.key(2), log_weights), minlength=64)
    expected = 64 * np.asarray(jax.nn.softmax(log_weights))
    assert np.all(np.abs(counts - expected) < 1 + 1e-4)


def test_residual_counts_are_no_less_than_the_whole_part_of_what_is_expected():
    log_weights = random.normal(random.key(1), (64,))
    counts = np.bincount(residual(random.key(2), log_weights), minlength=64)
    expected = 64 * np.asarray(jax.nn.softmax(log_weights))
    assert np.all(counts >= np.floor(expected))
    assert np.any(counts > np.ceil(expected))  # the rest is drawn independently


@SCHEMES
def test_indices_are_sorted(scheme):
    indices = np.asarray(scheme(random.key(3), random.normal(random.key(4), (200,))))
    assert np.all(np.diff(indices) >= 0)


@SCHEMES
def test_equal_weights_of_any_size(scheme):
    assert np.all(np.asarray(scheme(random.key(0), jnp.full(16, -1e4))) < 16)
    np.testing.assert_array_equal(
        systematic(random.key(0), jnp.full(16, -1e4)), np.arange(16)
    )


@SCHEMES
def test_dead_walkers_are_never_selected_in_float32(scheme):
    """Long arrays with dead walkers inside and at both ends, where a float32 cumsum is
    not monotone."""
    num = 20_001
    alive = np.zeros(num, bool)
    alive[5_000:15_000:7] = True
    log_weights = jnp.where(
        alive, random.normal(random.key(5), (num,)), -jnp.inf
    ).astype(jnp.float32)
    picked = jax.vmap(lambda key: scheme(key, log_weights))(
        random.split(random.key(6), 50)
    )
    assert alive[np.asarray(picked)].all()


@SCHEMES
def test_a_single_survivor_takes_every_place(scheme):
    log_weights = jnp.full(33, -jnp.inf).at[32].set(-1e30)
    np.testing.assert_array_equal(scheme(random.key(7), log_weights), np.full(33, 32))
