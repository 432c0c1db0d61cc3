"""Whether a run says that its loss still moved when it ended."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy.stats import binom

import ebm_ppl as ebm
from ebm_ppl.normalizer.convergence import FALSE_ALARM, change_of, still_moving
from ebm_ppl.programs.arguments import Arguments

ROWS = (0.5 * np.random.default_rng(0).normal(size=400)).astype(np.float32)


def history(losses, **others):
    return {"loss": np.asarray(losses), **others}


def findings(losses):
    return list(still_moving(ebm.Fit({}, None, history(losses)), None, None))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_noise_is_no_trend(correlation):
    """As many false alarms of 400 as the level gives, also where noise lasts for ten
    updates, a fifth of a block."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 2_500))
    for step in range(1, noise.shape[1]):
        noise[:, step] += correlation * noise[:, step - 1]
    alarms = sum(bool(findings(10.0 * values)) for values in noise)
    # Blocks of 50 updates that remember 10 are a little alike.
    level = FALSE_ALARM if correlation == 0 else 4 * FALSE_ALARM
    assert alarms <= binom.ppf(0.999, 400, level)


@pytest.mark.parametrize("slope", [-0.05, 0.08])
def test_a_trend_in_noise_is_told(slope):
    """5 or 8 nats in the last hundred updates, of noise ±1: the error of a line's fall is
    √(12 / 200) / 2 nats."""
    rng = np.random.default_rng(1)
    losses = slope * np.arange(1_000) + rng.normal(size=1_000)
    change, error = change_of(losses)
    assert change == pytest.approx(100 * slope, abs=4 * error)
    assert 0.4 < error / (np.sqrt(12 / 200) / 2) < 2.0
    (finding,) = findings(losses)
    assert ("fell" if slope < 0 else "rose") in finding.text
    assert not finding.is_warned_of


def test_a_change_of_less_than_a_nat_is_none():
    assert findings(-0.005 * np.arange(1_000)) == []
    assert len(findings(-0.05 * np.arange(1_000))) == 1


def test_short_runs_are_not_judged():
    assert findings(-10.0 * np.arange(150)) == []


def model(x):
    lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1.0) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


BACKENDS = {
    "jarzynski": ebm.Jarzynski,
    "monte carlo": ebm.MonteCarloMLE,
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.filterwarnings("ignore:Not at a maximum")
def test_a_run_says_whether_it_settled(backend):
    """λ from 1 to 4: a rate that is far too small, and one that falls to zero there."""
    slow = backend(model, optax.adam(2e-3)).run(
        random.key(0), 300, ROWS, progress_bar=False
    )
    assert any("The loss still fell" in text for text in slow.findings)
    settled = backend(model, optax.adam(optax.cosine_decay_schedule(5e-2, 600))).run(
        random.key(0), 600, ROWS, progress_bar=False
    )
    assert not any("The loss" in text for text in settled.findings)


def test_an_error_of_log_z_that_lasts_is_no_trend():
    """400 rows times an error of a tenth of a nat is over any fall of 20."""
    fit = ebm.MonteCarloMLE(model, optax.adam(0.0)).run(
        random.key(0), 1, ROWS, progress_bar=False
    )
    losses = -0.2 * np.arange(1_000)
    moved = ebm.Fit(fit.params, fit.state, history(losses))
    arguments = Arguments((ROWS,), {})
    assert list(still_moving(moved, model, arguments, {"x": np.full(1_000, 1e-3)}))
    assert not list(still_moving(moved, model, arguments, {"x": np.full(1_000, 0.1)}))
