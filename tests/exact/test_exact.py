"""Quadrature and enumeration against closed forms: values, gradients, batches, and what
they flag or refuse."""

import itertools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.exact.enumeration import enumeration
from ebm_ppl.exact.quadrature import quadrature

NORMAL = dist.Normal(0.0, 1.0)
FLAT = dist.ImproperUniform(constraints.real, (), ())


def standard_normal(num_dims):
    return dist.Normal(0.0, 1.0).expand([num_dims]).to_event(1)


# Energies whose log Z is known: ``() -> (distribution, log Z)``; called where the
# precision has been chosen.


def gaussian_case():
    """E = ½ λ v² − b v over N(m, s²)."""
    rate, tilt, loc, scale = 3.0, 1.5, 0.5, 2.0
    precision = 1 / scale**2 + rate
    exact = (
        0.5 * (loc / scale**2 + tilt) ** 2 / precision
        - 0.5 * loc**2 / scale**2
        - 0.5 * np.log(scale**2 * precision)
    )
    return ebm.EnergyDistribution(
        lambda v: 0.5 * rate * v**2 - tilt * v, dist.Normal(loc, scale)
    ), exact


def skewed_case():
    """E = ¼ v⁴ + ½ v³ − 2v over N(0, 1)."""
    integrand = lambda v: np.exp(-(0.25 * v**4 + 0.5 * v**3 - 2 * v)) * norm.pdf(v)  # noqa: E731
    exact = np.log(quad(integrand, -12, 12, epsabs=1e-13, epsrel=1e-13, limit=400)[0])
    return ebm.EnergyDistribution(
        lambda v: 0.25 * v**4 + 0.5 * v**3 - 2 * v, dist.Normal(0.0, 1.0)
    ), exact


def improper_case():
    """The same energy over an improper base, from a start that is neither centred nor
    of its scale."""
    integrand = lambda v: np.exp(-(0.25 * v**4 + 0.5 * v**3 - 2 * v))  # noqa: E731
    exact = np.log(quad(integrand, -12, 12, epsabs=1e-13, epsrel=1e-13, limit=400)[0])
    energy = lambda v: 0.25 * v**4 + 0.5 * v**3 - 2 * v  # noqa: E731
    return ebm.EnergyDistribution(energy, FLAT, start=dist.Normal(-1.0, 3.0)), exact


def half_normal_case():
    return ebm.EnergyDistribution(lambda v: 2.0 * v, dist.HalfNormal(1.0)), np.log(
        2
    ) + 2.0 + norm.logcdf(-2.0)


def exponential_case():
    return ebm.EnergyDistribution(lambda v: 2.0 * v, dist.Exponential(1.5)), np.log(
        1.5 / 3.5
    )


def uniform_case():
    exact = np.log((np.exp(2.0) - np.exp(-6.0)) / (2.0 * 4.0))
    return ebm.EnergyDistribution(lambda v: 2.0 * v, dist.Uniform(-1.0, 3.0)), exact


def simplex_case():
    """E = −Σ aᵢ log xᵢ over a uniform simplex: a Dirichlet."""
    powers = np.array([1.0, 2.0, 5.0])
    energy = lambda v: -(jnp.asarray(powers) * jnp.log(v)).sum(-1)  # noqa: E731
    exact = gammaln(powers + 1).sum() - gammaln((powers + 1).sum()) + gammaln(3)
    return ebm.EnergyDistribution(energy, dist.Dirichlet(jnp.ones(3))), exact


PRECISION = np.array([[2.0, -1.2], [-1.2, 1.5]])
CENTRE = np.array([0.5, -1.0])


def quadratic(v):
    centred = v - jnp.asarray(CENTRE)
    return 0.5 * jnp.einsum(
        "...i,ij,...j->...", centred, jnp.asarray(PRECISION), centred
    )


def correlated_case():
    """A correlated Gaussian energy over a differently correlated Gaussian base."""
    loc, covariance = np.array([1.0, 0.3]), np.array([[1.0, 0.6], [0.6, 2.0]])
    total = covariance + np.linalg.inv(PRECISION)
    away = CENTRE - loc
    exact = -0.5 * away @ np.linalg.solve(total, away) - 0.5 * np.log(
        np.linalg.det(total) * np.linalg.det(PRECISION)
    )
    return ebm.EnergyDistribution(
        quadratic, dist.MultivariateNormal(jnp.asarray(loc), jnp.asarray(covariance))
    ), exact


