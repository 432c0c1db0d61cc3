"""Plots: what is drawn is the data, errors can be acted on, and nothing is left
open."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from matplotlib.contour import QuadContourSet

import ebm_ppl as ebm
from ebm_ppl.export.plots import plot_energies
from ebm_ppl.export.surface import plot_energy_surface
from ebm_ppl.export.training_panels import plot_training

RNG = np.random.default_rng(0)
FRESH = RNG.bit_generator.state
STEPS = 7
LINE = dist.Normal(0, 1)
PLANE = dist.Normal(0, 1).expand([2]).to_event(1)


@pytest.fixture(autouse=True)
def every_test_has_the_same_numbers():
    """Whichever tests ran before it on this worker."""
    RNG.bit_generator.state = FRESH


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    """Every figure must also render without a warning."""
    plt.close("all")  # what a test of another module left
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def history(*sites, batch_shape=()):
    def entry(low, high):
        return {name: RNG.uniform(low, high, (STEPS, *batch_shape)) for name in sites}

    return {
        "loss": RNG.normal(size=STEPS),
        "ess": entry(0, 1),
        "ess_holdout": entry(0, 1),
        "log_normalizer": entry(-3, 3),
        "log_normalizer_stderr": entry(0.1, 0.5),
        "log_normalizer_training": entry(-3, 3),
        "update_scale": RNG.uniform(0.5, 1.0, STEPS),
        "resampled": entry(0, 4),
        "grad_norm": RNG.normal(size=STEPS),
    }


def lines(ax):
    """Plotted y values by label."""
    for line in ax.lines:
        np.testing.assert_array_equal(line.get_xdata(), np.arange(STEPS))
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def band(ax):
    """Lower and upper edge of the one band, by step."""
    (collection,) = ax.collections
    x, y = collection.get_paths()[0].vertices.T
    edges = [(y[x == step].min(), y[x == step].max()) for step in range(STEPS)]
    return np.array(edges).T


# Training


def test_training_panels_show_the_history():
    given = history("x")
    axes = plot_training(given)
    assert [ax.get_ylabel() for ax in axes] == [
        "loss [nats]",
        "ESS / walkers",
        "log Z [nats]",
        "update scale",
    ]
    loss, ess, log_z, scale = axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), given["loss"])
    assert set(lines(ess)) == {"training islands", "held-out islands"}
    np.testing.assert_array_equal(lines(ess)["training islands"], given["ess"]["x"])
    np.testing.assert_array_equal(
        lines(ess)["held-out islands"], given["ess_holdout"]["x"]
    )
    assert ess.get_ylim() == (0, 1)
    held_out, biased = (
        lines(log_z)["held-out islands ± 1 standard error"],
        lines(log_z)["training islands (biased)"],
    )
    np.testing.assert_array_equal(held_out, given["log_normalizer"]["x"])
    np.testing.assert_array_equal(biased, given["log_normalizer_training"]["x"])
    stderr = given["log_normalizer_stderr"]["x"]
    np.testing.assert_allclose(band(log_z), [held_out - stderr, held_out + stderr])
    np.testing.assert_array_equal(scale.lines[0].get_ydata(), given["update_scale"])


def test_training_panels_are_stacked_on_one_step_axis():
    axes = plot_training(history("x"))
    assert [ax.get_xlabel() for ax in axes] == ["", "", "", "step"]
    axes[0].set_xlim(2, 3)
    assert axes[3].get_xlim() == (2, 3)
    tops = [ax.get_position().y1 for ax in axes]
    assert tops == sorted(tops, reverse=True)
    assert len({ax.get_position().x0 for ax in axes}) == 1
    assert (
        axes[0].figure.get_layout_engine().__class__.__name__
        == "ConstrainedLayoutEngine"
    )
    assert plt.get_fignums() == [axes[0].figure.number]


def test_training_of_a_real_fit():
    """The backend's keys are those that are drawn, and a Fit stands for its history."""

    def model(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: -a * v, dist.Normal(0, 1)), obs=x
            )

    backend = ebm.Jarzynski(model, optax.sgd(0.01), num_chains=6, num_walkers=10)
    fit = backend.run(random.key(0), STEPS, jnp.ones(3), progress_bar=False)
    axes = plot_training(fit)
    assert [len(ax.lines) for ax in axes] == [1, 2, 2, 1]
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), fit.history["loss"])
    assert band(axes[2]).shape == (2, STEPS)


