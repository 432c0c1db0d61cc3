"""What annealing alone cannot see is flagged: each kind on a case of known truth, and
harmless neighbours that pass."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import biject_to, constraints
from scipy.special import gammaln
from scipy.stats import binom
from scipy.stats import t as student_t

import ebm_ppl as ebm
from ebm_ppl.energy.coordinates import standardizing_transform
from ebm_ppl.model.binding import bind_model
from ebm_ppl.normalizer.certify import certify
from ebm_ppl.normalizer.drift import changes
from ebm_ppl.normalizer.edges import share_beyond
from ebm_ppl.normalizer.findings import Findings
from ebm_ppl.normalizer.flags import is_drift_suspicious
from ebm_ppl.normalizer.reach import NUM_ROWS, choose_rows
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.ensemble import Moves
from ebm_ppl.smc.passes import Pass
from ebm_ppl.walkers.placement import anneal_site
from ebm_ppl.walkers.site import SiteAtParams

pytestmark = pytest.mark.xdist_group("annealing_sees")

SMALL = {"num_walkers": 32, "progress_bar": False}


def normal(num_dims, scale=1.0):
    return dist.Normal(0.0, scale).expand([num_dims]).to_event(1)


def log_z_of(distribution, seed=0, **options):
    return ebm.log_normalizer(random.key(seed), distribution, **(SMALL | options))


def site_of(distribution):
    bound, _ = bind_model(random.key(0), distribution, {}, (), {})
    start = distribution.base if distribution.start is None else distribution.start
    return SiteAtParams("x", bound, {}, standardizing_transform(start))


def assert_certified(log_z, truth):
    assert log_z.is_certified, log_z
    assert (
        log_z.lower["x"] - 3 * log_z.stderr["x"]
        < truth
        < log_z.upper["x"] + 3 * log_z.stderr["x"]
    ), log_z


def assert_flagged(log_z, reason, site="x"):
    assert any(reason in flag for flag in log_z.flags[site]), log_z
    with pytest.raises(ebm.UncertifiedNormalizerError, match=f"site '{site}'"):
        log_z.require_certified()


# One direction alone


@pytest.mark.parametrize("method", ["forward", "reverse"])
def test_one_direction_is_never_certified(method):
    """1/|x| has no integral, and either pass alone reads a number with a small
    error."""
    flat = dist.ImproperUniform(constraints.real, (), ())
    heavy = ebm.EnergyDistribution(
        lambda x: 0.5 * jnp.log1p(x**2), flat, start=dist.Normal(0.0, 1.0)
    )
    log_z = log_z_of(heavy, method=method)
    assert log_z.stderr["x"] < 0.1
    assert_flagged(log_z, "use method='bracket'")
    with pytest.raises(ebm.UncertifiedNormalizerError):
        heavy.with_log_normalizer(log_z)


# Large constants in the energy


def shifted(offset):
    """E = offset + 4 |x|² over N(0, I) in five dimensions."""
    distribution = ebm.EnergyDistribution(
        lambda x: offset + 4.0 * (x**2).sum(-1), normal(5)
    )
    return distribution, -offset - 2.5 * np.log(9.0)


def test_sums_hold_what_varies_and_not_the_constant():
    """Against the closed form in double precision: half a million additions of 10⁵
    would lose 0.02."""
    distribution, right = shifted(-1e5)
    options = AnnealingOptions(1, 0.5, ebm.systematic)
    annealed = anneal_site(
        random.key(0),
        site_of(distribution),
        ebm.MALA(),
        options,
        num_chains=16,
        num_walkers=256,
        num_temperatures=256,
    )
    islands = np.asarray(annealed.relative.log_normalizers, float)
    assert np.max(np.abs(islands)) < 20
    stderr = islands.std(ddof=1) / 4
    assert stderr < 0.005
    assert (
        abs(np.log(np.exp(islands).mean()) - (right + float(annealed.reference)))
        < 5.24 * stderr
    )
    # The walkers' own weights and potentials are those of the energy as it was given.
    np.testing.assert_allclose(annealed.ensemble.log_normalizers, right, rtol=1e-6)
    np.testing.assert_allclose(annealed.ensemble.potential, -1e5, rtol=1e-3)


def test_an_offset_that_rounding_cannot_carry():
    distribution, right = shifted(-1e5)
    log_z = log_z_of(distribution, num_walkers=256, num_temperatures=256)
    assert_flagged(log_z, "subtract a constant of about -999")
    assert abs(float(log_z.estimate["x"]) - right) < 4 * log_z.stderr["x"]
    assert log_z.lower["x"] < right < log_z.upper["x"]


def test_an_offset_that_rounding_can_carry():
    distribution, right = shifted(1e3)
    log_z = log_z_of(distribution, num_temperatures=128)
    assert_certified(log_z, right)
    assert 0 < log_z.stderr["x"] < 0.03


def passes(log_ratios):
    shape = log_ratios.shape[1:]
    log_weights = jnp.asarray(log_ratios)[:, None] + 0.1 * random.normal(
        random.key(9), (16, 4, *shape)
    )
    moves = Moves(acceptance=jnp.full(shape, 0.6), turnover=jnp.full(shape, 30.0))
    return Pass(
        jnp.asarray(log_ratios), log_weights, moves, resampled=jnp.ones(shape, bool)
    )


def test_rounding_enters_errors_and_limits():
    """Elements of size 10³ and 10⁶: the first is as without a reference, the second is
    flagged, alone."""
    islands = 0.01 * np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    there, back = passes(islands), passes(-islands)
    plain = certify(Findings(there, back), tolerance=1.0)
    size = jnp.array([1e3, 1e6])
    moved = certify(
        Findings(there, back, reference=size, magnitude=size), tolerance=1.0
    )
    assert plain.flags == ()
    assert len(moved.flags) == 1
    assert "in 1 of 2 elements" in moved.flags[0]
    rounding = float(jnp.finfo(jnp.float32).eps) * np.asarray(size)
    np.testing.assert_allclose(
        moved.stderr, np.hypot(plain.stderr, rounding), rtol=1e-5
    )
    np.testing.assert_allclose(moved.estimate, plain.estimate - size, rtol=1e-7)
    np.testing.assert_allclose(
        moved.lower[0], plain.lower[0] - 1e3 - rounding[0], atol=6e-5
    )
    np.testing.assert_allclose(
        moved.upper[0], plain.upper[0] - 1e3 + rounding[0], atol=6e-5
    )


# Ends of supports


def towards(end, rate, size):
    """u with density ``rate · exp(−rate |u|)`` on one side."""
    return end * np.random.default_rng(0).exponential(1.0 / rate, size=size).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("support", "end", "rate", "edge"),
    [
        # log of the smallest normal number, of the largest one, and of what is left of
        # 1 under the last number.
        (constraints.positive, -1, 0.02, 87.34),
        (constraints.positive, 1, 0.02, 88.72),
        (constraints.unit_interval, -1, 0.02, 87.34),
        (constraints.unit_interval, 1, 0.1, 15.94),
        (constraints.interval(2.0, 3.0), -1, 0.1, 15.2),
    ],
)
def test_the_share_beyond_an_edge(support, end, rate, edge):
    """Walkers of an exponential that the edge cuts off: exp(−rate · edge) lies beyond,
    of what is in sight the odds."""
    position = towards(end, rate, 2**21)
    position = position[np.abs(position) < edge][: 2**19].reshape(16, -1)
    odds = 1.0 / np.expm1(rate * edge)
    found = float(share_beyond(biject_to(support), jnp.asarray(position), 0))
    # An edge is where neighbouring numbers become one, which is known to about a unit
    # of u.
    assert odds / 2 < found < 2 * odds


def test_no_edges_where_nothing_ends_and_where_densities_fall():
    position = random.normal(random.key(0), (16, 256, 3))
    for support in (
        constraints.real_vector,
        constraints.positive,
        constraints.unit_interval,
        constraints.simplex,
    ):
        transform = (
            standardizing_transform(normal(3))
            if support is constraints.real_vector
            else biject_to(support)
        )
        assert share_beyond(transform, 3.0 * position, 0) < 1e-3


FLAT = dist.ImproperUniform(constraints.positive, (), ())
POLES = {
    "1/x": ebm.EnergyDistribution(jnp.log, FLAT, start=dist.LogNormal(0.0, 1.0)),
    "x^-1.05 exp(-x)": ebm.EnergyDistribution(
        lambda x: 1.05 * jnp.log(x), dist.Gamma(1.0, 1.0)
    ),
    "Beta(1, 0.05)": ebm.EnergyDistribution(
        lambda x: 0.95 * jnp.log1p(-x), dist.Uniform(0.0, 1.0)
    ),
    "corner of a simplex": ebm.EnergyDistribution(
        lambda x: 1.02 * jnp.log(x).sum(-1), dist.Dirichlet(jnp.ones(3))
    ),
}


@pytest.mark.parametrize("name", POLES)
def test_mass_beyond_the_last_number_is_refused(name):
    assert_flagged(
        log_z_of(POLES[name], num_temperatures=128),
        "of the density lie beyond the last numbers",
    )


def test_sharp_ends_that_floating_point_reaches():
    base = dist.Uniform(0.0, 1.0)
    beta = ebm.EnergyDistribution(
        lambda x: 0.5 * jnp.log(x) + 0.5 * jnp.log1p(-x), base
    )
    assert_certified(log_z_of(beta), np.log(np.pi))
    dirichlet = ebm.EnergyDistribution(
        lambda x: 0.7 * jnp.log(x).sum(-1), dist.Dirichlet(jnp.ones(3))
    )
    assert_certified(
        log_z_of(dirichlet), 3 * gammaln(0.3) - gammaln(0.9) + gammaln(3.0)
    )


# Data in a mode that no walker has found


def log_normal(x, loc, scale):
    return jnp.sum(
        -0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi), -1
    )


def far_mode(log_mass, x):
    """Over N(0, I) in two dimensions: one normal and, at 8, a narrow one of e^log_mass
    times its mass."""
    near, far = log_normal(x, 0.0, 1.0), log_mass + log_normal(x, 8.0, 0.3)
    return normal(2).log_prob(x) - jnp.logaddexp(near, far)


def observed(x):
    log_mass = numpyro.param("log_mass", 3.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(lambda v: far_mode(log_mass, v), normal(2)),
            obs=x,
        )


def rows_at_the_base(num_rows):
    return np.random.default_rng(0).normal(size=(num_rows, 2)).astype(np.float32)


@pytest.mark.parametrize("num_rows", [256, 3000])
def test_a_single_row_in_a_missed_mode(num_rows):
    """Of 256 rows, and of 3,000 of which 256 are looked at."""
    x = rows_at_the_base(num_rows)
    x[17] = 8.0
    log_z = ebm.log_normalizer(random.key(0), observed, {"log_mass": 3.0}, x, **SMALL)
    assert log_z.estimate["x"] < 0.1
    assert_flagged(
        log_z, "of the data rows lie where annealing from the base does not lead"
    )


def test_outliers_are_no_missed_mode():
    """Rows at 50 standard deviations, the mode's mass all but gone."""
    x = rows_at_the_base(256)
    x[:3] = [[-50.0, 0.0], [0.0, -50.0], [35.0, -35.0]]
    log_z = ebm.log_normalizer(random.key(0), observed, {"log_mass": -80.0}, x, **SMALL)
    assert_certified(log_z, 0.0)


