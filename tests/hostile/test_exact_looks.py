"""Exact methods look where the mass is: wells beside data, slopes, rounding, poles, and
every finite support."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from numpyro.infer.util import log_density
from scipy.special import gammaln, i0, logsumexp
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.energy.rounding import normalization_error
from ebm_ppl.exact.enumeration import enumeration
from ebm_ppl.exact.quadrature import quadrature
from ebm_ppl.exact.verdict import MAX_WITHOUT_SLOPE

NORMAL = dist.Normal(0.0, 1.0)
FLAT = dist.ImproperUniform(constraints.real, (), ())
PLANE = dist.ImproperUniform(constraints.real_vector, (), (2,))


def standard(num_dims):
    return dist.Normal(0.0, 1.0).expand([num_dims]).to_event(1)


def spiked(loc, scale, mass=1.0):
    """Base plus ``mass`` of a narrow Gaussian, log Z = log(1 + mass), and data half of
    which lie in it."""
    loc = jnp.asarray(loc)
    base = standard(len(loc))

    def energy(v, mass=mass):
        spike = (
            -0.5 * ((v - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)
        ).sum(-1)
        return base.log_prob(v) - jnp.logaddexp(base.log_prob(v), jnp.log(mass) + spike)

    draws = np.random.default_rng(0).normal(size=(40, len(loc))).astype(np.float32)
    draws[::2] = np.asarray(loc) + scale * draws[::2]
    return base, energy, draws


def with_data(base, energy, draws):
    def model():
        mass = numpyro.param("mass", 1.0)
        with numpyro.plate("rows", len(draws)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: energy(v, mass), base), obs=draws
            )

    return model


# Data show where the grid is too coarse


@pytest.mark.parametrize(
    ("loc", "scale"), [([3.02], 1e-3), ([-1.37], 1e-4), ([3.05, 2.95], 1e-2)]
)
def test_a_well_between_the_nodes_that_holds_data(loc, scale):
    base, energy, draws = spiked(loc, scale)
    params = {"mass": jnp.array(1.0)}
    log_z = ebm.log_normalizer(
        None, with_data(base, energy, draws), params, method="quadrature"
    )
    assert log_z.is_certified
    error = abs(float(log_z.estimate["x"]) - np.log(2.0))
    assert error < max(2e-5, 4 * float(log_z.stderr["x"]))


def test_nothing_but_the_data_points_to_that_well():
    """Neither values nor slopes of the lattice know of it: the tests above and below
    rest on the rows alone."""
    base, energy, _ = spiked([3.02], 1e-3)
    blind, flags = quadrature(ebm.EnergyDistribution(energy, base))
    assert flags == ()
    assert float(blind) == pytest.approx(0.0, abs=1e-5)


def test_a_well_whose_skirt_reaches_the_nodes():
    """No data: what the lattice sees of it at its foot is enough to split down to
    it."""
    base, energy, _ = spiked([3.05, 2.95], 1e-2)
    log_z, flags = quadrature(ebm.EnergyDistribution(energy, base))
    assert flags == ()
    assert float(log_z) == pytest.approx(np.log(2.0), abs=2e-4)


def test_the_same_inside_a_model_and_over_draws():
    """Value log(1 + m) and derivative 1/(1 + m), found by compiled code from the
    observed rows."""
    base, energy, draws = spiked([3.02], 1e-3)
    model = with_data(base, energy, draws)
    mass = jnp.array([0.5, 2.0])
    log_z = ebm.log_normalizer(
        None, model, {"mass": mass}, method="quadrature", batch_ndims=1
    )
    np.testing.assert_allclose(log_z.estimate["x"], np.log1p(mass), atol=1e-4)

    def log_joint(mass):
        return log_density(ebm.normalized(model), (), {}, {"mass": mass})[0]

    value, slope = jax.jit(jax.value_and_grad(log_joint))(2.0)
    scaled = (np.asarray(draws, float)[:, 0] - 3.02) / 1e-3
    spike = 2 * norm.pdf(scaled) / 1e-3
    exact = np.log((norm.pdf(draws[:, 0]) + spike) / 3).sum()
    assert float(value) == pytest.approx(exact, abs=40 * 3e-4)
    share = spike / 2 / (norm.pdf(draws[:, 0]) + spike)
    assert float(slope) == pytest.approx((share - 1 / 3).sum(), abs=0.02)


def test_rows_of_one_batch_element_do_not_hide_anothers():
    locs = jnp.array([1.234, -2.5, 0.777])

    def energy(v):
        return -jnp.log1p(jnp.exp(-0.5 * ((v - locs) / 1e-3) ** 2 + 0.5 * v**2) / 1e-3)

    distribution = ebm.EnergyDistribution(energy, dist.Normal(jnp.zeros(3), 1.0))
    rows = jnp.asarray(
        np.array([[1.234, 0.0, 0.7772], [0.0, -2.5001, 0.0]]), jnp.float32
    )
    log_z, flags = quadrature(distribution, rows=rows)
    assert flags == ()
    np.testing.assert_allclose(log_z, np.log(2.0), atol=3e-4)


def test_rows_beyond_the_grid():
    """A well of data 10⁵ base scales away is not left out in silence."""
    energy = lambda v: -jnp.logaddexp(-0.5 * v**2, -0.5 * (v - 1e5) ** 2)  # noqa: E731
    distribution = ebm.EnergyDistribution(energy, FLAT, start=NORMAL)
    assert (
        "beyond the ends" in quadrature(distribution, rows=jnp.array([0.0, 1e5]))[1][0]
    )


# So do slopes and series


RESOLVED = {
    "kink": (
        lambda: ebm.EnergyDistribution(
            lambda v: 3 * jnp.abs(v - 0.3), FLAT, start=NORMAL
        ),
        np.log(2 / 3),
    ),
    "narrow": (
        lambda: ebm.EnergyDistribution(lambda v: 5e5 * (v - 0.3) ** 2, NORMAL),
        norm.logpdf(0.3, scale=np.sqrt(1 + 1e-6)) + 0.5 * np.log(2 * np.pi * 1e-6),
    ),
    "far": (
        lambda: ebm.EnergyDistribution(
            lambda v: 0.5 * (v - 50) ** 2, FLAT, start=NORMAL
        ),
        0.5 * np.log(2 * np.pi),
    ),
    "hard edge": (
        lambda: ebm.EnergyDistribution(
            lambda v: jnp.where(v > 0.2, 0.0, jnp.inf), NORMAL
        ),
        norm.logsf(0.2),
    ),
    "semicircle": (
        lambda: ebm.EnergyDistribution(
            lambda v: jnp.where(
                v**2 < 1, -0.5 * jnp.log(jnp.where(v**2 < 1, 1 - v**2, 1.0)), jnp.inf
            ),
            FLAT,
        ),
        np.log(np.pi / 2),
    ),
    "pole in the middle": (
        lambda: ebm.EnergyDistribution(
            lambda v: 0.5 * jnp.log(jnp.abs(v)) + 0.5 * v**2, FLAT, start=NORMAL
        ),
        gammaln(0.25) + 0.25 * np.log(2.0),
    ),
    "circle": (
        lambda: ebm.EnergyDistribution(
            lambda v: -4 * jnp.cos(v), dist.Uniform(-np.pi, np.pi)
        ),
        np.log(np.i0(4)),
    ),
    "thin ridge": (
        lambda: ebm.EnergyDistribution(
            lambda v: (
                0.25 * (v[..., 0] + v[..., 1]) ** 2 / 1.99
                + 0.25 * (v[..., 0] - v[..., 1]) ** 2 / 0.01
            ),
            PLANE,
            start=standard(2),
        ),
        np.log(2 * np.pi) + 0.5 * np.log(1 - 0.99**2),
    ),
    "no derivative": (
        lambda: ebm.EnergyDistribution(
            lambda v: jax.pure_callback(
                lambda a: np.asarray(a) ** 2, jax.ShapeDtypeStruct(v.shape, v.dtype), v
            ),
            NORMAL,
        ),
        -0.5 * np.log(3.0),
    ),
}


@pytest.mark.parametrize("case", RESOLVED)
def test_cells_are_split_until_they_resolve_it(case):
    build, exact = RESOLVED[case]
    log_z = ebm.log_normalizer(None, build(), method="quadrature")
    assert log_z.is_certified, log_z
    assert abs(float(log_z.estimate["x"]) - exact) < max(
        2e-5, 4 * float(log_z.stderr["x"])
    )


def test_slopes_that_contradict_the_values():
    """Values on one curve, slopes of another: something was not resolved, or the
    derivative is not the energy's."""
    energy = lambda v: jax.lax.stop_gradient(v**2)  # noqa: E731
    assert "half the points" in quadrature(ebm.EnergyDistribution(energy, NORMAL))[1][0]


