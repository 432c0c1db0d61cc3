"""Islands renewed by the clock: unbiased at any time, whatever the fit learned."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from scipy.special import logsumexp

import ebm_ppl as ebm
from ebm_ppl.backends.jarzynski.renewal import num_renewed
from ebm_ppl.programs.arguments import Arguments

pytestmark = pytest.mark.xdist_group("renewal")

GRID = np.linspace(-12, 12, 20_001)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(1000, 10)).astype(np.float32)
SKEWED = RNG.gamma(2.0, 0.5, size=200).astype(np.float32)


def quartic(x):
    """Skewed, with two unequal wells at its later parameters."""
    a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(
            lambda v: 0.05 * v**4 + b * v**2 + a * v, dist.Normal(0.5, 1.5)
        )
        numpyro.sample("x", energy, obs=x)


def log_z_of_quartic(a, b):
    log_p = np.array(dist.Normal(0.5, 1.5).log_prob(GRID), float)
    log_p -= 0.05 * GRID**4 + b * GRID**2 + a * GRID
    return logsumexp(log_p) + np.log(GRID[1] - GRID[0])


def means(x):
    """Ten means: log Z = θ²/2."""
    theta = numpyro.param("theta", jnp.zeros(10))
    with numpyro.plate("rows", len(x)):
        base = dist.Normal(jnp.zeros(10), 1.0).to_event(1)
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: -v @ theta, base), obs=x)


def small(model, optim, **options):
    settings = {"num_chains": 8, "num_holdout_chains": 4, "num_walkers": 32}
    settings = settings | {"renew_every": 50} | options
    return ebm.Jarzynski(model, optim, **settings)


def ratios(fit, log_z):
    """Ẑ_c / Z of the held-out islands, and the mean over training ones of log Ẑ_c/Z."""
    walkers = fit.state.walkers["x"]
    gaps = np.asarray(walkers.ensemble.log_normalizers, float) - log_z
    split = walkers.num_training_chains
    return np.exp(gaps[split:]), np.mean(gaps[:split])


def assert_has_mean_one(values):
    stderr = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values) - 1.0) < 4.0 * stderr
    assert stderr < 0.05


def test_fresh_islands_are_unbiased_and_the_oldest_leave():
    """Parameters at rest: 11 renewals of 48 islands."""
    backend = small(
        quartic, optax.sgd(0.0), num_chains=96, num_holdout_chains=48, num_walkers=16
    )
    start = {"a": 0.7, "b": -1.0}
    state = backend.init(random.key(0), SKEWED, init_params=start)
    log_z, found, places, until_pilot = log_z_of_quartic(**start), [], [], []
    for _ in range(11):
        before = state.walkers["x"]
        state = backend.upkeep(state, Arguments((SKEWED,), {}))
        after = state.walkers["x"]
        until_pilot.append(int(state.clock.until_pilot))
        jax.tree.map(
            lambda old, new: np.testing.assert_array_equal(old[48:], new[:48]),
            before.ensemble,
            after.ensemble,
        )
        found += list(np.exp(np.asarray(after.ensemble.log_normalizers[48:]) - log_z))
        places += [np.asarray(u).tobytes() for u in after.ensemble.position[48:]]

    assert num_renewed(after) == 48
    assert len(set(places)) == 528
    # Ladders for one turn, of two renewals here, then for two, then for four.
    assert until_pilot == [1, 0, 3, 2, 1, 0, 7, 6, 5, 4, 3]
    assert_has_mean_one(np.array(found))
    # Annealed to the energy: without, a single island would be off by far more.
    assert np.std(found) < 0.5


def test_held_out_islands_are_unbiased_while_the_fit_learns():
    """Given the path of the parameters, E[Ẑ_c] = Z at any age; training ones stay near."""
    backend = small(
        means, optax.sgd(2e-4), num_chains=40, num_holdout_chains=32, renew_every=40
    )
    found, training = [], []
    for seed in range(8):
        fit = backend.run(random.key(seed), 230, ROWS, progress_bar=False)
        log_z = 0.5 * np.sum(np.asarray(fit.params["theta"], float) ** 2)
        held_out, trained = ratios(fit, log_z)
        found += list(held_out)
        training.append(trained)
    assert_has_mean_one(np.array(found))
    assert np.mean(training) > -0.3


@pytest.mark.parametrize("renew_every", [50, None])
def test_what_learning_does_to_walkers_is_undone(renew_every):
    """The law says −γ·dim/(N·ESS) per update; renewed islands forget it."""
    backend = small(means, optax.sgd(5e-5), renew_every=renew_every)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = backend.run(random.key(0), 1500, ROWS, progress_bar=False)

    theta = np.asarray(fit.params["theta"], float)
    log_z = 0.5 * np.sum(theta**2)
    claimed = fit.history["log_normalizer_training"]["x"][-150:]
    gap = np.mean(claimed) - log_z
    messages = [str(w.message) for w in told]
    if renew_every is None:
        assert gap < -1.5
        assert any("renew_every" in message for message in messages)
        return
    assert abs(gap) < 0.15
    assert not messages
    assert np.all(np.abs(theta - ROWS.mean(0)) < 4 * 1000**-0.5)


def test_a_run_in_parts_is_the_same_run():
    """The clock and the ladders are part of the state."""
    backend = small(quartic, optax.sgd(1e-4), renew_every=15)
    whole = backend.run(random.key(1), 80, SKEWED, progress_bar=False)
    first = backend.run(random.key(1), 45, SKEWED, progress_bar=False)
    second = backend.run(
        random.key(9), 35, SKEWED, init_state=first.state, progress_bar=False
    )
    for old, new in zip(
        jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True
    ):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = random.key_data(old), random.key_data(new)
        np.testing.assert_array_equal(old, new)


def test_renewals_go_by_the_clock_alone():
    """Walkers of other weights are renewed at the same updates, along a ladder of their
    own."""
    backend = small(quartic, optax.sgd(0.0), renew_every=15)
    state = backend.init(random.key(0), SKEWED, init_params={"a": 0.5, "b": -0.5})
    walkers = state.walkers["x"]
    ensemble = walkers.ensemble._replace(
        log_weight=walkers.log_weight.at[0].multiply(30.0),
        position=walkers.ensemble.position + 0.3,
    )
    other = replace(state, walkers={"x": replace(walkers, ensemble=ensemble)})
    after = backend.upkeep(state, Arguments((SKEWED,), {}))
    beside = backend.upkeep(other, Arguments((SKEWED,), {}))

    jax.tree.map(np.testing.assert_array_equal, after.clock, beside.clock)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[-4:], b[-4:]),
        after.walkers["x"].ensemble,
        beside.walkers["x"].ensemble,
    )


def test_an_energy_out_of_reach_keeps_its_islands():
    """A wall at which no draw of the base gets through."""

    def model(x):
        h = numpyro.param("h", 0.0)
        energy = ebm.EnergyDistribution(
            lambda v: jnp.where(h > 0.5, jnp.inf, 0.0) + h * v**2, dist.Normal()
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = small(model, optax.sgd(0.0))
    state = backend.init(random.key(0), SKEWED)
    state = replace(state, params={"h": jnp.asarray(1.0)})
    after = state
    for _ in range(3):
        with pytest.warns(UserWarning, match="'x' could not be renewed"):
            after = backend.upkeep(after, Arguments((SKEWED,), {}))
        jax.tree.map(np.testing.assert_array_equal, state.walkers, after.walkers)
        assert int(after.clock.left) == 400
        assert int(after.clock.until_pilot) == 0


def test_a_mode_that_fresh_walkers_miss_is_kept():
    """A narrow mode far out, which walkers followed as it grew, is not thrown away."""

    def model(x):
        a, s = numpyro.param("a", 0.0), numpyro.param("s", 0.0)

        def energy(v):
            squares = jnp.sum((v - 4 * 5**-0.5) ** 2, -1)
            mode = a - 0.5 * squares * jnp.exp(-2 * s) - 5 * s
            return -jnp.logaddexp(0.0, mode + 0.5 * jnp.sum(v**2, -1))

        base = dist.Normal(jnp.zeros(5), 1.0).to_event(1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    # The walkers go along as the mode gets narrow.
    rows = RNG.normal(size=(100, 5)).astype(np.float32)
    backend = small(model, optax.sgd(0.0), num_walkers=64)
    state = backend.init(random.key(0), rows)
    for width in (0.8, 0.65, 0.55, 0.47, 0.4, 0.35, 0.3):
        narrow = {"a": jnp.asarray(0.0), "s": jnp.asarray(np.log(width))}
        state = backend.with_params(state, narrow, Arguments((rows,), {}))
    known = np.asarray(state.walkers["x"].ensemble.log_normalizers)
    assert np.mean(known) == pytest.approx(np.log(2), abs=0.2)

    # More temperatures are tried first; where they do not help, a warning says so.
    after = backend.upkeep(state, Arguments((rows,), {}))
    jax.tree.map(np.testing.assert_array_equal, state.walkers, after.walkers)
    line = after.clock.lines["x"]
    assert (int(line.times), int(after.clock.left)) == (4, 200)
    lines = {"x": line._replace(times=jnp.asarray(64))}
    after = replace(after, clock=replace(after.clock, lines=lines))
    with pytest.warns(UserWarning, match="'x' are not renewed: of fresh islands, "):
        after = backend.upkeep(after, Arguments((rows,), {}))
    jax.tree.map(np.testing.assert_array_equal, state.walkers, after.walkers)


@pytest.mark.runs_long
def test_a_ladder_that_would_be_too_coarse():
    """Far out, a pilot needs more temperatures than a renewal has."""
    backend = small(means, optax.sgd(0.0))
    start = {"theta": np.full(10, 40.0, np.float32)}
    state = backend.init(random.key(0), ROWS, init_params=start)
    with pytest.warns(UserWarning, match="'x' could not be renewed"):
        backend.upkeep(state, Arguments((ROWS,), {}))


def test_walkers_that_are_never_renewed():
    backend = small(quartic, optax.sgd(1e-4), renew_every=None)
    state = backend.init(random.key(0), SKEWED)
    assert state.clock is None
    # The backend decides, whoever made the state.
    renewing = small(quartic, optax.sgd(1e-4), renew_every=2)
    fit = renewing.run(random.key(0), 9, SKEWED, init_state=state, progress_bar=False)
    assert int(fit.state.clock.num_pilots) == 1
    fit = backend.run(
        random.key(0), 2, SKEWED, init_state=fit.state, progress_bar=False
    )
    assert fit.state.clock is None
    with pytest.raises(ValueError, match="renew_every = 0"):
        small(quartic, optax.sgd(1e-4), renew_every=0)