def test_noisy_trajectories_are_no_missed_mode():
    """In 64 dimensions and over few temperatures rows of the model weigh anything from
    e⁻⁹ up, by noise alone."""

    def model(x):
        rate = numpyro.param("rate", 3.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(
                    lambda v: 0.5 * rate * (v**2).sum(-1), normal(64)
                ),
                obs=x,
            )

    x = 0.5 * np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    x[:5] *= 50.0
    log_z = ebm.log_normalizer(
        random.key(0),
        model,
        {"rate": 3.0},
        x,
        num_temperatures=64,
        tolerance=5.0,
        **SMALL,
    )
    assert not any("data rows" in flag for flag in log_z.flags["x"]), log_z


@pytest.mark.runs_long
def test_rows_at_the_mode_are_not_out_of_reach():
    """In 100 dimensions hardly any mass is at the mode itself: rows move to where it is
    before they are carried back."""
    centre = 1e-3 * np.random.default_rng(0).normal(size=(60, 100)).astype(np.float32)

    def model(x):
        energy = ebm.EnergyDistribution(lambda x: 1.5 * (x**2).sum(-1), normal(100))
        with numpyro.plate("rows", 60):
            numpyro.sample("x", energy, obs=x)

    options = SMALL | {"num_temperatures": 128}
    log_z = ebm.log_normalizer(random.key(0), model, {}, centre, **options)
    assert_certified(log_z, -50 * np.log(4.0))