@pytest.mark.parametrize(
    ("low", "scale"), [(0.2, "linear"), (0.05, "log"), (0.0, "linear")]
)
def test_update_scale_is_logarithmic_over_more_than_a_decade(low, scale):
    """A scale of zero has no logarithm: the decade is that of the others."""
    given = {"update_scale": np.array([1.0, low, 0.5])}
    (ax,) = plot_training(given)
    assert ax.get_yscale() == scale


def test_training_of_one_site_of_several():
    given = history("u", "deep/v")
    _, ess, log_z, _ = plot_training(given, site="deep/v")
    np.testing.assert_array_equal(
        lines(ess)["training islands"], given["ess"]["deep/v"]
    )
    np.testing.assert_array_equal(
        lines(log_z)["training islands (biased)"],
        given["log_normalizer_training"]["deep/v"],
    )


def test_training_needs_a_site_where_there_are_several():
    with pytest.raises(
        ValueError, match=r"energy sites \['u', 'deep/v'\]; name one of them: site='u'"
    ):
        plot_training(history("u", "deep/v"))
    with pytest.raises(
        ValueError,
        match=r"site = 'w' is not among the history's energy sites \['u', 'deep/v'\]",
    ):
        plot_training(history("u", "deep/v"), site="w")
    assert not plt.get_fignums()


def test_training_with_a_batch_shape_shows_the_worst_ess_and_the_mean_log_normalizer():
    given = history("x", batch_shape=(3, 2))
    _, ess, log_z, _ = plot_training(given)
    np.testing.assert_array_equal(
        lines(ess)["training islands"], given["ess"]["x"].min((1, 2))
    )
    np.testing.assert_array_equal(
        lines(ess)["held-out islands"], given["ess_holdout"]["x"].min((1, 2))
    )
    mean, stderr = (
        given["log_normalizer"]["x"].mean((1, 2)),
        given["log_normalizer_stderr"]["x"].mean((1, 2)),
    )
    np.testing.assert_allclose(
        lines(log_z)["held-out islands ± 1 standard error"], mean
    )
    np.testing.assert_allclose(band(log_z), [mean - stderr, mean + stderr])
    biased = given["log_normalizer_training"]["x"].mean((1, 2))
    np.testing.assert_allclose(lines(log_z)["training islands (biased)"], biased)


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["loss"], ["loss [nats]"]),
        (["loss", "ess"], ["loss [nats]", "ESS / draws"]),
        (["log_normalizer"], ["log Z [nats]"]),
        (["ess_holdout", "update_scale"], ["ESS / walkers", "update scale"]),
    ],
)
def test_keys_that_another_backend_lacks_are_skipped(keys, labels):
    full = history("x")
    axes = plot_training({key: full[key] for key in keys})
    assert isinstance(axes, np.ndarray)
    assert [ax.get_ylabel() for ax in axes] == labels
    assert sum(len(ax.lines) for ax in axes) == len(keys)
    assert not any(ax.collections for ax in axes)


def test_densities_of_looks_are_drawn_where_they_were_seen():
    looks = np.where(np.arange(STEPS) % 3 == 2, np.arange(STEPS) / 10, np.nan)
    shown = {"loss": RNG.normal(size=STEPS), "density_validation": looks}
    shown |= {"density_training": looks + 1, "ess": {"x": np.full(STEPS, 0.5)}}
    _, panel, effective = plot_training(shown)
    training, validation = panel.get_lines()
    for line, offset in ((training, 1.0), (validation, 0.0)):
        np.testing.assert_allclose(line.get_xdata(), [2, 5])
        np.testing.assert_allclose(line.get_ydata(), np.array([0.2, 0.5]) + offset)
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["training rows", "validation rows"]
    # Draws of the base are on no islands.
    assert effective.get_ylabel() == "ESS / draws"
    assert effective.get_legend() is None