def correlated_improper_case():
    flat = dist.ImproperUniform(constraints.real_vector, (), (2,))
    exact = np.log(2 * np.pi) - 0.5 * np.log(np.linalg.det(PRECISION))
    return ebm.EnergyDistribution(quadratic, flat, start=standard_normal(2)), exact


COUPLING, FIELD = 0.3, 0.1


def ising(v):
    """E on a 4 × 4 torus: every site with its right and lower neighbour."""
    spin = (2.0 * v - 1.0).reshape(*v.shape[:-1], 4, 4)
    bonds = spin * (jnp.roll(spin, 1, -1) + jnp.roll(spin, 1, -2))
    return -COUPLING * bonds.sum((-1, -2)) - FIELD * spin.sum((-1, -2))


def ising_case():
    """log tr T⁴ with T between rows of four spins, less log 2 per site for the
    Bernoulli base."""
    rows = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    within = COUPLING * (rows * np.roll(rows, 1, 1)).sum(1) + FIELD * rows.sum(1)
    transfer = np.exp(within[:, None] + COUPLING * rows @ rows.T)
    exact = np.log(np.trace(np.linalg.matrix_power(transfer, 4))) - 16 * np.log(2.0)
    return ebm.EnergyDistribution(
        ising, dist.Bernoulli(0.5).expand([16]).to_event(1)
    ), exact


def unequal_bits_case():
    """Independent bits of unequal probability and energy: Z = Π (1 − p + p e^−a)."""
    probs, cost = np.array([0.1, 0.4, 0.8]), np.array([-1.0, 2.0, 0.5])
    exact = np.log1p(probs * np.expm1(-cost)).sum()
    energy = lambda v: (jnp.asarray(cost) * v).sum(-1)  # noqa: E731
    return ebm.EnergyDistribution(
        energy, dist.Bernoulli(jnp.asarray(probs)).to_event(1)
    ), exact


def integers_case():
    """Pairs of integers from −2 to 3, tied by v₀ v₁."""
    values = np.arange(-2, 4)
    exact = logsumexp(
        -0.3 * np.multiply.outer(values, values) - 0.5 * values[:, None]
    ) - np.log(36)
    energy = lambda v: 0.3 * v[..., 0] * v[..., 1] + 0.5 * v[..., 0]  # noqa: E731
    return ebm.EnergyDistribution(
        energy, dist.DiscreteUniform(-2, 3).expand([2]).to_event(1)
    ), exact


CONTINUOUS = (
    gaussian_case,
    skewed_case,
    improper_case,
    half_normal_case,
    exponential_case,
    uniform_case,
    simplex_case,
    correlated_case,
    correlated_improper_case,
)
DISCRETE = (ising_case, unequal_bits_case, integers_case)


@pytest.mark.parametrize("case", CONTINUOUS + DISCRETE, ids=lambda case: case.__name__)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-6), ("float32", 1e-5)]
)
def test_log_z_is_that_of_the_closed_form(case, precision, tolerance):
    method = "quadrature" if case in CONTINUOUS else "enumeration"
    with jax.enable_x64(True) if precision == "float64" else nullcontext():
        distribution, exact = case()
        log_z = ebm.log_normalizer(None, distribution, method=method)
        estimate = log_z.estimate["x"]
        assert estimate.dtype == precision
        assert abs(np.expm1(float(estimate) - exact)) < tolerance
        assert log_z.flags == {"x": ()}
        assert log_z.method == method
        assert log_z.lower["x"] == log_z.upper["x"] == estimate
        assert log_z.stderr["x"] == 0
        assert log_z.log_normalizers["x"].shape == (1,)
        assert "certified" in str(log_z)


# Derivatives


@pytest.mark.parametrize("value", [0.5, 4.0])
def test_gradient_of_quadrature_under_jit(value):
    """log Z = ½ b²/(1 + λ) − ½ log(1 + λ): both derivatives, and in λ the second."""

    def log_z(rate, tilt):
        energy = ebm.EnergyDistribution(
            lambda v: 0.5 * rate * v**2 - tilt * v, dist.Normal(0.0, 1.0)
        )
        return ebm.log_normalizer(None, energy, method="quadrature").estimate["x"]

    with jax.enable_x64(True):
        by_rate, by_tilt = jax.jit(jax.grad(log_z, argnums=(0, 1)))(value, 1.5)
        assert by_rate == pytest.approx(
            -0.5 * 1.5**2 / (1 + value) ** 2 - 0.5 / (1 + value), rel=1e-6
        )
        assert by_tilt == pytest.approx(1.5 / (1 + value), rel=1e-6)
        second = jax.jit(jax.grad(jax.grad(log_z)))(value, 1.5)
        assert second == pytest.approx(
            1.5**2 / (1 + value) ** 3 + 0.5 / (1 + value) ** 2, rel=1e-6
        )