# Poles


POLES = {
    "1/x": lambda: ebm.EnergyDistribution(
        jnp.log,
        dist.ImproperUniform(constraints.positive, (), ()),
        start=dist.LogNormal(0, 1),
    ),
    "x^-1.05 e^-x": lambda: ebm.EnergyDistribution(
        lambda x: 1.05 * jnp.log(x), dist.Gamma(1.0, 1.0)
    ),
    "1/(1 - x)": lambda: ebm.EnergyDistribution(
        lambda x: jnp.log1p(-x), dist.Uniform(0.0, 1.0)
    ),
    "1/|x|": lambda: ebm.EnergyDistribution(lambda x: jnp.log(jnp.abs(x)), NORMAL),
    "1/|x - 1|": lambda: ebm.EnergyDistribution(
        lambda x: jnp.log(jnp.abs(x - 1)), NORMAL
    ),
    "a corner of the simplex": lambda: ebm.EnergyDistribution(
        lambda v: jnp.log(v[..., 0]), dist.Dirichlet(jnp.ones(2))
    ),
    "beyond float32": lambda: ebm.EnergyDistribution(
        lambda x: 0.99 * jnp.log(x), dist.Gamma(1.0, 1.0)
    ),
}


@pytest.mark.parametrize("case", POLES)
def test_a_pole_with_mass_under_the_number_format(case):
    log_z = ebm.log_normalizer(None, POLES[case](), method="quadrature")
    with pytest.raises(ebm.UncertifiedNormalizerError, match="site 'x'"):
        log_z.require_certified()