def test_a_history_without_anything_to_draw():
    for nothing in ({}, {"loss": np.zeros(0)}, {"ess": {}}, {"grad_norm": np.ones(3)}):
        with pytest.raises(
            ValueError,
            match=r"nothing to draw: expected .* any of \['loss', 'density_validation', "
            r"'monitor', 'ess'",
        ):
            plot_training(nothing)
    assert not plt.get_fignums()


def test_training_on_given_axes():
    figure, axes = plt.subplots(2, 2)
    drawn = plot_training(history("x"), axes=axes)
    assert list(drawn) == list(axes.ravel())
    assert all(ax.lines and ax.get_xlabel() == "step" for ax in axes.ravel())
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(
        ValueError,
        match=r"axes holds 4 Axes, but this history has data for 1 panels; give plt\.subpl",
    ):
        plot_training({"loss": np.ones(STEPS)}, axes=axes)


# Energies


SQUARE = ebm.EnergyDistribution(lambda v: (v**2).sum(-1), PLANE)


def heights(ax):
    """Histograms by label, and their shared edges."""
    edges = {tuple(patch.get_x() for patch in bars) for bars in ax.containers}
    assert len(edges) == 1
    widths = np.array([patch.get_width() for patch in ax.containers[0]])
    found = {
        bars[0].get_label(): np.array([patch.get_height() for patch in bars])
        for bars in ax.containers
    }
    return found, np.append(np.array(*edges), ax.containers[0][-1].get_x() + widths[-1])


def test_energies_are_two_densities_on_shared_bins():
    values, draws = RNG.normal(size=(30, 2)), RNG.normal(1.0, 2.0, size=(4, 50, 2))
    ax = plot_energies(SQUARE, values, draws, bins=20)
    found, edges = heights(ax)
    energies = {"data": (values**2).sum(-1), "model": (draws**2).sum(-1).ravel()}
    assert list(found) == list(energies)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(energies)
    both = np.concatenate(list(energies.values()))
    np.testing.assert_allclose(
        edges, np.linspace(both.min(), both.max(), 21), rtol=1e-5, atol=1e-5
    )
    # The outer edges are extremes in float32.
    edges = edges + 1e-6 * both.max() * np.linspace(-1, 1, 21)
    for label, energy in energies.items():
        expected, _ = np.histogram(energy, edges, density=True)
        np.testing.assert_allclose(found[label], expected, rtol=1e-3)
    assert ax.get_xlabel() == "energy E(x) [nats]"
    assert ax.get_ylabel() == "density [1/nats]"


def test_it_is_the_energy_without_the_base():
    ax = plot_energies(SQUARE, [[1.0, 1.0]], [[2.0, 0.0]], bins=[1.5, 2.5, 3.5, 4.5])
    found, _ = heights(ax)
    np.testing.assert_allclose(found["data"], [1, 0, 0])
    np.testing.assert_allclose(found["model"], [0, 0, 1])