def test_gradient_of_quadrature_by_the_base():
    """Z of e^{bv} over N(m, s²) is e^{bm + ½ b² s²}, through the coordinates that
    follow m and s."""

    def log_z(loc, scale):
        return quadrature(
            ebm.EnergyDistribution(lambda v: -1.5 * v, dist.Normal(loc, scale))
        )[0]

    by_loc, by_scale = jax.jit(jax.grad(log_z, argnums=(0, 1)))(0.7, 0.8)
    assert by_loc == pytest.approx(1.5, rel=1e-5)
    assert by_scale == pytest.approx(1.5**2 * 0.8, rel=1e-5)


def test_gradient_of_an_energy_that_overflows_at_the_ends():
    """∂ log Z = −E[cosh v]: at the far points of the grid cosh is infinite, and its
    weight is nought."""

    def log_z(rate):
        return quadrature(
            ebm.EnergyDistribution(lambda v: rate * jnp.cosh(v), dist.Normal(0.0, 1.0))
        )[0]

    density = lambda v: np.exp(-np.cosh(v)) * norm.pdf(v)  # noqa: E731
    mean = quad(lambda v: np.cosh(v) * density(v), -8, 8)[0] / quad(density, -8, 8)[0]
    value, slope = jax.jit(jax.value_and_grad(log_z))(1.0)
    assert value == pytest.approx(np.log(quad(density, -8, 8)[0]), abs=1e-5)
    assert slope == pytest.approx(-mean, rel=1e-5)


def test_gradient_of_enumeration_under_jit():
    """Two spins of coupling J and field h over fair coins: Z = ½ (e^J cosh 2h +
    e^−J)."""

    def log_z(coupling, field):
        def energy(v):
            spin = 2.0 * v - 1.0
            return -coupling * spin.prod(-1) - field * spin.sum(-1)

        distribution = ebm.EnergyDistribution(
            energy, dist.Bernoulli(0.5).expand([2]).to_event(1)
        )
        return ebm.log_normalizer(None, distribution, method="enumeration").estimate[
            "x"
        ]

    by_coupling, by_field = jax.jit(jax.grad(log_z, argnums=(0, 1)))(0.4, 0.2)
    up, down = np.exp(0.4) * np.cosh(0.4), np.exp(-0.4)
    assert by_coupling == pytest.approx((up - down) / (up + down), rel=1e-5)
    assert by_field == pytest.approx(
        2 * np.exp(0.4) * np.sinh(0.4) / (up + down), rel=1e-5
    )


# Shapes


def test_one_z_per_batch_element_of_quadrature():
    rates = jnp.array([[0.5, 1.0, 4.0], [2.0, 3.0, 10.0]])
    distribution = ebm.EnergyDistribution(
        lambda v: 0.5 * rates * v**2, dist.Normal(jnp.zeros((2, 3)), 1.0)
    )
    log_z = ebm.log_normalizer(None, distribution, method="quadrature")
    assert log_z.log_normalizers["x"].shape == (1, 2, 3)
    np.testing.assert_allclose(log_z.estimate["x"], -0.5 * np.log1p(rates), atol=1e-5)


def test_one_z_per_batch_element_of_two_dimensional_quadrature():
    """Batch elements differ in the energy and in the base; an event is a pair."""
    tilt = jnp.array([[0.5, 1.0], [2.0, -1.0], [0.0, 0.3]])
    scale = jnp.array([0.5, 1.0, 2.0])
    base = dist.Normal(jnp.zeros((3, 2)), scale[:, None]).to_event(1)
    distribution = ebm.EnergyDistribution(lambda v: -(tilt * v).sum(-1), base)
    log_z, flags = quadrature(distribution, num_points=257)
    assert flags == ()
    np.testing.assert_allclose(log_z, 0.5 * (tilt**2).sum(-1) * scale**2, atol=1e-5)


def test_one_z_per_batch_element_of_enumeration():
    field = jnp.array([-1.0, 0.0, 0.7])
    base = dist.Bernoulli(jnp.full((3, 4), 0.5)).to_event(1)
    distribution = ebm.EnergyDistribution(lambda v: field * v.sum(-1), base)
    log_z, flags = enumeration(distribution)
    assert flags == ()
    np.testing.assert_allclose(
        log_z, 4 * np.log(0.5 + 0.5 * np.exp(-field)), rtol=1e-5, atol=1e-6
    )


