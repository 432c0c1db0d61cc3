"""log Z with limits on either side: against closed forms, and every reason not to
believe it raised on purpose."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import constraints
from scipy.stats import binom, norm
from scipy.stats import t as student_t

import ebm_ppl as ebm
from ebm_ppl.energy.log_normalizer import rounded
from ebm_ppl.normalizer.certify import certify
from ebm_ppl.normalizer.findings import Findings
from ebm_ppl.smc.ensemble import Moves
from ebm_ppl.smc.passes import Pass
from ebm_ppl.smc.weights import jackknife_log_mean_exp, pareto_khat
from ebm_ppl.walkers import follow

pytestmark = pytest.mark.xdist_group("normalizer")

T15_9999 = 5.24  # Student t, 15 degrees of freedom, two-sided 99.99%
GRID = np.linspace(-10.0, 10.0, 20_001)


# Energies over N(0, 1) with arrays inside: one function each, so that all of a kind
# share executables.


def quartic_energy(coefficients, v):
    """Coefficients from v⁴ down."""
    return jnp.polyval(coefficients, v)


def bent_energy(tilt, v):
    """Steep to the right, sloping to the left: skewed, and its weights have every
    moment in both directions."""
    return 3.0 * jnp.logaddexp(0.0, 2.0 * v) - tilt * v


def over_standard_normal(energy, parameters):
    parameters = jnp.asarray(parameters, jnp.float32)
    batch_shape = parameters.shape[1:] if energy is quartic_energy else parameters.shape
    return ebm.EnergyDistribution(
        Partial(energy, parameters), dist.Normal(jnp.zeros(batch_shape), 1.0)
    )


def quartic(coefficients):
    return over_standard_normal(quartic_energy, coefficients)


def density_on_grid(distribution):
    """Unnormalised, ``(len(GRID), *batch)``."""
    batch_shape = distribution.batch_shape
    grid = np.broadcast_to(
        GRID.reshape(-1, *(1,) * len(batch_shape)), (len(GRID), *batch_shape)
    )
    return np.exp(-np.asarray(distribution.energy(grid), float)) * norm.pdf(grid)


def exact_log_z(distribution):
    return np.log(np.trapezoid(density_on_grid(distribution), GRID, axis=0))


def exact_draws(distribution, shape, seed=0):
    """Draws by the inverse distribution function, ``(*shape, *batch)``."""
    cumulative = np.cumsum(density_on_grid(distribution), axis=0).reshape(len(GRID), -1)
    uniform = np.random.default_rng(seed).uniform(size=(*shape, cumulative.shape[1]))
    columns = [
        np.interp(uniform[..., k], cumulative[:, k] / cumulative[-1, k], GRID)
        for k in range(uniform.shape[-1])
    ]
    return np.stack(columns, axis=-1).reshape(*shape, *distribution.batch_shape)


GAUSSIAN = np.array([0.0, 0.0, 1.5, -1.5, 0.0])
GAUSSIAN_LOG_Z = 0.5 * 1.5**2 / 4.0 - 0.5 * np.log(4.0)
SKEWED = np.array([0.25, 0.5, 0.0, -2.0, 0.0])
SKEWED_LOG_Z = exact_log_z(quartic(SKEWED))
NUM_WALKERS = 16 * 32
OPTIONS = {"num_walkers": 32, "num_temperatures": 64, "progress_bar": False}


def estimate(distribution, seed=0, **options):
    return ebm.log_normalizer(random.key(seed), distribution, **(OPTIONS | options))


@pytest.fixture(scope="module")
def skewed():
    return {
        method: estimate(quartic(SKEWED), method=method)
        for method in ("bracket", "forward", "reverse")
    }


# Pareto k̂ and the weighted jackknife


def arviz_khat(log_weights):
    if importlib.metadata.version("arviz") < "1":
        import arviz

        return arviz.psislw(log_weights)[1]
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights, axis=-1)[1]


# Where 3√n is a whole number: the lines of ArviZ round it in opposite directions.
@pytest.mark.parametrize("num", [100, 1024, 10_000])
def test_khat_is_that_of_arviz(num):
    """Bounded, log-normal and Pareto weights, far from zero."""
    rng = np.random.default_rng(num)
    log_weights = np.stack(
        [
            np.log(rng.uniform(size=num)),
            50.0 + rng.normal(size=num),
            -1000.0 - 1.3 * np.log(rng.uniform(size=num)),
        ]
    )
    khat = pareto_khat(jnp.asarray(log_weights.T, jnp.float32))
    tolerance = 0.03 if importlib.metadata.version("arviz") < "1" else 1e-3
    np.testing.assert_allclose(
        khat, [arviz_khat(row) for row in log_weights], atol=tolerance
    )


def test_khat_finds_the_shape_of_a_pareto_tail():
    """1/u^k has shape k; its estimate from m tail weights has standard deviation (1 +
    k)/√m (Zhang and Stephens)."""
    uniform = np.random.default_rng(0).uniform(size=(40_000, 3))
    shapes = np.array([0.3, 0.7, 1.5])
    khat = np.asarray(pareto_khat(jnp.asarray(-shapes * np.log(uniform), jnp.float32)))
    assert khat.shape == (3,)
    assert np.all(
        np.abs(khat - shapes) < 5 * (1 + shapes) / np.sqrt(3 * np.sqrt(40_000))
    )


def test_khat_of_equal_weights():
    assert pareto_khat(jnp.full(200, -3.0)) == -np.inf
    assert pareto_khat(jnp.linspace(0.0, 1e-6, 200)) == -np.inf


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0])
def test_khat_of_energies_that_count(rate):
    """Weights exp(−rate · count) are ties, a quarter of the tail and more at its end:
    bounded, they have no heavy tail."""
    counts = np.random.default_rng(0).poisson(4.0, size=(4096, 5))
    khat = np.asarray(pareto_khat(jnp.asarray(-rate * counts, jnp.float32)))
    assert np.all(khat < 0.7)
    # Where the largest tie fills the tail there is nothing above it.
    counts = np.random.default_rng(0).poisson(1.0, size=4096)
    assert pareto_khat(jnp.asarray(-rate * counts, jnp.float32)) == -np.inf


def test_khat_of_a_few_weights_above_ties():
    """One draw in a well stands for all that did not go there; three that are e times
    the others do not matter."""
    ties = np.zeros(4096, np.float32)
    ties[7] = 8.0
    assert pareto_khat(jnp.asarray(ties)) == np.inf
    ties[7], ties[11], ties[13] = 1.0, 1.0, 1.0
    assert pareto_khat(jnp.asarray(ties)) < 0.7


def test_khat_of_too_few_weights():
    few = pareto_khat(random.normal(random.key(0), (24, 2, 3)))
    assert few.shape == (2, 3)
    assert np.isnan(few).all()
    assert np.isfinite(pareto_khat(random.normal(random.key(0), (25,))))


def test_weighted_jackknife_against_the_loop():
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(6, 2)) - 300.0, rng.normal(size=(6, 2)) + 200.0

    def log_mean(keep):
        weight = np.exp(weights[keep] - 200.0)
        return (
            np.log((weight * np.exp(values[keep] + 300.0)).sum(0) / weight.sum(0))
            - 300.0
        )

    everyone = np.arange(6)
    left_out = np.stack([log_mean(np.delete(everyone, c)) for c in everyone])
    found, stderr = jackknife_log_mean_exp(jnp.asarray(values), jnp.asarray(weights))
    np.testing.assert_allclose(
        found, 6 * log_mean(everyone) - 5 * left_out.mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(
        stderr, np.sqrt(5 / 6 * ((left_out - left_out.mean(0)) ** 2).sum(0)), rtol=1e-3
    )


def test_equal_weights_are_no_weights():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)), jnp.float32)
    for with_weights, without in zip(
        jackknife_log_mean_exp(values, jnp.full((6, 2), -7.0)),
        jackknife_log_mean_exp(values),
        strict=True,
    ):
        np.testing.assert_allclose(with_weights, without, rtol=1e-5)


# log Z within its own uncertainty


def test_bracket_of_a_shifted_gaussian():
    log_z = estimate(quartic(GAUSSIAN))
    assert abs(log_z.estimate["x"] - GAUSSIAN_LOG_Z) < T15_9999 * log_z.stderr["x"]
    assert 0 < log_z.stderr["x"] < 0.05
    assert log_z.lower["x"] < GAUSSIAN_LOG_Z < log_z.upper["x"] < log_z.lower["x"] + 0.3
    assert log_z.is_certified


# What one direction alone lacks is all that speaks against it.
ONE_DIRECTION = {
    "bracket": (),
    "forward": (
        "a forward pass has no upper limit, so log Z may be larger, or infinite: use "
        "method='bracket'.",
    ),
    "reverse": (
        "a reverse pass has no lower limit, so log Z may be smaller: use "
        "method='bracket'.",
    ),
}


@pytest.mark.parametrize("method", ["bracket", "forward", "reverse"])
def test_a_skewed_energy(skewed, method):
    log_z, exact = skewed[method], SKEWED_LOG_Z
    assert abs(log_z.estimate["x"] - exact) < T15_9999 * log_z.stderr["x"]
    assert 0 < log_z.stderr["x"] < 0.05
    assert log_z.lower["x"] < exact < log_z.upper["x"]
    assert log_z.log_normalizers["x"].shape == (16,)
    assert 0.5 < log_z.ess["x"] <= 1
    assert log_z.khat["x"] < 0.7
    assert log_z.method == method
    assert log_z.flags["x"] == ONE_DIRECTION[method]


def test_one_direction_has_one_limit(skewed):
    assert skewed["forward"].upper["x"] == np.inf
    assert skewed["reverse"].lower["x"] == -np.inf


def test_a_bracket_is_both_directions(skewed):
    """The same key gives the same passes: limits and estimate are those of either
    direction alone."""
    bracket, forward, reverse = (
        skewed[method] for method in ("bracket", "forward", "reverse")
    )
    assert bracket.estimate["x"] == forward.estimate["x"]
    assert bracket.lower["x"] == forward.lower["x"]
    assert bracket.upper["x"] == reverse.upper["x"]
    assert bracket.ess["x"] == min(forward.ess["x"], reverse.ess["x"])
    assert bracket.khat["x"] == max(forward.khat["x"], reverse.khat["x"])


def test_limits_are_one_sided_at_97_5_percent(skewed):
    quantile = student_t.ppf(0.975, 15)
    forward, reverse = skewed["forward"], skewed["reverse"]
    below = float(forward.estimate["x"] - forward.lower["x"])
    above = float(reverse.upper["x"] - reverse.estimate["x"])
    assert below == pytest.approx(quantile * float(forward.stderr["x"]), rel=1e-3)
    assert above == pytest.approx(quantile * float(reverse.stderr["x"]), rel=1e-3)


def test_interval_and_markov_lower(skewed):
    log_z = skewed["forward"]
    centre, stderr = float(log_z.estimate["x"]), float(log_z.stderr["x"])
    for level in (0.5, 0.9):
        half = student_t.ppf(0.5 + level / 2, 15) * stderr
        assert np.asarray(log_z.interval(level)["x"]) == pytest.approx(
            [centre - half, centre + half], abs=1e-6
        )
    plain = np.log(np.exp(np.asarray(log_z.log_normalizers["x"], float)).mean())
    assert float(log_z.markov_lower["x"]) == pytest.approx(
        plain - np.log(20.0), abs=1e-6
    )


def test_reverse_from_exact_draws():
    draws = exact_draws(quartic(SKEWED), (16, 32))
    log_z = estimate(quartic(SKEWED), method="reverse", samples={"x": draws})
    assert abs(log_z.estimate["x"] - SKEWED_LOG_Z) < T15_9999 * log_z.stderr["x"]
    assert log_z.flags["x"] == ONE_DIRECTION["reverse"]
    assert (
        log_z.estimate["x"] != estimate(quartic(SKEWED), method="reverse").estimate["x"]
    )


def test_an_unadjusted_kernel_is_as_unbiased():
    """ULA leaves a bias in the walkers that its weights undo, in the forward direction
    at least."""
    log_z = estimate(quartic(SKEWED), kernel=ebm.ULA(0.05), method="forward")
    assert abs(log_z.estimate["x"] - SKEWED_LOG_Z) < T15_9999 * log_z.stderr["x"]


def test_a_constrained_support_in_three_dimensions():
    """E = 2 Σ xᵢ over half-normals: Z = (2 e² Φ(−2))³; draws in the support may start
    the reverse pass too."""
    base = dist.HalfNormal(1.0).expand([3]).to_event(1)
    distribution = ebm.EnergyDistribution(lambda v: 2.0 * v.sum(-1), base)
    exact = 3 * (np.log(2) + 2.0 + norm.logcdf(-2.0))
    draws = (
        -norm.ppf(np.random.default_rng(0).uniform(size=(16, 32, 3)) * norm.cdf(-2.0))
        - 2.0
    )
    for samples in (None, {"x": draws}):
        log_z = estimate(distribution, samples=samples)
        assert abs(log_z.estimate["x"] - exact) < T15_9999 * log_z.stderr["x"]
        assert log_z.lower["x"] < exact < log_z.upper["x"]
        assert log_z.is_certified


# Many energies at once: every batch element has walkers, weights and a log Z of its own


NUM_ENERGIES = 32
TILTED = over_standard_normal(bent_energy, np.linspace(-1.0, 4.0, NUM_ENERGIES))
SMALL = {"num_walkers": 8, "num_temperatures": 16}


@pytest.fixture(scope="module")
def tilted():
    draws = exact_draws(TILTED, (16, 8))
    return exact_log_z(TILTED), {
        "bracket": estimate(TILTED, **SMALL),
        "reverse": estimate(TILTED, method="reverse", **SMALL),
        "given": estimate(TILTED, method="reverse", samples={"x": draws}, **SMALL),
    }


def test_batch_shapes(tilted):
    log_z = tilted[1]["bracket"]
    assert log_z.log_normalizers["x"].shape == (16, NUM_ENERGIES)
    for field in (
        "estimate",
        "stderr",
        "lower",
        "upper",
        "ess",
        "khat",
        "markov_lower",
    ):
        assert getattr(log_z, field)["x"].shape == (NUM_ENERGIES,)
    assert str(log_z).startswith(
        f"x: {NUM_ENERGIES} values of log Z from {rounded(log_z.estimate['x'].min())} to "
        f"{rounded(log_z.estimate['x'].max())}, standard error at most 0."
    )


def test_coverage(tilted):
    """Of 32 intervals at 90% and one-sided limits at 97.5%: no fewer than a binomial
    gives at 10⁻⁴."""
    exact, found = tilted
    bracket = found["bracket"]
    low, high = (np.asarray(end) for end in bracket.interval(0.9)["x"])
    fewest, most = binom.ppf([1e-4, 1 - 1e-4], NUM_ENERGIES, 0.9)
    assert fewest <= np.sum((low <= exact) & (exact <= high)) <= most
    fewest = binom.ppf(1e-4, NUM_ENERGIES, 0.975)
    assert np.sum(bracket.lower["x"] <= exact) >= fewest
    assert np.sum(bracket.upper["x"] >= exact) >= fewest
    assert np.sum(found["given"].upper["x"] >= exact) >= fewest
    # And they are tight: a limit lies a quantile of 2.13 standard errors from an
    # estimate near the truth.
    for method, side in (
        ("bracket", "lower"),
        ("reverse", "upper"),
        ("given", "upper"),
    ):
        log_z = found[method]
        assert np.median(
            np.abs(getattr(log_z, side)["x"] - exact)
        ) < 1.5 * 2.13 * np.median(log_z.stderr["x"])


def mean_is_one(log_ratios):
    """The islands' mean ratio is 1 within 5 standard errors; elements are independent,
    given the protocol."""
    ratio = np.exp(np.asarray(log_ratios, float)).ravel()
    assert ratio.std() > 0.02
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(ratio.size)


def test_every_forward_island_is_unbiased_for_z(tilted):
    exact, found = tilted
    mean_is_one(found["bracket"].log_normalizers["x"] - exact)


def test_every_reverse_island_from_exact_draws_is_unbiased_for_one_over_z(tilted):
    exact, found = tilted
    mean_is_one(exact - found["given"].log_normalizers["x"])


def test_every_reverse_island_from_forward_endpoints_is_unbiased_when_weighed(tilted):
    """E[Ẑ_c R_c] = 1 with R_c from the endpoints of the very forward pass that gave
    Ẑ_c."""
    _, found = tilted
    mean_is_one(
        found["bracket"].log_normalizers["x"] - found["reverse"].log_normalizers["x"]
    )


# Cost


@pytest.mark.parametrize("method", ["bracket", "forward", "reverse"])
def test_budget_is_what_is_spent(skewed, method):
    """Walkers of all passes and what settles them; the pilot, the same for all methods,
    comes on top."""
    pilot = skewed["forward"].num_evaluations - 64 * NUM_WALKERS
    budget = {
        "forward": 64 * NUM_WALKERS,
        "bracket": 192 * NUM_WALKERS + 17,
        "reverse": 192 * NUM_WALKERS + 17,
    }[method]
    log_z = estimate(
        quartic(SKEWED), method=method, budget=budget, num_temperatures=None
    )
    assert budget - 4 * NUM_WALKERS < log_z.num_evaluations - pilot <= budget
    assert abs(log_z.estimate["x"] - SKEWED_LOG_Z) < T15_9999 * log_z.stderr["x"]
    if method == "forward":
        assert log_z.estimate["x"] == skewed["forward"].estimate["x"]


def test_the_pilot_is_counted(skewed):
    """256 walkers, moved at least once at every temperature that they choose."""
    assert skewed["forward"].num_evaluations - 64 * NUM_WALKERS >= 2 * 256


def test_num_evaluations_counts_walkers_and_temperatures(skewed):
    """Half the temperatures cost half the moves of each pass; pilot and settling are
    the same."""
    for method, passes in (("bracket", 2), ("forward", 1)):
        short = estimate(quartic(SKEWED), method=method, num_temperatures=32)
        assert (
            skewed[method].num_evaluations - short.num_evaluations
            == passes * 32 * NUM_WALKERS
        )
        assert short.num_evaluations >= passes * 32 * NUM_WALKERS
        assert short.stderr["x"] < 0.1


def test_kernel_steps_share_the_budget():
    """Two moves at a temperature leave half as many temperatures."""
    options = {"num_kernel_steps": 2, "method": "forward"}
    bought = estimate(
        quartic(SKEWED), budget=64 * NUM_WALKERS, num_temperatures=None, **options
    )
    counted = estimate(quartic(SKEWED), num_temperatures=32, **options)
    assert bought.estimate["x"] == counted.estimate["x"]
    assert bought.num_evaluations == counted.num_evaluations >= 64 * NUM_WALKERS
    assert abs(bought.estimate["x"] - SKEWED_LOG_Z) < T15_9999 * bought.stderr["x"]


def test_pieces_do_not_matter(skewed, monkeypatch):
    """A pass runs in pieces that take a certain time, so of any length, to the same
    end: here of one temperature."""
    lengths = []
    compiled = follow.advance_piece

    def counted(*arguments):
        lengths.append(arguments[-1] - arguments[-2])
        return compiled(*arguments)

    monkeypatch.setattr(follow, "advance_piece", counted)
    monkeypatch.setattr(follow, "SECONDS_PER_PIECE", 1e-9)
    log_z = estimate(quartic(SKEWED), method="forward")
    assert sum(lengths) == 64
    assert lengths.count(1) >= 47
    np.testing.assert_array_equal(
        log_z.log_normalizers["x"], skewed["forward"].log_normalizers["x"]
    )
    assert log_z.ess["x"] == skewed["forward"].ess["x"]


# Doubts


def flagged(log_z, reason, site="x"):
    """``reason`` is among the flags, in the text, and in the error of a certificate
    that is insisted on."""
    assert any(reason in flag for flag in log_z.flags[site]), log_z.flags
    assert not log_z.is_certified
    assert "NOT certified" in str(log_z)
    assert reason in str(log_z)
    with pytest.raises(
        ebm.UncertifiedNormalizerError, match=f"site '{site}': .*allow_uncertified"
    ) as caught:
        log_z.require_certified()
    assert reason in str(caught.value)


def test_text_and_certificate(skewed):
    log_z = skewed["bracket"]
    log_z.require_certified()
    text = str(log_z)
    assert text.startswith(
        f"x: log Z = {float(log_z.estimate['x']):.4f} ± {float(log_z.stderr['x']):.4f}"
    )
    assert f"[{float(log_z.lower['x']):.4f}, {float(log_z.upper['x']):.4f}]" in text
    assert text.endswith("(bracket): certified")
    assert "\n" not in text


@pytest.mark.parametrize("method", ["bracket", "forward", "reverse"])
def test_a_wide_bracket_or_interval(skewed, method):
    """Just under its width a certificate is refused, at its width it is given."""
    log_z = skewed[method]
    if method == "bracket":
        width = float(log_z.upper["x"] - log_z.lower["x"])
    else:
        width = 2 * student_t.ppf(0.975, 15) * float(log_z.stderr["x"])
    flagged(
        estimate(quartic(SKEWED), method=method, tolerance=0.99 * width),
        f"the {'bracket' if method == 'bracket' else '95% interval'} is {width:.2g} "
        "nats wide",
    )
    enough = estimate(quartic(SKEWED), method=method, tolerance=1.01 * width)
    assert enough.flags["x"] == ONE_DIRECTION[method]


def test_moves_that_are_refused():
    log_z = estimate(quartic(SKEWED), kernel=ebm.MALA(50.0, target_acceptance=None))
    flagged(log_z, "of the moves were accepted")
    assert len(log_z.flags["x"]) == 1


def test_weights_that_a_few_walkers_carry():
    """Two temperatures to a mode three base scales away and twenty times narrower."""
    log_z = estimate(quartic([0.0, 0.0, 200.0, -1200.0, 1800.0]), num_temperatures=2)
    flagged(log_z, "Pareto k̂ = ")
    flagged(log_z, "effective sample size")
    flagged(log_z, "nats wide")


def test_walkers_that_have_not_arrived():
    """To N(3, 1) by steps of a thousandth, 64 of them: most of the way is left."""
    log_z = estimate(
        quartic([0.0, 0.0, 0.0, -3.0, 0.0]),
        kernel=ebm.MALA(1e-3, target_acceptance=None),
    )
    flagged(log_z, "walkers still drift at the energy itself")


def test_copies_that_never_part():
    """Plain importance sampling is fine where the base is near; of a target twice as
    wide in ten dimensions, not."""
    frozen = {"kernel": ebm.MALA(1e-8, target_acceptance=None), "num_temperatures": 8}
    wide = ebm.EnergyDistribution(
        lambda v: -0.375 * (v**2).sum(-1), dist.Normal(0, 1).expand([10]).to_event(1)
    )
    for seed in range(3):
        log_z = ebm.log_normalizer(random.key(seed), wide, progress_bar=False, **frozen)
        flagged(log_z, "resampled walkers hardly moved")
    near = quartic([0.0, 0.0, 0.1, 0.1, 0.0])
    log_z = ebm.log_normalizer(random.key(0), near, progress_bar=False, **frozen)
    assert log_z.is_certified, log_z


NOT_THE_MODELS = "the draws that the reverse pass started from are not the model's"


def double_well(side):
    """Modes at ±2, the right one with a fifth of the mass, no way between them; the way
    back begins on one side.

    High up the modes are equally likely, so that 1/Ẑ is too large by ½ over the mass of
    the side.
    """
    distribution = quartic([3.0, 0.0, -24.0, 0.35, 48.0])
    draws = exact_draws(distribution, (16 * 32 * 8,))
    draws = draws[np.sign(draws) == side][:NUM_WALKERS].reshape(16, 32)
    return exact_log_z(distribution), estimate(distribution, samples={"x": draws})


def test_draws_that_are_not_the_models():
    """All in the rarer mode: log 2.5 is missing, the limits contradict each other, and
    both are widened."""
    exact, log_z = double_well(side=1)
    flagged(log_z, NOT_THE_MODELS)
    assert abs(log_z.estimate["x"] - exact) < T15_9999 * log_z.stderr["x"]
    assert log_z.lower["x"] < exact - np.log(2.0)
    assert log_z.lower["x"] < exact < log_z.upper["x"]


def test_draws_of_the_common_mode_widen_the_bracket():
    """1/Ẑ is too small by 0.8/0.5: the limit is too far away, and holds."""
    exact, log_z = double_well(side=-1)
    assert log_z.is_certified
    assert log_z.lower["x"] < exact < log_z.upper["x"]
    assert log_z.upper["x"] - exact > 0.3


def test_an_estimate_that_is_not_finite():
    """Draws where the energy overflows: 1/Ẑ is infinite."""
    log_z = estimate(quartic(SKEWED), samples={"x": np.full((16, 32), 1e10)})
    assert not log_z.is_certified
    log_z = estimate(
        quartic(SKEWED), method="reverse", samples={"x": np.full((16, 32), 1e10)}
    )
    flagged(log_z, "log Z is not finite")


def passes(log_ratios):
    """A pass of good weights whose islands said ``log_ratios``, ``(num_chains,
    *batch)``."""
    log_weights = jnp.asarray(log_ratios)[:, None] + 0.1 * random.normal(
        random.key(9), (16, 4, *log_ratios.shape[1:])
    )
    shape = log_ratios.shape[1:]
    moves = Moves(acceptance=jnp.full(shape, 0.6), turnover=jnp.full(shape, 30.0))
    return Pass(
        jnp.asarray(log_ratios), log_weights, moves, resampled=jnp.ones(shape, bool)
    )


def test_doubts_about_some_batch_elements():
    """Of five elements two say less on the way back than on the way there."""
    there = 0.01 * np.random.default_rng(0).normal(size=(16, 5))
    back = 0.01 * np.random.default_rng(1).normal(size=(16, 5)) + np.array(
        [0.0, 0.2, 0.0, 0.3, 0.0]
    )
    flags = certify(
        Findings(forward=passes(there), reverse=passes(back)), tolerance=1.0
    ).flags
    assert len(flags) == 1
    assert NOT_THE_MODELS in flags[0]
    assert "in 2 of 5 elements" in flags[0]


def test_an_upper_limit_under_the_estimate_stands_back():
    """Passes that differ by less than their errors allow: limits that do not cross, on
    one side of the estimate."""
    there = 0.3 * np.random.default_rng(0).normal(size=(16,))
    back = (
        0.001 * np.random.default_rng(1).normal(size=(16,))
        - np.log(np.exp(there).mean())
        + 0.06
    )
    certificate = certify(
        Findings(forward=passes(there), reverse=passes(back)), tolerance=1.0
    )
    assert not certificate.flags
    assert certificate.lower < -back.mean() < certificate.estimate < certificate.upper
    np.testing.assert_allclose(
        certificate.upper - certificate.estimate,
        certificate.estimate - certificate.lower,
        1e-5,
    )


def test_drift_by_chance():
    """Walkers at equilibrium drift as chance has it: four hundred elements of them are
    hardly ever flagged."""
    there = passes(0.01 * np.random.default_rng(0).normal(size=(16, 400)))
    drifts = np.random.default_rng(1).normal(size=(8, 16, 2, 400)).astype(np.float32)
    flags = [
        certify(
            Findings(forward=there, reverse=there, drift=jnp.asarray(drift)),
            tolerance=1.0,
        ).flags
        for drift in drifts
    ]
    assert sum("drift" in " ".join(each) for each in flags) <= 1, flags


# Models


def far_mode(weight, v):
    """Over N(0, 1) the density of a mixture that keeps ``weight`` of its mass at 12,
    where no walker comes."""
    ratio = norm_log_density((v - 12.0) / 0.5) - np.log(0.5) - norm_log_density(v)
    return -jnp.logaddexp(jnp.log1p(-weight), jnp.log(weight) + ratio)


def norm_log_density(v):
    return -0.5 * v**2 - 0.5 * np.log(2 * np.pi)


def two_sites(near, far, seen=None):
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    weight = numpyro.param("weight", 0.1)
    base = dist.Normal(0.0, 1.0)
    with numpyro.plate("rows", 40):
        numpyro.sample(
            "near",
            ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2 + v, base),
            obs=near,
        )
        with handlers.mask(mask=True if seen is None else seen):
            numpyro.sample(
                "far",
                ebm.EnergyDistribution(lambda v: far_mode(weight, v), base),
                obs=far,
            )


PARAMS = {"rate": jnp.array(3.0), "weight": jnp.array(0.3)}
NEAR = np.random.default_rng(0).normal(size=40).astype(np.float32) * 0.5
FAR = np.where(np.arange(40) < 12, 12.0, 0.1 * np.arange(40) - 3.0).astype(np.float32)


@pytest.fixture(scope="module")
def on_data():
    options = {"num_temperatures": 32, "method": "forward", "progress_bar": False}
    return ebm.log_normalizer(
        random.key(0), two_sites, PARAMS, NEAR, FAR, np.ones(40, bool), **options
    )


def test_every_energy_site_has_its_log_z(on_data):
    assert set(on_data.estimate) == set(on_data.flags) == {"near", "far"}
    assert (
        abs(on_data.estimate["near"] - (1 / 8 - 0.5 * np.log(4.0)))
        < T15_9999 * on_data.stderr["near"]
    )
    assert on_data.params == PARAMS
    assert on_data.samples.keys() == {
        "rate",
        "weight",
        "near_log_normalizer",
        "far_log_normalizer",
    }
    assert [
        line.split(":")[0]
        for line in str(on_data).splitlines()
        if not line.startswith(" ")
    ] == ["near", "far"]


def test_data_in_a_mode_that_annealing_does_not_reach(on_data):
    """Z is 1; annealing finds the share of it that the base covers, and 12 of 40 rows
    lie elsewhere."""
    assert float(on_data.estimate["far"]) == pytest.approx(np.log(0.7), abs=0.01)
    assert on_data.flags["near"] == ONE_DIRECTION["forward"]
    flagged(
        on_data,
        "30% of the data rows lie where annealing from the base does not lead",
        "far",
    )


def test_masked_rows_are_not_looked_for(on_data):
    options = {"num_temperatures": 32, "method": "forward", "progress_bar": False}
    # The number of rows looked for stays that of the executable: masked ones are
    # replaced by others.
    log_z = ebm.log_normalizer(
        random.key(0), two_sites, PARAMS, NEAR, FAR, FAR < 10, **options
    )
    assert not any("data rows" in flag for flag in log_z.flags["far"])
    assert log_z.estimate["far"] == on_data.estimate["far"]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"rate": 3.0}, r"lacks \['weight'\]"),
        ({}, r"lacks \['rate', 'weight'\]"),
        (
            PARAMS | {"wieght": 1.0},
            r"holds \['wieght'\], which the model does not have",
        ),
    ],
)
def test_parameters_that_are_missing_or_unknown(params, match):
    with pytest.raises(ValueError, match=match):
        ebm.log_normalizer(random.key(0), two_sites, params, NEAR, FAR)


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"method": "ais"},
            "method = 'ais'; expected one of bracket, forward, reverse, base, quadrature, "
            "enumeration",
        ),
        ({"num_chains": 1}, "num_chains = 1; expected at least 2"),
        ({"budget": 10**6, "num_temperatures": 64}, "budget and num_temperatures"),
        ({"budget": 2 * NUM_WALKERS}, r"budget = 1024 pays for .*at least 2"),
        ({"num_temperatures": 0}, "num_temperatures = 0"),
        ({"num_walkers": 0}, "num_walkers = 0"),
        ({"num_kernel_steps": 0}, "num_kernel_steps = 0"),
        (
            {"samples": {"y": np.zeros((16, 32))}},
            r"samples has sites \['y'\]; expected energy site 'x'",
        ),
        (
            {"samples": {"x": np.zeros((16, 31))}},
            r"samples\['x'\] has shape \(16, 31\); expected .*\(16, 32\).*num_walkers",
        ),
        ({"batch_ndims": 1}, "draws with 1 leading axes"),
    ],
)
def test_options_that_cannot_work(options, match):
    with pytest.raises(ValueError, match=match):
        ebm.log_normalizer(
            random.key(0), quartic(SKEWED), **({"num_walkers": 32} | options)
        )


def test_a_bare_distribution_takes_no_parameters():
    with pytest.raises(
        ValueError, match="bare EnergyDistribution holds its parameters"
    ):
        ebm.log_normalizer(random.key(0), quartic(SKEWED), {"rate": 1.0})


def test_annealing_needs_a_key():
    with pytest.raises(
        ValueError,
        match=r"'bracket' is stochastic; expected a PRNG key such as jax.random.key",
    ):
        ebm.log_normalizer(None, quartic(SKEWED))


def test_annealing_of_a_discrete_support():
    distribution = ebm.EnergyDistribution(
        lambda v: v.sum(-1), dist.Bernoulli(0.5).expand([3]).to_event(1)
    )
    with pytest.raises(
        ValueError, match=r"site 'x' has a discrete support.*method='enumeration'"
    ):
        ebm.log_normalizer(random.key(0), distribution)


def test_an_energy_that_is_nan():
    with pytest.raises(ValueError, match="site 'x' is NaN at 256 of 256 draws"):
        estimate(quartic(SKEWED * np.nan))


def test_a_start_that_leaves_out_part_of_the_base():
    flat = dist.ImproperUniform(constraints.real, (), ())
    narrow = ebm.EnergyDistribution(
        lambda v: 0.5 * v**2, flat, start=dist.HalfNormal(1.0)
    )
    with pytest.raises(
        ValueError,
        match=r"start of the energy at site 'x'.* leaves out part of the base's",
    ):
        ebm.log_normalizer(random.key(0), narrow)