def test_rows_in_rare_places_are_among_those_looked_at():
    """Of 3,000 rows: the lowest energy, the lowest starting density and the one
    farthest from all walkers."""
    well = np.float32([0.5, 0.5])
    energy = lambda x: -20.0 * jnp.exp(-0.5 * ((x - well) ** 2).sum(-1) / 0.01**2)  # noqa: E731
    site = site_of(ebm.EnergyDistribution(energy, normal(2)))
    rows = 0.3 * rows_at_the_base(3000)
    rows[1000], rows[2001], rows[2500] = well, [4.0, 4.0], [-1.8, 1.8]
    walkers = rows_at_the_base(NUM_ROWS) + np.float32([1.0, -1.0])
    chosen = np.asarray(choose_rows(site, jnp.asarray(rows), jnp.asarray(walkers)))
    assert chosen.shape == (NUM_ROWS, 2)
    for row in (rows[1000], rows[2001], rows[2500]):
        assert np.any(np.all(chosen == row, axis=1))


# Narrow places, heavy tails: walkers that are not the energy's own


def funnel(num_dims, scale=1.0):
    """Neal's: v ~ N(0, 9), the others given v N(0, exp v), normalised, over a normal
    base."""
    base = normal(num_dims, scale)

    def energy(x):
        v, others = x[..., 0], x[..., 1:]
        spread = dist.Normal(0.0, jnp.exp(v / 2)[..., None])
        return (
            base.log_prob(x)
            - dist.Normal(0.0, 3.0).log_prob(v)
            - spread.log_prob(others).sum(-1)
        )

    return ebm.EnergyDistribution(energy, base)