# Rounding


@pytest.mark.parametrize("offset", [3e4, 3e5, 1e6, 3e6, -1e7])
def test_an_offset_that_float32_cannot_hold(offset):
    distribution = ebm.EnergyDistribution(lambda v: 0.5 * v**2 + offset, NORMAL)
    log_z = ebm.log_normalizer(None, distribution, method="quadrature")
    assert abs(float(log_z.estimate["x"]) + offset + 0.5 * np.log(2.0)) < 4 * float(
        log_z.stderr["x"]
    )
    with pytest.raises(
        ebm.UncertifiedNormalizerError,
        match=r"site 'x': float32 rounds.*subtract a constant",
    ):
        log_z.require_certified()
    assert np.isnan(jax.jit(lambda: quadrature(distribution)[0])())


def test_an_offset_that_double_precision_holds():
    with jax.enable_x64(True):
        log_z, flags = quadrature(
            ebm.EnergyDistribution(lambda v: 0.5 * v**2 + 1e6, NORMAL)
        )
        assert flags == ()
        assert float(log_z) + 1e6 == pytest.approx(-0.5 * np.log(2.0), abs=1e-6)


def test_a_small_offset_has_a_stated_error():
    log_z = ebm.log_normalizer(
        None,
        ebm.EnergyDistribution(lambda v: 0.5 * v**2 + 1e3, NORMAL),
        method="quadrature",
    )
    assert log_z.is_certified
    assert 0 < float(log_z.stderr["x"]) < 1e-3
    assert float(log_z.lower["x"]) < -1e3 - 0.5 * np.log(2.0) < float(log_z.upper["x"])


def test_offsets_of_a_sum():
    base = dist.Bernoulli(0.5).expand([4]).to_event(1)
    log_z = ebm.log_normalizer(
        None,
        ebm.EnergyDistribution(lambda v: v.sum(-1) + 1e6, base),
        method="enumeration",
    )
    assert "float32 rounds" in log_z.flags["x"][0]
    assert abs(
        float(log_z.estimate["x"]) + 1e6 - 4 * np.log(0.5 + 0.5 * np.exp(-1))
    ) < 4 * float(log_z.stderr["x"])


def test_a_sum_of_a_million_states():
    base = dist.Bernoulli(0.5).expand([20]).to_event(1)
    log_z, flags = enumeration(ebm.EnergyDistribution(lambda v: 0.7 * v.sum(-1), base))
    assert flags == ()
    assert float(log_z) == pytest.approx(
        20 * np.log(0.5 + 0.5 * np.exp(-0.7)), abs=1e-5
    )