def test_energies_that_are_not_finite_are_counted():
    values = np.array(
        [[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [1.0, 1.0], [1.0, 1.0]]
    )
    ax = plot_energies(
        SQUARE, values, [[0.0, 1.0]], bins=[0.5, 1.5, 2.5], labels=("photos", "net")
    )
    found, _ = heights(ax)
    np.testing.assert_allclose(
        found["photos (2 not finite)"], [1 / 3, 2 / 3], rtol=1e-6
    )
    np.testing.assert_allclose(found["net"], [1, 0])


def test_energies_of_a_site_in_a_plate():
    """What ``handlers.trace`` finds: the energy is inside NumPyro's wrappers."""
    ax = plot_energies(
        SQUARE.expand([5]).mask(True),
        np.zeros((3, 2)),
        np.ones((3, 2)),
        bins=[-1, 1, 3],
    )
    found, _ = heights(ax)
    np.testing.assert_allclose(found["data"], [0.5, 0])
    np.testing.assert_allclose(found["model"], [0, 0.5])


def test_energies_on_given_axes():
    figure, ax = plt.subplots()
    assert plot_energies(SQUARE, np.zeros((3, 2)), np.ones((3, 2)), ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_energies_refused():
    with pytest.raises(
        ValueError,
        match=r"None of the 2 energies of 'model' is finite.*check the parameters",
    ):
        plot_energies(SQUARE, np.zeros((3, 2)), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"has shape \(3, 5\); expected \(\.\.\., 2\)"):
        plot_energies(SQUARE, np.zeros((3, 5)), np.zeros((3, 2)))
    with pytest.raises(
        TypeError,
        match=r"is a Normal; expected an EnergyDistribution at fixed parameters",
    ):
        plot_energies(dist.Normal(0, 1), np.zeros(3), np.zeros(3))
    assert not plt.get_fignums()


# Surfaces


def on_line(energy=lambda v: 0.0 * v, base=LINE, **options):
    return ebm.EnergyDistribution(energy, base, **options)


def contours(ax):
    (found,) = [
        collection
        for collection in ax.collections
        if isinstance(collection, QuadContourSet)
    ]
    return found


def test_a_curve_over_one_dimension():
    """E = ½(v − 1)² on N(0, 1): U = ½(v − 1)² + ½v² + const, lowest at ½, so exp(−(U −
    min U)) = exp(−(v − ½)²)."""
    ax = plot_energy_surface(
        on_line(lambda v: 0.5 * (v - 1) ** 2), limits=(-1.5, 2.5), num_points=101
    )
    (curve,) = ax.lines
    x, y = curve.get_data()
    np.testing.assert_allclose(x, np.linspace(-1.5, 2.5, 101))
    np.testing.assert_allclose(y, np.exp(-((x - 0.5) ** 2)), atol=1e-4)
    assert ax.get_xlim() == (-1.5, 2.5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "exp(−(U(x) − min U))")


@pytest.mark.parametrize("validate_args", [True, False])
def test_a_curve_is_blank_outside_the_support(validate_args):
    """The energy is not even called there, and it may forbid points by itself: density
    zero, not blank."""

    def energy(v):
        assert (v >= 0).all()
        return jnp.where(v > 2, jnp.inf, 0.0)

    base = dist.HalfNormal(1.0, validate_args=validate_args)
    ax = plot_energy_surface(
        on_line(energy, base, validate_args=validate_args),
        limits=(-1, 3),
        num_points=80,
    )
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(np.isnan(y), x < 0)
    density = np.where(x > 2, 0, np.exp(-0.5 * x**2))[x >= 0]
    np.testing.assert_allclose(y[x >= 0], density / density.max(), rtol=1e-5)


def test_an_infinite_density_is_blank():
    """It would hide everything else."""
    ax = plot_energy_surface(
        on_line(lambda v: jnp.where(v == 1.0, -jnp.inf, 0.0)),
        limits=(0, 2),
        num_points=3,
    )
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), [1, np.nan, np.exp(-2)], rtol=1e-5
    )


@pytest.mark.parametrize("event_shape", [(), (1,)])
def test_samples_on_a_line_are_a_rug_and_set_the_limits(event_shape):
    base = dist.Normal(0, 1).expand(event_shape).to_event(len(event_shape))
    samples = RNG.uniform(2.0, 4.0, size=(3, 10, *event_shape))
    samples[0, 0], samples[0, 1], samples[0, 2] = 2.0, 4.0, np.nan
    energy = on_line(lambda v: v.reshape(len(v)), base)
    ax = plot_energy_surface(energy, samples=samples)
    curve, rug = ax.lines
    assert (rug.get_marker(), rug.get_linestyle()) == ("|", "None")
    np.testing.assert_array_equal(
        rug.get_xdata(), samples.ravel()[np.isfinite(samples.ravel())]
    )
    assert ax.get_xlim() == pytest.approx((1.8, 4.2))
    assert ax.get_ylim()[0] == 0
    assert curve.get_xdata()[[0, -1]] == pytest.approx((1.8, 4.2))


def test_samples_are_thinned_evenly_and_the_limits_are_those_of_all():
    samples = np.linspace(0, 10, 1001)
    samples[500] = 20.0
    _, rug = plot_energy_surface(on_line(), samples=samples, max_samples=101).lines
    expected = np.linspace(0, 10, 101)
    expected[50] = 20.0
    np.testing.assert_allclose(rug.get_xdata(), expected)
    ax = plot_energy_surface(on_line(), samples=samples, max_samples=11, limits=(-1, 2))
    assert len(ax.lines[1].get_xdata()) == 11
    assert ax.get_xlim() == (-1, 2)