@pytest.mark.runs_long
@pytest.mark.parametrize(("num_dims", "num_seeds", "most"), [(2, 16, 2), (5, 4, 0)])
def test_a_funnel_is_bracketed_or_flagged(num_dims, num_seeds, most):
    """A bracket may miss as often as limits at 97.5% do; with |u| and one step size
    alone a third of them did."""
    distribution, missed = funnel(num_dims), 0
    for seed in range(num_seeds):
        log_z = log_z_of(distribution, seed, num_walkers=64)
        lower, upper = float(log_z.lower["x"]), float(log_z.upper["x"])
        missed += log_z.is_certified and not lower <= 0 <= upper
        assert not log_z.is_certified or max(lower, -upper) < 4 * log_z.stderr["x"], (
            log_z
        )
    assert missed <= most


@pytest.mark.parametrize("seed", [0, 2])
def test_a_ridge_along_which_walkers_creep(seed):
    """x₁ | x₀ ~ N(x₀² − 100, 1) over x₀ ~ N(0, 10²), log Z = 0: walkers find the ridge
    where it crosses the start, and spread along it in far more moves than they get."""

    def energy(x):
        along = dist.Normal(0.0, 10.0).log_prob(x[..., 0])
        return -along - dist.Normal(x[..., 0] ** 2 - 100, 1.0).log_prob(x[..., 1])

    flat = dist.ImproperUniform(constraints.real_vector, (), (2,))
    ridge = ebm.EnergyDistribution(energy, flat, start=normal(2, 5.0))
    log_z = ebm.log_normalizer(random.key(seed), ridge, progress_bar=False)
    assert log_z.upper["x"] < -1.0
    assert_flagged(log_z, "still drift")


def test_tails_tell_what_means_do_not():
    """Five walkers of 64 go into a narrow well at the usual distance: |u| and |u|²
    hardly change."""
    well = jnp.array([0.0, 0.7, 1.44])
    energy = lambda x: -5.0 * jnp.exp(-0.5 * ((x - well) ** 2).sum(-1) / 0.02**2)  # noqa: E731
    site = site_of(ebm.EnergyDistribution(energy, normal(3)))
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 16, 64, 3)).astype(np.float32)
    after[:, :5] = np.asarray(well) + 0.02 * after[:, :5]
    drift = changes(site, jnp.asarray(before), jnp.asarray(after))
    assert drift.shape == (16, 2 + 2 * (3 + 3 + 4))
    assert is_drift_suspicious(drift, 0.02)
    assert not is_drift_suspicious(drift[:, :2], 0.02)
    there = passes(
        0.01 * np.random.default_rng(1).normal(size=(16,)).astype(np.float32)
    )
    flags = certify(Findings(there, there, drift=drift), tolerance=5.0).flags
    assert any("still drift" in flag for flag in flags)