def rated(x=None):
    rate = numpyro.param("rate", 1.0)
    numpyro.sample(
        "x",
        ebm.EnergyDistribution(lambda v: 0.5 * rate * v**2, dist.Normal(0.0, 1.0)),
        obs=x,
    )


def test_exact_values_at_parameter_draws():
    rate = jnp.array([[0.5, 1.0, 4.0], [2.0, 3.0, 10.0]])
    log_z = ebm.log_normalizer(
        None, rated, {"rate": rate}, method="quadrature", batch_ndims=2
    )
    assert log_z.batch_ndims == 2
    assert log_z.is_certified
    assert log_z.log_normalizers["x"].shape == (1, 2, 3)
    np.testing.assert_allclose(log_z.estimate["x"], -0.5 * np.log1p(rate), atol=1e-5)
    np.testing.assert_array_equal(
        log_z.samples["x_log_normalizer"], log_z.estimate["x"]
    )


def test_a_doubtful_draw_is_flagged():
    """At rate −1 nothing bounds the energy: that draw's log Z is NaN, and only that
    one."""
    log_z = ebm.log_normalizer(
        None,
        rated,
        {"rate": jnp.array([0.5, -1.0, 2.0])},
        method="quadrature",
        batch_ndims=1,
    )
    np.testing.assert_array_equal(np.isnan(log_z.estimate["x"]), [False, True, False])
    assert len(log_z.flags["x"]) == 1
    assert "in 1 of 3 elements" in log_z.flags["x"][0]


# Doubts


