"""The Jarzynski backend against exact invariants, closed forms and quadrature."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.backends.jarzynski.warnings import training_left_held_out
from ebm_ppl.energy.start import potential_at
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.weights import conditional_ess_fraction

T3_999 = (
    10.2  # Student t, 3 degrees of freedom, 99.9% on either side: four held-out islands
)
GRID = np.linspace(-10, 10, 40_001)
X = np.random.default_rng(0).normal(size=40) * 0.7
SKEWED_DATA = np.random.default_rng(1).gamma(2.0, 0.5, size=200) - 0.5


def skewed_model(x, init=(0.0, 0.0)):
    """E(v) = a v⁴/4 - b v over a normal base: skewed wherever b is not 0, two
    parameters."""
    slope = numpyro.param("slope", jnp.asarray(init[1]))
    quartic = numpyro.param("quartic", jnp.asarray(init[0]))
    energy = lambda v: jnp.exp(quartic) * v**4 / 40 - slope * v  # noqa: E731
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("x", ebm.EnergyDistribution(energy, dist.Normal(0, 1)), obs=x)


def skewed_density(params):
    """Grid density and log Z by quadrature."""
    energy = (
        np.exp(float(params["quartic"])) * GRID**4 / 40 - float(params["slope"]) * GRID
    )
    log_density = -0.5 * GRID**2 - 0.5 * np.log(2 * np.pi) - energy
    log_z = np.log(np.trapezoid(np.exp(log_density), GRID))
    return np.exp(log_density - log_z), log_z


def precision_model(x, prior=False):
    if prior:
        lam = numpyro.sample("lam", dist.Gamma(2, 2))
    else:
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    flat = dist.ImproperUniform(constraints.real, (), ())
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * lam * v**2, flat, start=dist.Normal(0, 1)
    )
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("x", energy, obs=x)


def site_potential(backend, state, walkers, *args):
    bound = BoundModel(backend.model, state.transforms, random.key(0), Arguments(args))
    return potential_at(
        bound.energies(state.params)["x"], walkers.transform, walkers.ensemble.position
    )


def test_weights_telescope_at_step_size_zero():
    """Walkers that do not move: A = U_0(x) - U_K(x), whatever happened between."""
    backend = ebm.Jarzynski(
        skewed_model,
        optax.adam(0.05),
        kernel=ebm.ULA(0.0),
        ess_target=None,
        ess_threshold=0.0,
        num_walkers=16,
    )
    start = backend.init(random.key(0), SKEWED_DATA)
    end = backend.run(
        random.key(0), 30, SKEWED_DATA, init_state=start, progress_bar=False
    ).state
    np.testing.assert_array_equal(end.walkers["x"].values, start.walkers["x"].values)
    moved = site_potential(
        backend, start, start.walkers["x"], SKEWED_DATA
    ) - site_potential(backend, end, end.walkers["x"], SKEWED_DATA)
    grown = end.walkers["x"].log_weight - start.walkers["x"].log_weight
    assert float(jnp.abs(moved).max()) > 0.1
    np.testing.assert_allclose(grown, moved, atol=2e-5)


def test_weights_stay_zero_with_mala_at_fixed_parameters():
    backend = ebm.Jarzynski(
        skewed_model,
        optax.sgd(0.0),
        kernel=ebm.MALA(0.3),
        num_kernel_steps=3,
        num_walkers=16,
    )
    start = backend.init(random.key(0), SKEWED_DATA)
    end = backend.run(
        random.key(0), 20, SKEWED_DATA, init_state=start, progress_bar=False
    ).state
    assert not np.array_equal(end.walkers["x"].values, start.walkers["x"].values)
    np.testing.assert_allclose(
        end.walkers["x"].log_weight, start.walkers["x"].log_weight, atol=2e-5
    )


@pytest.mark.parametrize("kernel", [ebm.MALA(0.5), ebm.ULA(0.1)], ids=["MALA", "ULA"])
def test_gradient_and_log_z_of_a_skewed_energy_while_it_is_learned(kernel):
    """After 300 updates that moved the density far, with the weights of all of them:
    ∇log Z, log Z and weighted moments against quadrature."""
    backend = ebm.Jarzynski(
        skewed_model,
        optax.adam(0.02),
        kernel=kernel,
        num_walkers=500,
        renew_every=None,
    )
    fit = backend.run(random.key(3), 300, SKEWED_DATA, progress_bar=False)
    density, log_z = skewed_density(fit.params)
    walkers = fit.state.walkers["x"]
    assert float(fit.params["slope"]) > 0.5
    assert fit.history["ess"]["x"][-1] > 0.5

    estimate, stderr = (float(v) for v in walkers.log_normalizer())
    assert stderr < 0.05
    assert abs(estimate - log_z) < T3_999 * stderr

    # ∇log Z = -E[∂U]: slope gives E[v], quartic gives -E[exp(q) v⁴ / 40].
    split = walkers.num_training_chains
    values, weights = (
        np.asarray(walkers.values[:split]),
        np.asarray(jax.nn.softmax(walkers.log_weight[:split], 1)),
    )
    quartic = np.exp(float(fit.params["quartic"]))
    for f, g in (
        (lambda v: v, walkers.gradient["slope"]),
        (lambda v: -quartic * v**4 / 40, walkers.gradient["quartic"]),
    ):
        islands = (weights * f(values)).sum(1)
        error = islands.std(ddof=1) / np.sqrt(split)
        truth = np.trapezoid(density * f(GRID), GRID)
        # t with 11 degrees of freedom, 99.98%.  The saved gradient is one move older:
        # its error adds.
        assert abs(islands.mean() - truth) < 5.5 * error
        assert abs(float(g) - truth) < 5.5 * error * np.sqrt(2)


def test_few_walkers_move_and_the_weights_stay_exact():
    """A tenth of them moves in an update, all are switched: E[Ẑ_c / Z] = 1."""
    backend = ebm.Jarzynski(
        skewed_model,
        optax.adam(0.01),
        kernel=ebm.ULA(0.6),
        num_chains=68,
        num_holdout_chains=64,
        num_walkers=100,
        moved_share=0.1,
        renew_every=None,
    )
    found = []
    for seed in range(4):
        fit = backend.run(random.key(seed), 60, SKEWED_DATA, progress_bar=False)
        log_z = fit.state.walkers["x"].ensemble.log_normalizers[4:]
        found += list(np.exp(np.asarray(log_z, float) - skewed_density(fit.params)[1]))
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert error < 0.01
    assert abs(np.mean(found) - 1.0) < 4 * error
    # Far enough for the weights to matter.
    assert np.std(fit.state.walkers["x"].log_weight) > 0.2

    new, _ = jax.jit(backend.update)(fit.state, SKEWED_DATA)
    has_moved = new.walkers["x"].values != fit.state.walkers["x"].values
    is_kept = np.all(np.asarray(new.walkers["x"].log_weight) != 0, axis=1)
    np.testing.assert_array_equal(np.sum(has_moved, axis=1)[is_kept], 10)
    assert is_kept.any()


@pytest.mark.runs_long
def test_precision_by_maximum_likelihood_and_by_map():
    """Design table: λ̂ = n / Σx² = 3.275 within 1%, MAP 2.590 within 1%, log Z(λ)
    within 0.01."""
    optim = optax.adam(optax.cosine_decay_schedule(0.03, 1_500))
    for prior, exact in (
        (False, 40 / (X**2).sum()),
        (True, (40 / 2 + 1) / ((X**2).sum() / 2 + 2)),
    ):
        backend = ebm.Jarzynski(precision_model, optim, num_walkers=1_000)
        fit = backend.run(random.key(0), 1_500, X, prior=prior, progress_bar=False)
        lam = float(fit.params["lam"])
        assert lam == pytest.approx(exact, rel=0.01)
        log_z, stderr = (
            float(fit.history["log_normalizer"]["x"][-1]),
            fit.history["log_normalizer_stderr"]["x"][-1],
        )
        assert stderr < 0.01
        assert abs(log_z - 0.5 * np.log(2 * np.pi / lam)) < 0.01


def test_loss_is_the_negative_log_joint():
    """At the base log Z = 0 exactly, so the first loss is the data's energy, prior
    included."""
    backend = ebm.Jarzynski(precision_model, optax.sgd(0.0), num_walkers=8)
    state = backend.init(
        random.key(0), X, prior=True, init_params={"lam": jnp.array(1.0)}
    )
    _, info = backend.update(state, X, prior=True)
    exact = -dist.Normal(0, 1).log_prob(X).sum() - dist.Gamma(2, 2).log_prob(1.0)
    assert float(info["loss"]) == pytest.approx(float(exact), rel=1e-5)


def test_held_out_islands_touch_nothing():
    """Other held-out walkers, and weights, leave parameters, step size, scale and
    training walkers as they were."""
    backend = ebm.Jarzynski(skewed_model, optax.adam(0.3), num_walkers=16, num_chains=8)
    state = backend.init(random.key(0), SKEWED_DATA)
    walkers = state.walkers["x"]
    ensemble = walkers.ensemble
    tampered = ensemble._replace(
        position=ensemble.position.at[4:].add(1.0),
        log_weight=ensemble.log_weight.at[4:, ::2].add(-3.0),
    )
    other = replace(state, walkers={"x": replace(walkers, ensemble=tampered)})
    update = jax.jit(backend.update)
    for _ in range(3):
        state, info = update(state, SKEWED_DATA)
        other, info_other = update(other, SKEWED_DATA)
    assert info["update_scale"] < 1
    for name in ("slope", "quartic"):
        assert state.params[name] == other.params[name]
    assert state.update_scale == other.update_scale
    assert state.walkers["x"].tuning == other.walkers["x"].tuning
    np.testing.assert_array_equal(
        state.walkers["x"].values[:4], other.walkers["x"].values[:4]
    )
    assert info["ess_holdout"]["x"] != info_other["ess_holdout"]["x"]


def test_update_control_scales_once_by_the_formula():
    """The step taken is √((1-target)/(1-cESS)) of the proposed one, with cESS
    recomputed here."""
    rate = 0.002
    backend = ebm.Jarzynski(
        skewed_model, optax.sgd(rate), num_walkers=64, ess_target=0.99
    )
    free = replace(backend, ess_target=None)
    state = backend.init(random.key(0), SKEWED_DATA)
    proposed = free.update(state, SKEWED_DATA)[0].params
    old = state.walkers["x"]
    new_potential = site_potential(
        backend, replace(state, params=proposed), old, SKEWED_DATA
    )
    split = old.num_training_chains
    increment = (old.ensemble.potential - new_potential)[:split]
    ess = float(conditional_ess_fraction(old.log_weight[:split], increment))
    assert 0.2 < ess < 0.98
    expected = np.sqrt(0.01 / (1 - ess))
    state_after, info = backend.update(state, SKEWED_DATA)
    assert float(info["update_scale"]) == pytest.approx(expected, rel=1e-4)
    for name, start in state.params.items():
        step, full = state_after.params[name] - start, proposed[name] - start
        assert float(step) == pytest.approx(expected * float(full), rel=1e-3)
    # Nothing is left to scale: the next step recovers by 1%.
    calm = replace(backend, optim=optax.sgd(0.0))
    _, info = calm.update(
        replace(state_after, optim_state=calm.optim.init(state.params)), SKEWED_DATA
    )
    assert float(info["update_scale"]) == pytest.approx(1.01 * expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Not at a maximum")
def test_step_size_adapts_towards_the_target_acceptance():
    backend = ebm.Jarzynski(
        skewed_model,
        optax.sgd(0.0),
        kernel=ebm.MALA(0.2, target_acceptance=0.7),
        num_walkers=64,
    )
    # At the base nothing is annealed, so the first step size is the one given.
    fit = backend.run(random.key(0), 600, SKEWED_DATA, (-50.0, 0.0), progress_bar=False)
    rates = fit.history["acceptance"]["x"]
    assert rates[0] > 0.95
    # Means over 300 steps of 768 walkers; the adaptation's own jitter is a few per
    # cent.
    assert rates[-300:].mean() == pytest.approx(0.7, abs=0.02)


def test_constrained_support_with_its_jacobian():
    """Exponential base, E = θx: an exponential again, so the fit's rate is 1/mean and Z
    = 1/(1+θ)."""
    data = np.random.default_rng(2).exponential(0.25, size=300)

    def model(x):
        theta = numpyro.param("theta", 0.0)
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(lambda v: theta * v, dist.Exponential(1.0)),
                obs=x,
            )

    backend = ebm.Jarzynski(
        model, optax.adam(optax.cosine_decay_schedule(0.1, 800)), num_walkers=250
    )
    fit = backend.run(random.key(0), 800, data, progress_bar=False)
    theta = float(fit.params["theta"])
    assert np.all(np.asarray(fit.state.walkers["x"].values) > 0)
    # 3,000 training walkers renew every few of the last hundred steps, while the rate
    # decays to 0.
    assert 1 + theta == pytest.approx(1 / data.mean(), rel=5 / np.sqrt(3_000))
    log_z, stderr = (float(v) for v in fit.state.walkers["x"].log_normalizer())
    assert abs(log_z + np.log1p(theta)) < T3_999 * stderr


def test_one_normaliser_per_batch_element():
    """Rows with their own energies: three precisions learned at once, each with its own
    log Z."""
    scales = np.array([0.5, 1.0, 2.0])
    data = np.random.default_rng(3).normal(size=(50, 3)) * scales

    def model(x):
        log_precision = numpyro.param("log_precision", jnp.zeros(3))
        base = dist.Normal(jnp.zeros(3), 3.0)
        energy = lambda v: 0.5 * jnp.exp(log_precision) * v**2  # noqa: E731
        with numpyro.plate("rows", x.shape[0], dim=-2):
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    optim = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    fit = ebm.Jarzynski(model, optim, num_walkers=250).run(
        random.key(0), 800, data, progress_bar=False
    )
    exact = 1 / (data**2).mean(0) - 1 / 9
    # √2 relative error of a variance from 3,000 walkers, five times, on the total
    # precision.
    total = np.exp(np.asarray(fit.params["log_precision"])) + 1 / 9
    np.testing.assert_allclose(total, exact + 1 / 9, rtol=5 * np.sqrt(2 / 3_000))
    assert fit.history["log_normalizer"]["x"].shape == (800, 3)
    assert fit.history["ess"]["x"].shape == (800, 3)
    log_z, stderr = fit.state.walkers["x"].log_normalizer()
    truth = -0.5 * np.log1p(9 * np.exp(np.asarray(fit.params["log_precision"])))
    assert np.all(np.abs(log_z - truth) < T3_999 * stderr)


def test_walkers_are_annealed_to_initial_parameters_away_from_the_base():
    backend = ebm.Jarzynski(skewed_model, optax.sgd(0.0), num_walkers=250)
    state = backend.init(random.key(0), SKEWED_DATA, (1.0, 2.0))
    _, exact = skewed_density({"quartic": 1.0, "slope": 2.0})
    log_z, stderr = (float(v) for v in state.walkers["x"].log_normalizer())
    assert stderr < 0.05
    assert abs(log_z - exact) < T3_999 * stderr


def test_refresh_replaces_the_held_out_islands_alone():
    backend = ebm.Jarzynski(skewed_model, optax.adam(0.02), num_walkers=100)
    fit = backend.run(random.key(0), 100, SKEWED_DATA, progress_bar=False)
    fresh = backend.refresh(random.key(1), fit.state, SKEWED_DATA, num_temperatures=100)
    old, new = fit.state.walkers["x"], fresh.walkers["x"]
    np.testing.assert_array_equal(new.values[:12], old.values[:12])
    assert not np.any(np.asarray(new.values[12:]) == np.asarray(old.values[12:]))
    _, exact = skewed_density(fit.params)
    log_z, stderr = (float(v) for v in new.log_normalizer())
    assert abs(log_z - exact) < T3_999 * stderr
    # The refreshed state trains on.
    assert np.isfinite(backend.update(fresh, SKEWED_DATA)[1]["loss"])


def test_refresh_says_where_log_z_had_drifted():
    """Held-out islands that overstate Z by a factor of e^5."""
    backend = ebm.Jarzynski(skewed_model, optax.adam(0.02), num_walkers=100)
    state = backend.init(random.key(0), SKEWED_DATA, (1.0, 2.0))
    site = state.walkers["x"]
    ensemble = site.ensemble._replace(past=site.ensemble.past + 5.0)
    astray = replace(state, walkers={"x": replace(site, ensemble=ensemble)})
    with pytest.warns(
        UserWarning, match=r"site 'x' had drifted by \+[45].* standard errors"
    ):
        backend.refresh(
            random.key(1), astray, SKEWED_DATA, (1.0, 2.0), num_temperatures=100
        )


def test_two_energy_sites_share_a_parameter():
    """x ~ N(0, 1/λ), y ~ N(0, 1/(2λ)): one λ from both, each site with its own log
    Z."""
    y = np.random.default_rng(4).normal(size=60) * 0.4

    def model(x, y):
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
        flat, start = dist.ImproperUniform(constraints.real, (), ()), dist.Normal(0, 1)
        with numpyro.plate("xs", x.shape[0]):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(lambda v: 0.5 * lam * v**2, flat, start=start),
                obs=x,
            )
        with numpyro.plate("ys", y.shape[0]):
            numpyro.sample(
                "y",
                ebm.EnergyDistribution(lambda v: lam * v**2, flat, start=start),
                obs=y,
            )

    optim = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    fit = ebm.Jarzynski(model, optim, num_walkers=250).run(
        random.key(0), 800, X, y, progress_bar=False
    )
    exact = 100 / ((X**2).sum() + 2 * (y**2).sum())
    assert float(fit.params["lam"]) == pytest.approx(exact, rel=5 * np.sqrt(2 / 3_000))
    assert set(fit.history["log_normalizer"]) == {"x", "y"}
    for name, factor in (("x", 1), ("y", 2)):
        log_z, stderr = (float(v) for v in fit.state.walkers[name].log_normalizer())
        assert (
            abs(log_z - 0.5 * np.log(2 * np.pi / (factor * float(fit.params["lam"]))))
            < T3_999 * stderr
        )


# What a run says of itself


def test_a_site_named_loss_keeps_its_own_check():
    """Sites and parts of the algorithm are told apart, whatever sites are called."""

    def model(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda v: -a * v, dist.Normal(0.0, 1.0))
            numpyro.sample("loss", energy, obs=x)

    backend = ebm.Jarzynski(model, optax.sgd(1e-2), num_walkers=8)
    state = backend.init(random.key(0), SKEWED_DATA)
    _, info = backend.update(state, SKEWED_DATA)
    assert set(info["finite"].sites) == {"loss"}
    assert set(info["finite"].parts) == {"loss", "gradient"}

    walkers = state.walkers["loss"]
    potential = walkers.ensemble.potential.at[0, 0].set(jnp.nan)
    ensemble = walkers.ensemble._replace(potential=potential)
    broken = replace(state, walkers={"loss": replace(walkers, ensemble=ensemble)})
    with pytest.raises(ebm.NonFiniteError, match="walkers of energy site 'loss'"):
        backend.run(random.key(0), 1, SKEWED_DATA, init_state=broken)


def history_of(gap, num_steps=400, stderr=0.03):
    """Training islands drift off by ``gap`` from held-out ones at −2."""
    noise = stderr * np.random.default_rng(0).normal(size=num_steps)
    held_out = -2.0 + noise
    return {
        "loss": np.zeros(num_steps),
        "log_normalizer": {"x": held_out},
        "log_normalizer_stderr": {"x": np.full(num_steps, stderr)},
        "log_normalizer_training": {"x": held_out + np.linspace(0, gap, num_steps)},
    }


@pytest.mark.parametrize("gap", [-3.0, -0.4, 0.5])
def test_training_walkers_that_contradict_held_out_ones_are_named(gap):
    fit = ebm.Fit({}, None, history_of(gap))
    (finding,) = training_left_held_out(fit, is_renewed=True)
    assert re.search(r"site 'x' put log Z at .* biased this fit", finding.text)


@pytest.mark.parametrize(
    "history",
    [
        history_of(-0.05),
        history_of(-3.0, num_steps=50),
        history_of(-0.4, stderr=0.2),
        {},
    ],
)
def test_no_alarm_within_errors(history):
    fit = ebm.Fit({}, None, history)
    assert not list(training_left_held_out(fit, is_renewed=True))