# Finite supports, whatever they are called


def spins():
    coins = dist.Bernoulli(0.5).expand([4])
    base = dist.TransformedDistribution(
        coins, dist.transforms.AffineTransform(-1.0, 2.0)
    ).to_event(1)
    energy = lambda v: -0.3 * (v[..., 1:] * v[..., :-1]).sum(-1)  # noqa: E731
    return ebm.EnergyDistribution(energy, base), 3 * np.log(np.cosh(0.3))


def powers_of_two():
    """A bijection whose Jacobian is not constant: a mass function has none."""
    base = dist.TransformedDistribution(
        dist.Categorical(jnp.array([0.5, 0.3, 0.2])), dist.transforms.ExpTransform()
    )
    exact = np.log(
        0.5 * np.exp(-0.1) + 0.3 * np.exp(-0.1 * np.e) + 0.2 * np.exp(-0.1 * np.e**2)
    )
    return ebm.EnergyDistribution(lambda v: 0.1 * v, base), exact


def multinomial():
    base = dist.Multinomial(3, jnp.array([0.2, 0.3, 0.5]))
    return ebm.EnergyDistribution(lambda v: 0.3 * v[..., 0], base), 3 * np.log(
        0.2 * np.exp(-0.3) + 0.8
    )


def unequal_counts():
    counts = np.array([2, 5])
    base = dist.Binomial(jnp.asarray(counts), 0.3)
    return ebm.EnergyDistribution(lambda v: 0.4 * v, base), counts * np.log(
        0.7 + 0.3 * np.exp(-0.4)
    )


def unequal_bounds():
    base = dist.DiscreteUniform(jnp.array([0, 2]), jnp.array([3, 4])).to_event(1)
    exact = (
        logsumexp(-0.5 * np.arange(4))
        - np.log(4)
        + logsumexp(-0.5 * np.arange(2, 5))
        - np.log(3)
    )
    return ebm.EnergyDistribution(lambda v: 0.5 * v.sum(-1), base), exact


def dirichlet_multinomial():
    """Uniform over the six compositions of two, since all concentrations are 1."""
    base = dist.DirichletMultinomial(jnp.ones(3), 2)
    every = np.array([s for s in itertools.product(range(3), repeat=3) if sum(s) == 2])
    return ebm.EnergyDistribution(lambda v: v[..., 0] * 0.7, base), logsumexp(
        -0.7 * every[:, 0]
    ) - np.log(6)


FINITE = (
    spins,
    powers_of_two,
    multinomial,
    unequal_counts,
    unequal_bounds,
    dirichlet_multinomial,
)


@pytest.mark.parametrize("case", FINITE, ids=lambda case: case.__name__)
def test_every_finite_support_is_summed(case):
    distribution, exact = case()
    log_z = ebm.log_normalizer(None, distribution, method="enumeration")
    assert log_z.is_certified
    np.testing.assert_allclose(log_z.estimate["x"], exact, atol=1e-5)


def test_masses_of_renamed_states_add_to_one():
    distribution, _ = spins()
    log_z = ebm.log_normalizer(None, distribution, method="enumeration")
    known = distribution.with_log_normalizer(log_z.estimate["x"])
    states = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    assert float(jnp.exp(known.log_prob(states)).sum()) == pytest.approx(1.0, abs=1e-5)
    assert distribution.support.is_discrete
    np.testing.assert_array_equal(
        distribution.support(jnp.array([[-1.0, 1, 1, 1], [0.0, 1, 1, 1]])),
        [True, False],
    )
    assert set(np.unique(distribution.base.sample(jax.random.key(0), (64,)))) == {
        -1.0,
        1.0,
    }


# One message where no method serves


ENDLESS = {
    "poisson": dist.Poisson(3.0),
    "geometric": dist.GeometricProbs(0.3),
    "shifted poisson": dist.TransformedDistribution(
        dist.Poisson(3.0), dist.transforms.AffineTransform(1.0, 2.0)
    ),
}


@pytest.mark.parametrize("base", ENDLESS)
@pytest.mark.parametrize(
    "method", ["enumeration", "bracket", "forward", "reverse", "quadrature"]
)
def test_a_support_without_an_end(base, method):
    distribution = ebm.EnergyDistribution(lambda v: 0.3 * v, ENDLESS[base])
    with pytest.raises(
        ValueError,
        match=r"site 'x' has a discrete support .*not finite.*log_normalizer=",
    ) as caught:
        ebm.log_normalizer(
            jax.random.key(0), distribution, method=method, progress_bar=False
        )
    assert "bracket" not in str(caught.value)


