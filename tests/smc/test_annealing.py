"""Annealing against closed forms and quadrature: log Z within its own standard error,
walkers on the target."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.energy.start import annealing_path, starting_coordinates
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.ensemble import Ensemble, resample_islands
from ebm_ppl.smc.path import Ladder, stretch
from ebm_ppl.smc.weights import ess_fraction, log_mean_exp

T15_9999 = 5.24  # Student t, 15 degrees of freedom, two-sided 99.99%


def quadrature(energy, base, low, high):
    grid = np.linspace(low, high, 200_001)
    density = np.exp(
        np.asarray(base.log_prob(grid), float) - np.asarray(energy(grid), float)
    )
    return float(np.log(np.trapezoid(density, grid)))


def gaussian_case():
    precision = jnp.array([0.5, 3.0, 10.0])
    energy = lambda v: 0.5 * (precision * (v - 1.0) ** 2).sum(-1)  # noqa: E731
    joint = 1 + precision
    exact = float(-0.5 * jnp.log(joint).sum() - 0.5 * (precision / joint).sum())
    return ebm.EnergyDistribution(
        energy, dist.Normal(0, 1).expand([3]).to_event(1)
    ), exact


def skewed_case():
    energy, base = lambda v: v**4 / 4 - 2 * v, dist.Normal(0.5, 1.5)
    return ebm.EnergyDistribution(energy, base), quadrature(energy, base, -8, 8)


def positive_case():
    energy, base = lambda v: (v - 2) ** 2, dist.Exponential(1.0)
    return ebm.EnergyDistribution(energy, base), quadrature(energy, base, 1e-9, 30)


def improper_case():
    flat = dist.ImproperUniform(constraints.real, (), ())
    energy = lambda v: v**4 / 4 - v  # noqa: E731
    grid = np.linspace(-8, 8, 200_001)
    exact = float(np.log(np.trapezoid(np.exp(-energy(grid)), grid)))
    return ebm.EnergyDistribution(energy, flat, start=dist.Normal(0, 2)), exact


def simplex_case():
    """Dirichlet(1, 1, 1) base times x₀ x₁²: another Dirichlet, so Z is a ratio of gamma
    functions."""
    energy = lambda v: -jnp.log(v[..., 0]) - 2 * jnp.log(v[..., 1])  # noqa: E731
    return ebm.EnergyDistribution(energy, dist.Dirichlet(jnp.ones(3))), float(
        np.log(2.0 * 1 * 2 / 120)
    )


CASES = {
    f.__name__: f
    for f in (gaussian_case, skewed_case, positive_case, improper_case, simplex_case)
}


@pytest.mark.parametrize("case", CASES)
def test_log_normalizer_is_within_its_interval(case):
    distribution, exact = CASES[case]()
    log_z = ebm.log_normalizer(
        random.key(0), distribution, num_temperatures=64, num_walkers=100
    )
    estimate, stderr = float(log_z.estimate["x"]), float(log_z.stderr["x"])
    assert 0 < stderr < 0.1
    assert abs(estimate - exact) < T15_9999 * stderr
    low, high = log_z.interval(0.9)["x"]
    assert low < estimate < high
    assert float(high - low) == pytest.approx(2 * 1.753 * stderr, rel=1e-3)


def test_each_island_is_unbiased():
    """mean of Ẑ_c / Z over many islands is 1: a short ladder makes the weights vary."""
    distribution, exact = skewed_case()
    options = {
        "num_chains": 2_000,
        "num_walkers": 20,
        "num_temperatures": 3,
        "method": "forward",
    }
    log_z = ebm.log_normalizer(random.key(1), distribution, **options)
    ratio = np.exp(np.asarray(log_z.log_normalizers["x"], float) - exact)
    assert ratio.std() > 0.03
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(ratio))


def test_walkers_are_copied_whole_where_islands_resample():
    """Before every temperature: Ẑ_c and Ẑ_c E_c[v] over many islands, by quadrature.

    Copies of positions, of weights or of what was evaluated there, but not of all three,
    would be off by a quarter.
    """
    distribution, exact = skewed_case()
    base = distribution.base
    transform = starting_coordinates(distribution, "x")
    path = annealing_path(distribution, base, transform)
    ladder = Ladder(
        jnp.zeros(()), jnp.array([0.1, 0.3, 1.0]), jnp.array([0.7, 0.4, 0.2])
    )
    position = transform.inv(base.sample(random.key(0), (2_000, 20)))
    options = AnnealingOptions(1, ess_threshold=1.01, resampling=ebm.systematic)
    ensemble, _ = anneal(ebm.MALA(), random.key(1), path, position, ladder, options)

    assert np.all(ensemble.past != 0)
    weights = np.exp(np.asarray(ensemble.past[:, None] + ensemble.log_weight) - exact)
    values = np.asarray(transform(ensemble.position))
    grid = np.linspace(-8, 8, 200_001)
    density = np.exp(
        np.asarray(base.log_prob(grid) - distribution.energy(grid)) - exact
    )
    for f in (np.ones_like, lambda v: v):
        islands = np.mean(weights * f(values), axis=1)
        error = islands.std() / np.sqrt(len(islands))
        assert error < 0.01
        assert abs(islands.mean() - np.trapezoid(density * f(grid), grid)) < 5 * error


def test_one_normaliser_per_batch_element():
    scales = jnp.array([0.5, 1.0, 4.0])
    base = dist.Normal(jnp.zeros(3), 1.0)
    distribution = ebm.EnergyDistribution(lambda v: 0.5 * scales * v**2, base)
    log_z = ebm.log_normalizer(
        random.key(2), distribution, num_temperatures=64, num_walkers=200
    )
    error = np.abs(log_z.estimate["x"] + 0.5 * np.log1p(scales)) / log_z.stderr["x"]
    assert error.shape == (3,)
    assert np.all(error < T15_9999)


def test_a_constant_in_the_energy_shifts_log_z_exactly():
    options = {"num_temperatures": 16, "num_walkers": 20, "num_chains": 4}
    # In float32 a rounding may turn an acceptance over, and the walkers part.
    with jax.enable_x64(True):
        distribution, _ = skewed_case()
        shifted = ebm.EnergyDistribution(
            lambda v: distribution.energy(v) + 3.0, distribution.base
        )
        plain = float(
            ebm.log_normalizer(random.key(3), distribution, **options).estimate["x"]
        )
        moved = float(
            ebm.log_normalizer(random.key(3), shifted, **options).estimate["x"]
        )
    assert moved == pytest.approx(plain - 3.0, abs=1e-9)


def test_start_is_used_exactly_where_it_is_the_energy():
    flat = dist.ImproperUniform(constraints.real, (), ())
    distribution = ebm.EnergyDistribution(
        lambda v: 0.5 * v**2, flat, start=dist.Normal(0, 1)
    )
    log_z = ebm.log_normalizer(random.key(4), distribution)
    assert log_z.estimate["x"] == pytest.approx(0.5 * np.log(2 * np.pi), abs=1e-5)
    assert log_z.stderr["x"] < 1e-5


def test_an_energy_that_annealing_cannot_reach_is_refused(monkeypatch):
    monkeypatch.setattr("ebm_ppl.walkers.placement.MAX_PILOT_RUNGS", 3)
    far = ebm.EnergyDistribution(lambda v: 100 * (v - 5.0) ** 2, dist.Normal(0, 1))
    with pytest.raises(
        ValueError, match=r"site 'x'.* stopped at inverse temperature .* closer start="
    ):
        ebm.log_normalizer(random.key(5), far)


def test_parameters_come_constrained():
    def model():
        rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
        numpyro.sample(
            "v", ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, dist.Normal(0, 1))
        )

    log_z = ebm.log_normalizer(
        random.key(6), model, {"rate": jnp.array(3.0)}, num_temperatures=64
    )
    assert abs(log_z.estimate["v"] + 0.5 * np.log(4.0)) < T15_9999 * log_z.stderr["v"]


def test_resampling_happens_island_by_island():
    """Only the island under the threshold changes, and log Ẑ_c of every island is
    kept."""
    log_weight = jnp.stack(
        [
            jnp.zeros(8),
            jnp.array([0.0] + [-10.0] * 7),
            jnp.array([0.0] * 4 + [-jnp.inf] * 4),
        ]
    )
    position = jnp.arange(24.0).reshape(3, 8)
    ensemble = Ensemble(position, -position, log_weight, jnp.array([1.0, 2.0, 3.0]))
    low = ess_fraction(log_weight, axis=1) < 0.3
    after = resample_islands(random.key(0), ensemble, low, ebm.systematic)
    np.testing.assert_array_equal(low, [False, True, False])
    np.testing.assert_array_equal(
        after.position[jnp.array([0, 2])], position[jnp.array([0, 2])]
    )
    np.testing.assert_array_equal(after.position[1], np.full(8, 8.0))
    np.testing.assert_array_equal(after.potential, -after.position)
    np.testing.assert_array_equal(after.log_weight[1], 0.0)
    np.testing.assert_allclose(
        after.log_normalizers, ensemble.log_normalizers, rtol=1e-6
    )
    np.testing.assert_allclose(
        ensemble.log_normalizers,
        ensemble.past + log_mean_exp(log_weight, axis=1),
        rtol=1e-6,
    )


def test_draws_of_a_normalised_energy_follow_it():
    """`sample` of a skewed energy with known log Z: first three moments within 5
    standard errors."""
    distribution, exact = skewed_case()
    known = distribution.with_log_normalizer(exact)
    draws = np.asarray(
        jax.jit(lambda key: known.sample(key, (20_000,)))(random.key(7)), float
    )
    grid = np.linspace(-8, 8, 20_001)
    density = np.exp(np.asarray(known.log_prob(grid), float))
    density /= density.sum()
    for power in (1, 2, 3):
        values = draws**power
        # Resampled draws repeat each other: half of them are new at worst.
        error = values.std() / np.sqrt(len(draws) / 2)
        assert abs(values.mean() - (grid**power * density).sum()) < 5 * error


@pytest.mark.parametrize("times", [1, 4, 64])
def test_a_stretched_ladder_passes_through_its_own_temperatures(times):
    """It ends at exactly 1, for any number of times up to the most."""
    own = jnp.array([0.1, 0.4, 0.7, 1.0])
    ladder = Ladder(jnp.zeros(()), own, jnp.array([4.0, 3.0, 2.0, 1.0]))
    stretched = stretch(ladder, jnp.asarray(times), 64)
    rungs = np.arange(4 * times)
    betas = np.asarray(stretched.betas)[rungs]
    assert stretched.betas.shape == (256,)
    assert betas[-1] == 1.0
    np.testing.assert_allclose(betas[times - 1 :: times], own, rtol=1e-6)
    steps = np.repeat(np.diff(own, prepend=0.0), times) / times
    np.testing.assert_allclose(betas, np.cumsum(steps), rtol=1e-5)
    tuned = np.asarray(stretched.tuning(rungs))
    np.testing.assert_array_equal(tuned, np.repeat(ladder.tunings, times))