def test_contours_over_two_dimensions():
    """U − min U = ½ (v − m)ᵀ diag(1, 4) (v − m) by construction: contours are ellipses
    about m."""
    mode, precision = np.array([1.0, -0.5]), np.array([1.0, 4.0])

    def energy(v):
        return 0.5 * (precision * (v - mode) ** 2).sum(-1) - 0.5 * (v**2).sum(-1)

    limits = [(-2.0, 6.0), (-3.5, 2.5)]
    ax = plot_energy_surface(
        ebm.EnergyDistribution(energy, PLANE), limits=limits, num_points=161
    )
    found = contours(ax)
    np.testing.assert_allclose(found.levels, np.linspace(0, 10, 21))
    for upper, path in list(zip(found.levels[1:], found.get_paths(), strict=True))[
        1::4
    ]:
        vertices = path.vertices
        inside = (
            np.abs(vertices - np.mean(limits, 1)) < 0.499 * np.diff(limits).T
        ).all(1)
        height = 0.5 * (precision * (vertices[inside] - mode) ** 2).sum(1)
        # Linear interpolation between points h apart: h² U″ / 8 in each dimension.
        error = np.minimum(np.abs(height - upper), np.abs(height - (upper - 0.5)))
        assert error.max() < (0.05**2 * 1 + 0.0375**2 * 4) / 8 + 1e-3
    # Clipped: the corners are filled, with the highest colour.
    corners = {tuple(vertex) for vertex in found.get_paths()[-1].vertices}
    assert {(x, y) for x in limits[0] for y in limits[1]} <= corners
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x[0]", "x[1]")
    _, colorbar = ax.figure.axes
    assert colorbar.get_ylabel() == "U(x) − min U [nats], clipped"


def test_contours_are_blank_outside_the_support():
    """Support: x₀ > 0 and x₁ > 0, on a grid that has no point between −1/20 and
    1/20."""
    base = dist.HalfNormal(1.0).expand([2]).to_event(1)
    energy = ebm.EnergyDistribution(lambda v: v[..., 0] - v[..., 1], base)
    ax = plot_energy_surface(energy, limits=(-1.05, 3.05), num_points=42)
    vertices = np.concatenate(
        [path.vertices for path in contours(ax).get_paths() if len(path.vertices)]
    )
    np.testing.assert_allclose(vertices.min(0), 0.05, atol=1e-6)
    np.testing.assert_allclose(vertices.max(0), 3.05, atol=1e-6)
    assert ax.get_xlim() == ax.get_ylim() == (-1.05, 3.05)


@pytest.mark.parametrize("event_shape", [(2,), (1, 2)])
def test_samples_in_a_plane_are_dots_and_set_the_limits(event_shape):
    samples = RNG.uniform([0.0, 10.0], [1.0, 30.0], size=(4, 300, 2))
    samples[0, :2] = [[0.0, 10.0], [1.0, 30.0]]
    base = dist.Normal(0, 10).expand(event_shape).to_event(len(event_shape))
    energy = ebm.EnergyDistribution(lambda v: 0.0 * v.reshape(len(v), 2).sum(-1), base)
    ax = plot_energy_surface(
        energy, samples=samples.reshape(4, 300, *event_shape), num_points=20
    )
    (dots,) = ax.lines
    assert (dots.get_marker(), dots.get_linestyle()) == ("o", "None")
    rows = samples.reshape(-1, 2)[np.linspace(0, 1199, 1000).astype(int)]
    np.testing.assert_array_equal(np.transpose(dots.get_data()), rows)
    assert ax.get_xlim() == pytest.approx((-0.1, 1.1))
    assert ax.get_ylim() == pytest.approx((8.0, 32.0))