def test_what_the_message_proposes_works():
    base = dist.Categorical(logits=dist.Poisson(3.0).log_prob(np.arange(100)))
    log_z, flags = enumeration(ebm.EnergyDistribution(lambda v: 0.3 * v, base))
    assert flags == ()
    assert float(log_z) == pytest.approx(3 * np.expm1(-0.3), abs=1e-5)


@pytest.mark.parametrize("method", ["bracket", "quadrature"])
def test_a_finite_support_is_sent_to_its_sum(method):
    with pytest.raises(
        ValueError, match=r"site 'x' has a discrete support.*method='enumeration'"
    ):
        ebm.log_normalizer(
            jax.random.key(0), spins()[0], method=method, progress_bar=False
        )


def test_too_many_states_are_sent_nowhere():
    base = dist.Bernoulli(0.5).expand([30]).to_event(1)
    distribution = ebm.EnergyDistribution(lambda v: v.sum(-1), base)
    for method in ("bracket", "enumeration"):
        with pytest.raises(
            ValueError, match=r"site 'x' has 2\^30 states.*log_normalizer="
        ):
            ebm.log_normalizer(
                jax.random.key(0), distribution, method=method, progress_bar=False
            )


# Inside a model no reason can be given, so that little may be refused there


def test_a_thin_ridge_inside_a_model():
    """½ λ (x − y)² on the plane: log Z = −½ log(1 + 2λ), far from where a sampler would
    start."""

    def log_z(rate):
        energy = lambda v: 0.5 * rate * (v[..., 0] - v[..., 1]) ** 2  # noqa: E731
        return quadrature(ebm.EnergyDistribution(energy, standard(2)))[0]

    traced = jax.jit(jax.value_and_grad(log_z))
    for rate in (1.0, 50.0, 400.0, 900.0):
        value, slope = traced(rate)
        assert value == pytest.approx(-0.5 * np.log1p(2 * rate), abs=1e-4)
        assert slope == pytest.approx(-1 / (1 + 2 * rate), rel=1e-3)


def test_fast_waves_inside_a_model():
    """E = 2 cos(ωx) for fast ω: log Z is log I₀(2), whatever ω."""
    traced = jax.jit(
        lambda w: quadrature(
            ebm.EnergyDistribution(lambda v: 2 * jnp.cos(w * v), NORMAL)
        )[0]
    )
    for frequency in (10.0, 35.0, 50.0):
        assert traced(frequency) == pytest.approx(np.log(i0(2.0)), abs=1e-4)


def test_a_jump_that_moves_has_no_derivative():
    """log Z of a step at c falls smoothly with c; autodiff, which sees no edge, would
    say that it does not."""

    def log_z(c):
        return quadrature(
            ebm.EnergyDistribution(lambda v: jnp.where(v > c, 2.0, 0.0), NORMAL)
        )[0]

    exact = np.log(norm.cdf(0.3) + np.exp(-2.0) * norm.sf(0.3))
    assert jax.jit(log_z)(0.3) == pytest.approx(exact, abs=1e-4)
    assert np.isnan(jax.jit(jax.grad(log_z))(0.3))