def test_tails_of_independent_draws_change_by_chance():
    """Before and after from one normal: t statistics pass Student's 1% limit as often
    as that says, and no flag."""
    site = site_of(ebm.EnergyDistribution(lambda x: 0.0 * x.sum(-1), normal(3)))
    rng = np.random.default_rng(0)
    statistics, suspicions, probability = [], 0, 0.02
    for _ in range(60):
        before, after = rng.normal(size=(2, 16, 64, 3)).astype(np.float32)
        drift = np.asarray(changes(site, jnp.asarray(before), jnp.asarray(after)))
        statistics.append(drift.mean(0) / (drift.std(0, ddof=1) / 4))
        suspicions += is_drift_suspicious(jnp.asarray(drift), probability)
    passed = np.abs(np.stack(statistics)) > student_t.ppf(0.995, 15)
    # 60 · 22 statistics, those of |u|, U and |∇U| all the same here: 5 standard errors
    # of some 500 independent ones.
    assert 0 < passed.mean() < 0.01 + 5 * np.sqrt(0.01 / 500)
    assert suspicions <= binom.ppf(1 - 1e-4, 60, 3 * probability)


# log Z over draws


def two_modes(x=None):
    """Two narrow modes of masses 1 and e^a."""
    a = numpyro.sample("a", dist.Normal(0.0, 10.0))

    def energy(v):
        return -jnp.logaddexp(log_normal(v, -4.0, 0.5), a + log_normal(v, 4.0, 0.5))

    flat = dist.ImproperUniform(constraints.real_vector, (), (2,))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample(
            "x", ebm.EnergyDistribution(energy, flat, start=normal(2, 4.0)), obs=x
        )


def test_a_mode_that_the_draw_in_the_middle_hardly_has():
    a = jnp.array([-11.0, -10.5, -11.2, -10.8, -11.1, 0.5])
    log_z = ebm.log_normalizer(
        random.key(0), two_modes, {"a": a}, batch_ndims=1, **SMALL
    )
    assert_flagged(log_z, "at draw 5 (")
    assert_flagged(log_z, "without batch_ndims")
    assert any(
        "annealing finds log Z = 0.9" in flag or "annealing finds log Z = 1.0" in flag
        for flag in log_z.flags["x"]
    )


def test_draws_that_are_alike_agree():
    """λ between 2 and 3 over N(0, 1): log Z = −½ log(1 + λ) at every draw, with a
    constant of 100 λ in the energy."""

    def model():
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(
                lambda v: rate * (0.5 * v**2 + 100.0), dist.Normal(0.0, 1.0)
            ),
        )

    rate = jnp.linspace(2.0, 3.0, 12)
    log_z = ebm.log_normalizer(
        random.key(0), model, {"rate": rate}, batch_ndims=1, **SMALL
    )
    assert log_z.is_certified, log_z
    exact = -0.5 * np.log1p(np.asarray(rate, float)) - 100.0 * np.asarray(rate, float)
    assert np.all(
        np.abs(np.asarray(log_z.estimate["x"], float) - exact)
        < 5.24 * np.asarray(log_z.stderr["x"])
    )
    assert np.all(np.asarray(log_z.stderr["x"]) < 0.03)


# Poles inside the support


def power_pole(exponent, num_dims=1, at=0.0):
    """|x − at|^−a on N(0, 1): it diverges for a ≥ d."""
    base = dist.Normal(0.0, 1.0).expand([num_dims]).to_event(1)
    return ebm.EnergyDistribution(
        lambda v: 0.5 * exponent * jnp.log(((v - at) ** 2).sum(-1)), base
    )


@pytest.mark.parametrize(
    ("exponent", "num_dims", "at"),
    [(1.0, 1, 0.0), (0.95, 1, 0.7), (2.0, 2, 0.0), (2.9, 3, 0.3)],
)
def test_a_pole_inside_the_support(exponent, num_dims, at):
    log_z = log_z_of(power_pole(exponent, num_dims, at), 0, num_walkers=64)
    assert not log_z.is_certified
    assert any(
        "falls without end towards a point" in flag for flag in log_z.flags["x"]
    ), log_z


SMOOTH = {
    "normal": lambda v: (v**2).sum(-1),
    "kink": lambda v: 3.0 * jnp.abs(v).sum(-1),
    "cusp": lambda v: jnp.sqrt(jnp.abs(v)).sum(-1),
    "narrow": lambda v: 5e3 * ((v - 0.3) ** 2).sum(-1),
    "weak pole": lambda v: 0.2 * jnp.log(jnp.abs(v)).sum(-1),
    "unbounded above": lambda v: -jnp.log(jnp.abs(v)).sum(-1),
}


@pytest.mark.parametrize("energy", SMOOTH)
def test_energies_without_a_pole(energy):
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    log_z = log_z_of(ebm.EnergyDistribution(SMOOTH[energy], base), 0, num_walkers=64)
    assert not any("falls without end" in flag for flag in log_z.flags["x"]), log_z