def test_limits_without_samples_are_quantiles_of_the_start():
    """Of 2,000 uniform draws the 0.1% quantile lies at 0.001 ± 0.0007 of the range, so
    below 0.0045."""
    start = dist.Uniform(jnp.array([-2.0, 5.0]), jnp.array([-1.0, 9.0])).to_event(1)
    improper = dist.ImproperUniform(dist.constraints.real_vector, (), (2,))
    for energy in (
        ebm.EnergyDistribution(lambda v: v.sum(-1), start),
        ebm.EnergyDistribution(lambda v: v.sum(-1), improper, start=start),
    ):
        ax = plot_energy_surface(energy, num_points=20)
        for (low, high), (first, last) in zip(
            (ax.get_xlim(), ax.get_ylim()), ((-2, -1), (5, 9)), strict=True
        ):
            margin = 0.0045 * (last - first)
            assert first < low < first + margin
            assert last - margin < high < last


def test_the_quantiles_leave_out_a_thousandth_on_either_side():
    class Ramp(dist.Uniform):
        def sample(self, key, sample_shape=()):
            return jnp.linspace(0, 1, *sample_shape)

    ax = plot_energy_surface(on_line(base=Ramp()))
    assert ax.get_xlim() == pytest.approx((0.001, 0.999), abs=1e-6)


def test_samples_outside_given_limits_do_not_move_them():
    ax = plot_energy_surface(
        SQUARE,
        samples=[[9.0, 9.0], [0.0, 0.0]],
        limits=[(-1, 1), (-2, 2)],
        num_points=20,
    )
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 1), (-2, 2))


def test_surface_on_given_axes():
    figure, ax = plt.subplots()
    assert plot_energy_surface(on_line(), ax=ax) is ax
    assert plot_energy_surface(SQUARE, ax=ax, num_points=20) is ax
    assert contours(ax)
    assert plt.get_fignums() == [figure.number]


def refused(distribution, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        plot_energy_surface(distribution, **options)
    assert not plt.get_fignums()


def test_distributions_without_a_surface():
    batched = on_line(base=dist.Normal(jnp.zeros(3), 1))
    refused(batched, r"batch shape \(3,\), one surface per element; take one element")
    refused(
        batched.to_event(1),
        r"batch shape \(3,\), one surface per element; take one element",
    )
    large = ebm.EnergyDistribution(
        lambda v: v.sum((-1, -2)), dist.Normal(0, 1).expand([8, 8]).to_event(2)
    )
    refused(
        large,
        r"event shape \(8, 8\), which is 64 numbers; .* over one or two\. Compare .* "
        r"or hold all but two",
    )
    refused(
        on_line(base=dist.Poisson(3.0)),
        r"discrete support; a surface needs a continuous one\. Compare",
    )
    refused(
        dist.Normal(0, 1), r"is a Normal; expected an EnergyDistribution", TypeError
    )


def test_samples_and_limits_that_do_not_fit():
    refused(
        SQUARE,
        r"samples has shape \(4, 3\); expected \(\.\.\., \*event_shape\) with event "
        r"shape \(2,\)",
        samples=np.ones((4, 3)),
    )
    refused(SQUARE, r"samples has shape \(\); expected", samples=1.0)
    refused(
        SQUARE,
        r"samples, of shape \(1, 2\), holds no finite point",
        samples=[[np.nan, 1.0]],
    )
    for limits in ((1.0, 0.0), (0.0, np.inf), (0.0, 1.0, 2.0), [(0.0, 1.0)] * 3):
        refused(
            SQUARE,
            r"limits = .*; expected finite \(low, high\) with low < high, one pair or "
            r"2",
            limits=limits,
        )
    improper = on_line(base=dist.ImproperUniform(dist.constraints.real, (), ()))
    refused(
        improper,
        r"improper and has no start.*give limits=\[\(-3\.0, 3\.0\)\] or samples=",
    )


def test_a_surface_that_is_finite_nowhere():
    def energy(v):
        assert len(v)
        return 0.0 * v

    half = on_line(energy, dist.HalfNormal(1.0))
    refused(
        half,
        r"finite at none of 200 points within \[\[-2\.0, -1\.0\]\] \(0 of them in the "
        r"support\)",
        limits=(-2, -1),
    )
    nan = on_line(lambda v: v * jnp.nan)
    refused(
        nan,
        r"none of 200 points .* \(200 of them in the support\); give limits=.*check",
        limits=(-2, -1),
    )


def test_importing_plots_does_not_import_matplotlib():
    code = (
        "import sys, ebm_ppl.export.plots; print(sorted({'arviz', 'xarray', 'matplotlib'} & "
        "set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