def test_a_kink_that_moves_has_one():
    def log_z(c):
        return quadrature(
            ebm.EnergyDistribution(lambda v: 2.0 * jnp.abs(v - c), NORMAL)
        )[0]

    def exact(c):
        return 2 + np.logaddexp(2 * c + norm.logsf(c + 2), norm.logcdf(c - 2) - 2 * c)

    value, slope = jax.jit(jax.value_and_grad(log_z))(0.3)
    assert value == pytest.approx(exact(0.3), abs=1e-4)
    # Of the cell with the kink half has the wrong slope: at most the share that may
    # have none.
    assert slope == pytest.approx(
        (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5, abs=MAX_WITHOUT_SLOPE
    )


def test_a_masked_base_is_no_density():
    """Its draws are those of the distribution inside, its density is 1: walkers need a
    start."""
    site = ebm.EnergyDistribution(lambda v: 2.0 * v**2, NORMAL.mask(False))
    with pytest.raises(
        ebm.UnknownNormalizerError, match=r"base of the energy.* is improper.*start="
    ):
        ebm.log_normalizer(jax.random.key(0), site, progress_bar=False)


def test_a_support_without_coordinates_is_named():
    site = ebm.EnergyDistribution(
        lambda v: v.sum(-1), dist.ProjectedNormal(jnp.ones(3))
    )
    with pytest.raises(
        NotImplementedError, match=r"A ProjectedNormal has support .*no coordinates"
    ):
        ebm.log_normalizer(jax.random.key(0), site, progress_bar=False)


# Draws of the base


def comb(waves, width, depth=5.0):
    """Wells at every (n + ½)/waves, and log of the mean of exp(−E) over one of them."""
    phase = (np.arange(1_000_000) + 0.5) / 1_000_000 - 0.5
    well = depth * np.exp(-0.5 * (phase / width) ** 2)

    def energy(v):
        return -depth * jnp.exp(-0.5 * (((v * waves) % 1 - 0.5) / width) ** 2)

    return energy, float(np.log(np.mean(np.exp(well))))


@pytest.mark.parametrize(
    ("waves", "width"), [(11.3, 0.003), (30.1, 0.01), (400, 0.001)]
)
def test_wells_that_draws_of_the_base_hit_are_not_overlooked(waves, width):
    """None was: −1, 0 and 0 for 0.43, 1.03 and 0.17, with an error of 1e-4 or none."""
    energy, truth = comb(waves, width)
    log_z, flags = quadrature(ebm.EnergyDistribution(energy, dist.Normal(0.0, 1.0)))
    assert flags
    assert abs(float(log_z) - truth) > 1e-3

    inside = jax.jit(
        lambda shift: quadrature(
            ebm.EnergyDistribution(lambda v: energy(v) + shift, dist.Normal(0.0, 1.0))
        )[0]
    )
    assert np.isnan(inside(0.0))


@pytest.mark.parametrize(("at", "width"), [(0.51, 0.003), (1.234, 0.01)])
def test_a_slab_that_draws_of_the_base_hit_is_resolved(at, width):
    """Two to four of a thousand draws lie in it."""
    energy = lambda v: jnp.where(jnp.abs(v - at) < width, -5.0, 0.0)  # noqa: E731
    share = norm.cdf(at + width) - norm.cdf(at - width)
    log_z, flags = quadrature(ebm.EnergyDistribution(energy, dist.Normal(0.0, 1.0)))
    assert flags == ()
    assert float(log_z) == pytest.approx(np.log1p(share * np.expm1(5.0)), abs=1e-4)


def test_a_folded_base_has_coordinates():
    base = dist.FoldedDistribution(dist.Normal(1.0, 1.0))
    log_z, flags = quadrature(ebm.EnergyDistribution(lambda v: 0.0 * v, base))
    assert flags == ()
    assert float(log_z) == pytest.approx(0.0, abs=1e-5)


# Bases whose constants single precision loses

LOST = {
    "between far bounds": dist.TruncatedNormal(0.0, 1.0, low=5.2, high=5.3),
    "a sharp gamma": dist.Gamma(1e5, 1e5),
}


@pytest.mark.parametrize("base", LOST)
def test_a_density_that_is_not_normalised_is_flagged(base):
    assert abs(normalization_error(LOST[base])) > 0.02
    energy = ebm.EnergyDistribution(lambda v: jnp.tanh(v - 5), LOST[base])
    for method in ("quadrature", "bracket"):
        log_z = ebm.log_normalizer(
            random.key(0), energy, method=method, num_walkers=16, progress_bar=False
        )
        assert any("integrates to exp(±" in flag for flag in log_z.flags["x"])


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(0.0, 1.0),
        dist.Normal(jnp.zeros(784), 0.1).to_event(1),
        dist.MultivariateNormal(jnp.zeros(20), 2 * jnp.eye(20)),
        dist.Gamma(jnp.array([0.5, 30.0]), 3.0),
        dist.Dirichlet(jnp.ones(5)),
        dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=2.0),
        dist.ImproperUniform(dist.constraints.real, (), ()),
    ],
)
def test_usual_densities_are_normalised(base):
    error = normalization_error(base)
    assert error.shape == base.batch_shape
    assert np.all(np.abs(error) < 1e-4)