DOUBTS = {
    "not bounded below": (
        lambda: ebm.EnergyDistribution(lambda v: -(v**4), dist.Normal(0.0, 1.0)),
        "beyond the ends",
    ),
    "no lower bound on one side": (
        lambda: ebm.EnergyDistribution(lambda v: v, FLAT),
        "beyond the ends|not finite",
    ),
    "cauchy": (
        lambda: ebm.EnergyDistribution(lambda v: jnp.log1p(v**2), FLAT),
        "beyond the ends",
    ),
    "cauchy in one of two dimensions": (
        lambda: ebm.EnergyDistribution(
            lambda v: jnp.log1p(v[..., 1] ** 2) + 0.5 * v[..., 0] ** 2,
            dist.ImproperUniform(constraints.real_vector, (), (2,)),
        ),
        "beyond the ends",
    ),
    "truncated by infinity along a circle": (
        lambda: ebm.EnergyDistribution(
            lambda v: jnp.where((v**2).sum(-1) < 1, 0.0, jnp.inf),
            dist.Normal(0.0, 1.0).expand([2]).to_event(1),
        ),
        "half the points",
    ),
    "narrower than numbers are apart": (
        lambda: ebm.EnergyDistribution(
            lambda v: 5e13 * (v - 0.3) ** 2, dist.Normal(0, 1)
        ),
        "rounds the energy|half the points",
    ),
    "nan": (
        lambda: ebm.EnergyDistribution(lambda v: jnp.sqrt(v), dist.Normal(0.0, 1.0)),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_a_doubtful_integral_is_flagged_and_nan_under_a_trace(case):
    build, reason = DOUBTS[case]
    log_z = ebm.log_normalizer(
        None,
        build(),
        method="quadrature",
        num_points=257 if "dimensions" in case else None,
    )
    assert not log_z.is_certified
    with pytest.raises(
        ebm.UncertifiedNormalizerError,
        match=f"method 'quadrature'.*site 'x': .*({reason})",
    ):
        log_z.require_certified()
    assert np.isnan(jax.jit(lambda: quadrature(build(), None, 257)[0])())


def test_a_doubt_about_one_batch_element_is_a_doubt():
    signs = jnp.array([1.0, -1.0])
    distribution = ebm.EnergyDistribution(
        lambda v: signs * v**4, dist.Normal(jnp.zeros(2), 1.0)
    )
    assert len(quadrature(distribution)[1]) == 1
    traced = jax.jit(lambda: quadrature(distribution)[0])()
    np.testing.assert_array_equal(np.isnan(traced), [False, True])


def test_a_sum_that_is_not_finite_is_flagged():
    energy = lambda v: jnp.where(v.sum(-1) == 0, jnp.nan, 0.0)  # noqa: E731
    distribution = ebm.EnergyDistribution(
        energy, dist.Bernoulli(0.5).expand([3]).to_event(1)
    )
    log_z = ebm.log_normalizer(None, distribution, method="enumeration")
    assert "not finite" in log_z.flags["x"][0]
    assert np.isnan(jax.jit(lambda: enumeration(distribution)[0])())


def test_infinite_energies_leave_states_out():
    """Enumeration knows nothing of ends or smoothness: a state of infinite energy has
    no weight."""
    energy = lambda v: jnp.where(v.sum(-1) > 1, jnp.inf, 0.0)  # noqa: E731
    log_z, flags = enumeration(
        ebm.EnergyDistribution(energy, dist.Bernoulli(0.5).expand([3]).to_event(1))
    )
    assert flags == ()
    assert log_z == pytest.approx(np.log(4 / 8), rel=1e-6)


# Refusals


@pytest.mark.parametrize("num_points", [8, 7, 100, 0, -9])
def test_a_number_of_points_that_cannot_be_halved(num_points):
    with pytest.raises(
        ValueError,
        match=f"num_points = {num_points}; expected an odd number of at least 9",
    ):
        ebm.log_normalizer(
            None, gaussian_case()[0], method="quadrature", num_points=num_points
        )


@pytest.mark.parametrize("num_points", [None, 32_769])
def test_a_narrow_energy(num_points):
    """A scale of 1/300 of the start's: cells are split, or there are more of them."""
    with jax.enable_x64(True):
        narrow = ebm.EnergyDistribution(
            lambda v: 0.5 * 9e4 * (v - 1.0) ** 2, FLAT, start=dist.Normal(0.0, 1.0)
        )
        log_z, flags = quadrature(narrow, None, num_points)
        assert flags == ()
        assert log_z == pytest.approx(0.5 * np.log(2 * np.pi / 9e4), abs=1e-6)


def test_quadrature_of_three_dimensions():
    distribution = ebm.EnergyDistribution(lambda v: (v**2).sum(-1), standard_normal(3))
    with pytest.raises(
        ValueError,
        match=r"site 'x' has 3 unconstrained dimensions.*one or two.*method='bracket'",
    ):
        ebm.log_normalizer(None, distribution, method="quadrature")


def test_quadrature_counts_unconstrained_dimensions():
    """Four elements of a simplex are three dimensions."""
    distribution = ebm.EnergyDistribution(
        lambda v: v[..., 0], dist.Dirichlet(jnp.ones(4))
    )
    with pytest.raises(ValueError, match="3 unconstrained dimensions"):
        ebm.log_normalizer(None, distribution, method="quadrature")


def test_quadrature_of_a_discrete_support():
    distribution = ebm.EnergyDistribution(lambda v: 0.1 * v, dist.Poisson(3.0))
    with pytest.raises(
        ValueError, match=r"site 'x' has a discrete support.*method='enumeration'"
    ):
        ebm.log_normalizer(None, distribution, method="quadrature")


@pytest.mark.parametrize(
    "base", [dist.Normal(0.0, 1.0), FLAT], ids=["normal", "improper"]
)
def test_enumeration_of_a_continuous_support(base):
    with pytest.raises(
        ValueError,
        match=r"site 'x' has support .*cannot be enumerated.*method='bracket'",
    ):
        ebm.log_normalizer(
            None, ebm.EnergyDistribution(lambda v: 0.1 * v, base), method="enumeration"
        )


@pytest.mark.parametrize("num_elements", [23, 2_000])
def test_enumeration_of_too_many_states(num_elements):
    base = dist.Bernoulli(0.5).expand([num_elements]).to_event(1)
    distribution = ebm.EnergyDistribution(lambda v: v.sum(-1), base)
    with pytest.raises(
        ValueError, match=rf"site 'x' has 2\^{num_elements} states.*4,194,304"
    ):
        ebm.log_normalizer(None, distribution, method="enumeration")


def test_quadrature_over_a_start_that_leaves_out_part_of_the_base():
    """Coordinates of a half-normal would integrate half of e^{−v²/2} and call it Z."""
    narrow = ebm.EnergyDistribution(
        lambda v: 0.5 * v**2, FLAT, start=dist.HalfNormal(1.0)
    )
    with pytest.raises(
        ValueError,
        match=r"start of the energy at site 'x'.* leaves out part of the base's",
    ):
        ebm.log_normalizer(None, narrow, method="quadrature")


def test_a_bare_distribution_takes_no_parameters():
    with pytest.raises(
        ValueError, match="bare EnergyDistribution holds its parameters"
    ):
        ebm.log_normalizer(None, gaussian_case()[0], {"rate": 1.0}, method="quadrature")
