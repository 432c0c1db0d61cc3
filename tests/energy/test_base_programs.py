"""Draws and densities of bases are one program each, where JAX sees all of a base."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import transforms

from ebm_ppl.energy.base_programs import draws_of, unchecked_log_prob
from ebm_ppl.programs.one_program import can_be_handed_over, one_program


def bases():
    coins = dist.Bernoulli(0.3).expand([5]).to_event(1)
    return {
        "normal": dist.Normal(jnp.zeros(3), 2.0).to_event(1),
        "gamma": dist.Gamma(2.0, 1.5),
        "dirichlet": dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
        "truncated": dist.TruncatedNormal(0.5, 1.0, low=-1.0, high=2.0),
        "transformed": dist.TransformedDistribution(
            dist.Normal(0, 1),
            [transforms.AffineTransform(1.0, 2.0), transforms.ExpTransform()],
        ),
        "coins": coins,
        "mixture": dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.arange(2.0), 1.0)
        ),
    }


@pytest.mark.parametrize("name", bases())
def test_draws_and_densities_are_the_bases_own(name):
    base = bases()[name]
    assert can_be_handed_over(base)
    draws = draws_of(base, random.key(0), 7)
    np.testing.assert_allclose(draws, base.sample(random.key(0), (7,)), rtol=1e-5)
    np.testing.assert_allclose(
        unchecked_log_prob(base, draws), base.log_prob(draws), rtol=1e-5, atol=1e-5
    )


class Shifted(dist.Normal):
    """A base of a user's that keeps a number where JAX does not see it."""

    def __init__(self, shift):
        self.shift = shift
        super().__init__(0.0, 1.0)

    def log_prob(self, value, intermediates=None):
        return super().log_prob(value - self.shift)


def test_a_base_that_jax_does_not_see_whole_runs_as_it_is():
    assert not can_be_handed_over(Shifted(1.0))
    for shift in (1.0, 3.0):
        found = unchecked_log_prob(Shifted(shift), jnp.array(3.0))
        assert float(found) == pytest.approx(
            float(dist.Normal(shift, 1.0).log_prob(3.0)), abs=1e-6
        )
    # Nor inside of another
    assert not can_be_handed_over(Shifted(1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("trials", [[3, 4], 3])
def test_counts_that_jax_keeps_outside_of_its_leaves(trials):
    """NumPyro compares them as it finds them: an array has no single truth."""
    for _ in range(2):
        base = dist.Multinomial(np.asarray(trials), jnp.array([0.2, 0.8]))
        draws = draws_of(base, random.key(0), 4)
        np.testing.assert_array_equal(draws, base.sample(random.key(0), (4,)))
        found = unchecked_log_prob(base, draws)
        np.testing.assert_allclose(found, base.log_prob(draws), rtol=1e-5)


def test_equal_objects_share_a_program():
    runs = []

    @one_program(static_argnums=(2,))
    def density(base, value, power):
        runs.append(power)
        return base.log_prob(value) ** power

    for loc in (0.0, 1.0, 2.0):
        density(dist.Normal(loc, 1.0), jnp.ones(3), 2)
    assert runs == [2]

    # In a program already, it is part of that one.
    jax.jit(lambda value: density(dist.Normal(0.0, 1.0), value, 2))(jnp.ones(3))
    assert runs == [2, 2]


def test_derivatives_go_through():
    def at(value):
        return unchecked_log_prob(dist.Normal(1.0, 2.0), value)

    _, slope = jax.jvp(at, (jnp.array(2.0),), (jnp.array(1.0),))
    assert float(slope) == pytest.approx(-0.25)
    assert float(jax.grad(at)(jnp.array(2.0))) == pytest.approx(-0.25)
