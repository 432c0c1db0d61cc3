"""Exports to ArviZ: groups, names and values; summaries, plots and files on both of its
lines."""

import json
import subprocess
import sys
from dataclasses import replace

import arviz as az
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints

import ebm_ppl as ebm

pytestmark = pytest.mark.xdist_group("arviz")

T3_999 = (
    10.2  # Student t, 3 degrees of freedom, 99.9% on either side: four held-out islands
)
T15_9999 = 5.24  # 15 degrees of freedom, two-sided 99.99%

RNG = np.random.default_rng(0)
X = RNG.normal([1.0, -0.5], 0.7, size=(20, 2)).astype(np.float32)
Y = RNG.normal(size=4).astype(np.float32)
BASE = dist.Normal(0, 1).expand([2]).to_event(1)


def model(x, y):
    """E = ½ r ‖x‖² − a·x on N(0, I): N(a / (1 + r), I / (1 + r)).  Beside it everything
    that must not be exported."""
    a = numpyro.param("a", jnp.zeros(2))
    r = numpyro.param("r", 0.0)
    numpyro.factor("penalty", -0.01 * (a**2).sum())
    numpyro.deterministic("twice", 2 * a)
    factors = {
        "bowl": lambda v: 0.5 * r * (v**2).sum(-1),
        "tilt": lambda v: -(v * a).sum(-1),
    }
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(factors, BASE), obs=x)
    with numpyro.plate("labels", len(y)):
        numpyro.sample("y", dist.Normal(a.sum(), 1), obs=y)


def exact_log_normalizer(params):
    a, r = np.asarray(params["a"], float), float(params["r"])
    return (a**2).sum() / (2 * (1 + r)) - np.log1p(r)


def exact_mean_log_density(params):
    a, r = np.asarray(params["a"], float), float(params["r"])
    residual = X - a / (1 + r)
    return (
        -0.5 * (1 + r) * (residual**2).sum(-1) + np.log1p(r) - np.log(2 * np.pi)
    ).mean()


@pytest.fixture(scope="module")
def fit():
    """Fast enough that weights differ, without resampling."""
    backend = ebm.Jarzynski(
        model, optax.adam(0.05), num_chains=6, num_walkers=100, ess_threshold=0.0
    )
    return backend.run(random.key(0), 40, X, Y, progress_bar=False)


@pytest.fixture(scope="module")
def exported(fit):
    names = {"dims": {"x": ["feature"]}, "coords": {"feature": ["length", "width"]}}
    return ebm.to_arviz(fit, model, X, Y, **names, **with_running(fit))


def dataset(data, group):
    """An xarray Dataset on either line of ArviZ."""
    found = data[group]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def groups(data):
    return set(data.children) if hasattr(data, "children") else set(data.groups())


def untrained(model, *args, history=(), **options):
    """A fit of no steps: what an export needs, without compiling an update."""
    backend = ebm.Jarzynski(model, optax.sgd(0.1), num_chains=6, num_walkers=10)
    state = backend.init(random.key(0), *args, **options)
    return ebm.Fit(params=backend.get_params(state), state=state, history=dict(history))


def with_running(fit):
    """What a normalised density needs where the running log Z will do."""
    return {"log_normalizer": fit.state.log_normalizer(), "allow_uncertified": True}


# Groups, names, dimensions


def test_groups_of_a_point_fit(exported):
    assert type(exported).__name__ in ("InferenceData", "DataTree")
    assert groups(exported) == {
        "posterior_predictive",
        "sample_stats",
        "islands",
        "parameters",
        "observed_data",
        "training",
    }


def test_only_what_each_group_is_for_and_no_auxiliary_site(exported, fit):
    assert set(dataset(exported, "posterior_predictive")) == {"x"}
    assert set(dataset(exported, "observed_data")) == {"x", "y"}
    stats = {"log_weight", "energy", "energy_bowl", "energy_tilt", "ancestor"}
    assert set(dataset(exported, "sample_stats")) == stats
    assert set(dataset(exported, "training")) == set(fit.history)


def test_dimensions(exported):
    assert dataset(exported, "posterior_predictive")["x"].dims == (
        "chain",
        "draw",
        "feature",
    )
    observed = dataset(exported, "observed_data")
    assert observed["x"].dims == ("rows", "feature")
    assert observed["y"].dims == ("labels",)
    for variable in dataset(exported, "sample_stats").values():
        assert variable.dims == ("chain", "draw")
    for variable in dataset(exported, "training").values():
        assert variable.dims == ("step",)
    assert dict(dataset(exported, "sample_stats").sizes) == {"chain": 6, "draw": 100}


def test_every_dimension_has_a_coordinate(exported):
    for group in groups(exported):
        found = dataset(exported, group)
        assert set(found.sizes) <= set(found.coords)
        for dim in set(found.sizes) - {"feature"}:
            np.testing.assert_array_equal(found[dim], np.arange(found.sizes[dim]))
    assert list(dataset(exported, "posterior_predictive")["feature"].values) == [
        "length",
        "width",
    ]
    assert list(dataset(exported, "observed_data")["feature"].values) == [
        "length",
        "width",
    ]


def test_default_names_of_event_dimensions(fit):
    plain = ebm.to_arviz(fit, model, X, Y)
    assert dataset(plain, "posterior_predictive")["x"].dims == (
        "chain",
        "draw",
        "x_dim_0",
    )
    assert dataset(plain, "observed_data")["x"].dims == ("rows", "x_dim_0")


def test_dims_that_do_not_fit(fit):
    with pytest.raises(
        ValueError, match=r"dims\['x'\] = \['p', 'q'\]; an event of site 'x' has 1 dim"
    ):
        ebm.to_arviz(fit, model, X, Y, dims={"x": ["p", "q"]})


def test_everything_is_numpy(exported):
    for group in groups(exported):
        for variable in dataset(exported, group).values():
            assert type(variable.data) is np.ndarray


# Values


def test_observed_data_is_the_data(exported):
    observed = dataset(exported, "observed_data")
    np.testing.assert_array_equal(observed["x"], X)
    np.testing.assert_array_equal(observed["y"], Y)


def test_draws_are_the_walkers_that_ancestor_names(exported, fit):
    ancestor = dataset(exported, "sample_stats")["ancestor"].values
    walkers = np.asarray(fit.state.walkers["x"].values)
    draws = dataset(exported, "posterior_predictive")["x"].values
    for chain in range(6):
        np.testing.assert_array_equal(draws[chain], walkers[chain][ancestor[chain]])


def test_duplicates_are_adjacent(exported):
    ancestor = dataset(exported, "sample_stats")["ancestor"].values
    assert (np.diff(ancestor, axis=1) >= 0).all()
    assert (np.diff(ancestor, axis=1) == 0).any()


def test_equal_weight_draws_have_the_mean_of_the_weighted_walkers(exported, fit):
    """Systematic resampling: every walker's copies differ from n·w by less than one,
    and the mean by sampling error."""
    log_weight = dataset(exported, "sample_stats")["log_weight"].values
    assert log_weight.std(1).min() > 0.1
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True)).astype(float)
    weight /= weight.sum(1, keepdims=True)
    ancestor = dataset(exported, "sample_stats")["ancestor"].values
    copies = (ancestor[:, :, None] == np.arange(100)).sum(1)
    assert np.abs(copies - 100 * weight).max() < 1 + 1e-3

    walkers = np.asarray(fit.state.walkers["x"].values, float)
    weighted = (weight[..., None] * walkers).sum(1)
    variance = (weight[..., None] * (walkers - weighted[:, None]) ** 2).sum(1) / 100
    draws = dataset(exported, "posterior_predictive")["x"].values.mean((0, 1))
    assert np.all(np.abs(draws - weighted.mean(0)) < 5 * np.sqrt(variance.sum(0)) / 6)


def test_sample_stats_are_those_of_the_walkers(exported, fit):
    stats = dataset(exported, "sample_stats")
    walkers = np.asarray(fit.state.walkers["x"].values)
    np.testing.assert_array_equal(
        stats["log_weight"], fit.state.walkers["x"].log_weight
    )
    bowl = 0.5 * float(fit.params["r"]) * (walkers**2).sum(-1)
    tilt = -(walkers * np.asarray(fit.params["a"])).sum(-1)
    np.testing.assert_allclose(stats["energy_bowl"], bowl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["energy_tilt"], tilt, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["energy"], bowl + tilt, rtol=1e-4, atol=1e-5)


def test_training_is_the_history(exported, fit):
    training = dataset(exported, "training")
    for name, entry in fit.history.items():
        np.testing.assert_array_equal(
            training[name], entry["x"] if isinstance(entry, dict) else entry
        )


def test_the_same_fit_gives_the_same_draws(exported, fit):
    again = ebm.to_arviz(fit, model, X, Y)
    np.testing.assert_array_equal(
        dataset(again, "posterior_predictive")["x"].values,
        dataset(exported, "posterior_predictive")["x"].values,
    )


# Attributes: log Z and the density of the data


def test_the_running_log_normalizer_is_the_held_out_one(exported, fit):
    assert exported.attrs["log_normalizer_source"] == "held-out islands"
    assert json.loads(exported.attrs["holdout_chains"]) == [2, 3, 4, 5]
    assert exported.attrs["log_normalizer"] == fit.history["log_normalizer"]["x"][-1]
    assert (
        exported.attrs["log_normalizer_stderr"]
        == fit.history["log_normalizer_stderr"]["x"][-1]
    )


def test_log_normalizer_and_mean_log_density_against_the_closed_form(exported, fit):
    stderr = exported.attrs["log_normalizer_stderr"]
    assert fit.history["ess_holdout"]["x"][-1] > 0.3
    assert 0 < stderr < 0.05
    assert (
        abs(exported.attrs["log_normalizer"] - exact_log_normalizer(fit.params))
        < T3_999 * stderr
    )
    assert (
        abs(exported.attrs["mean_log_density"] - exact_mean_log_density(fit.params))
        < T3_999 * stderr
    )


def test_an_annealed_log_normalizer_replaces_the_running_one(fit):
    options = {"num_temperatures": 32, "num_walkers": 32, "progress_bar": False}
    log_z = ebm.log_normalizer(random.key(1), model, fit.params, X, Y, **options)
    data = ebm.to_arviz(fit, model, X, Y, log_normalizer=log_z)
    assert data.attrs["log_normalizer_source"] == "bracket"
    assert data.attrs["log_normalizer"] == float(log_z.estimate["x"])
    stderr = data.attrs["log_normalizer_stderr"]
    assert stderr == float(log_z.stderr["x"])
    assert log_z.ess["x"] > 0.3
    assert 0 < stderr < 0.05
    assert (
        abs(data.attrs["log_normalizer"] - exact_log_normalizer(fit.params))
        < T15_9999 * stderr
    )
    assert (
        abs(data.attrs["mean_log_density"] - exact_mean_log_density(fit.params))
        < T15_9999 * stderr
    )


def test_mean_log_density_with_the_exact_log_normalizer_is_exact(fit):
    log_z = ebm.LogNormalizer.exact({"x": exact_log_normalizer(fit.params)}, fit.params)
    data = ebm.to_arviz(fit, model, X, Y, log_normalizer=log_z)
    assert data.attrs["mean_log_density"] == pytest.approx(
        exact_mean_log_density(fit.params), rel=1e-5
    )


def test_no_log_normalizer_no_normalised_density(fit):
    data = ebm.to_arviz(fit, model, X, Y)
    assert "mean_log_density" not in data.attrs
    assert data.attrs["log_normalizer_source"] == "held-out islands"


def test_a_log_normalizer_of_other_sites(fit):
    with pytest.raises(
        ValueError,
        match=r"sites \['z'\], but the model has energy site 'x'.*ebm_ppl.log_normalizer",
    ):
        ebm.to_arviz(
            fit, model, X, Y, log_normalizer=ebm.LogNormalizer.exact({"z": 0.0})
        )


def test_a_log_normalizer_of_other_parameters(fit):
    elsewhere = fit.params | {"r": fit.params["r"] + 0.1}
    log_z = ebm.LogNormalizer.exact({"x": exact_log_normalizer(elsewhere)}, elsewhere)
    with pytest.raises(ValueError, match=r"belongs to other parameters: 'r' differs"):
        ebm.to_arviz(fit, model, X, Y, log_normalizer=log_z)


def flagged_log_normalizer(fit):
    log_z = ebm.LogNormalizer.exact({"x": exact_log_normalizer(fit.params)}, fit.params)
    return replace(log_z, flags={"x": ("for a test.",)})


def test_a_flagged_log_normalizer_writes_no_density(fit):
    with pytest.warns(
        UserWarning, match=r"mean_log_density is left out.*site 'x': for a test"
    ):
        data = ebm.to_arviz(
            fit, model, X, Y, log_normalizer=flagged_log_normalizer(fit)
        )
    assert "mean_log_density" not in data.attrs
    assert json.loads(data.attrs["log_normalizer_flags"]) == ["for a test."]


def test_a_flagged_log_normalizer_writes_a_density_where_allowed(fit):
    data = ebm.to_arviz(
        fit,
        model,
        X,
        Y,
        log_normalizer=flagged_log_normalizer(fit),
        allow_uncertified=True,
    )
    assert data.attrs["mean_log_density"] == pytest.approx(
        exact_mean_log_density(fit.params), rel=1e-5
    )
    assert json.loads(data.attrs["log_normalizer_flags"]) == ["for a test."]


def test_a_running_log_normalizer_past_its_tolerance_is_flagged(fit):
    (never_certified,) = fit.state.log_normalizer(tolerance=1.0).flags["x"]
    assert "held against the data" in never_certified
    flag, _ = fit.state.log_normalizer(tolerance=1e-3).flags["x"]
    assert "nats wide" in flag
    assert "refresh" in flag


def test_islands_are_judged_one_by_one(exported, fit):
    islands = dataset(exported, "islands")
    log_weight = np.asarray(fit.state.walkers["x"].log_weight, float)
    weights = np.exp(log_weight)
    np.testing.assert_allclose(
        islands["ess"], weights.sum(1) ** 2 / (weights**2).sum(1) / 100, rtol=1e-4
    )
    np.testing.assert_array_equal(islands["held_out"], [0, 0, 1, 1, 1, 1])
    assert islands["khat"].dims == ("chain",)
    assert np.isfinite(islands["khat"]).all()


def test_draws_replace_the_walkers(fit):
    draws = RNG.normal(size=(3, 7, 2))
    data = ebm.to_arviz(fit, model, X, Y, draws={"x": draws}, dims={"x": ["feature"]})
    found = dataset(data, "posterior_predictive")["x"]
    assert found.dims == ("chain", "draw", "feature")
    np.testing.assert_array_equal(found, draws)


# Posterior draws of the parameters

DRAWS = {
    "a": RNG.normal([1.0, -0.5], 0.1, size=(2, 50, 2)),
    "r": RNG.uniform(0.5, 1.5, size=(2, 50)),
}


def exact_log_likelihood():
    a, r = DRAWS["a"][:, :, None], DRAWS["r"][..., None]
    residual = X - a / (1 + r[..., None])
    return -0.5 * (1 + r) * (residual**2).sum(-1) + np.log1p(r) - np.log(2 * np.pi)


@pytest.fixture(scope="module")
def at_draws():
    return ebm.log_normalizer(
        None, model, DRAWS, X, Y, batch_ndims=2, method="quadrature"
    )


def test_posterior_draws_have_a_log_likelihood_of_their_own_normalisers(at_draws):
    data = ebm.to_arviz(DRAWS, model, X, Y, log_normalizer=at_draws)
    assert groups(data) == {"posterior", "log_likelihood", "observed_data"}
    np.testing.assert_array_equal(dataset(data, "posterior")["a"], DRAWS["a"])
    found = dataset(data, "log_likelihood")
    assert found["x"].dims == ("chain", "draw", "rows")
    np.testing.assert_allclose(found["x"], exact_log_likelihood(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found["y"],
        -0.5 * (Y - DRAWS["a"].sum(-1)[..., None]) ** 2 - 0.5 * np.log(2 * np.pi),
        rtol=1e-4,
        atol=1e-4,
    )


def test_posterior_draws_go_through_loo(at_draws):
    data = ebm.to_arviz(DRAWS, model, X, Y, log_normalizer=at_draws)
    found = az.loo(data, var_name="x", pointwise=True, reff=1.0)
    exact = exact_log_likelihood().reshape(100, -1)
    # Draws this close together: LOO is nearly the mean log density.
    elpd = found.elpd if hasattr(found, "elpd") else found.elpd_loo
    assert abs(elpd - exact.mean(0).sum()) < 4 * exact.var(0).sum()


def test_flagged_draws_write_no_log_likelihood(at_draws):
    flagged = replace(at_draws, flags={"x": ("for a test.",)})
    with pytest.warns(UserWarning, match=r"log_likelihood is left out.*for a test"):
        data = ebm.to_arviz(DRAWS, model, X, Y, log_normalizer=flagged)
    assert groups(data) == {"posterior", "observed_data"}
    allowed = ebm.to_arviz(
        DRAWS, model, X, Y, log_normalizer=flagged, allow_uncertified=True
    )
    assert "log_likelihood" in groups(allowed)
    assert json.loads(allowed.attrs["log_normalizer_flags"]) == ["for a test."]


def test_draws_with_the_log_normalizer_of_one_point(fit):
    """One log Z for all draws would be the silent error again."""
    log_z = ebm.LogNormalizer.exact({"x": exact_log_normalizer(fit.params)}, fit.params)
    with pytest.raises(ValueError, match=r"belongs to other parameters.*batch_ndims=2"):
        ebm.to_arviz(DRAWS, model, X, Y, log_normalizer=log_z)


def test_draws_with_a_log_normalizer_that_names_no_parameters():
    with pytest.raises(ValueError, match="belongs to other parameters"):
        ebm.to_arviz(
            DRAWS, model, X, Y, log_normalizer=ebm.LogNormalizer.exact({"x": 0.0})
        )


# Other models


def two_sites(u, v):
    """A slash in a site's name, a subsampled plate, a sample site as parameter; at a =
    0 both sites are their bases."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("rows", len(u), subsample_size=4):
        u, v = numpyro.subsample(u, event_dim=0), numpyro.subsample(v, event_dim=1)
        numpyro.sample(
            "u", ebm.EnergyDistribution(lambda x: a * x, dist.Normal(0, 1)), obs=u
        )
        with handlers.scope(prefix="deep"):
            numpyro.sample(
                "v", ebm.EnergyDistribution(lambda x: a * x.sum(-1), BASE), obs=v
            )


@pytest.fixture(scope="module")
def two_exported():
    history = {"loss": np.zeros(3), "ess": {"u": np.ones(3), "deep/v": np.full(3, 2.0)}}
    fit = untrained(
        two_sites, X[:, 0], X, init_params={"a": jnp.zeros(())}, history=history
    )
    return ebm.to_arviz(fit, two_sites, X[:, 0], X, **with_running(fit))


def test_several_energy_sites_have_suffixes(two_exported):
    """A slash would start a group of a DataTree, so "deep/v" becomes "deep.v"."""
    assert set(dataset(two_exported, "posterior_predictive")) == {"u", "deep.v"}
    assert set(dataset(two_exported, "observed_data")) == {"u", "deep.v"}
    per_site = {
        f"{name}_{site}"
        for name in ("log_weight", "energy", "ancestor")
        for site in ("u", "deep.v")
    }
    assert set(dataset(two_exported, "sample_stats")) == per_site
    training = dataset(two_exported, "training")
    assert set(training) == {"loss", "ess_u", "ess_deep.v"}
    np.testing.assert_array_equal(training["ess_u"], 1.0)
    np.testing.assert_array_equal(training["ess_deep.v"], 2.0)


def test_several_energy_sites_have_attributes_of_their_own(two_exported):
    for name in ("log_normalizer", "log_normalizer_stderr", "holdout_chains"):
        assert {f"{name}_u", f"{name}_deep.v"} <= set(two_exported.attrs)
        assert name not in two_exported.attrs
    density = dist.Normal(0, 1).log_prob(X)
    assert two_exported.attrs["mean_log_density_u"] == pytest.approx(
        float(density[:, 0].mean()), rel=1e-5
    )
    assert two_exported.attrs["mean_log_density_deep.v"] == pytest.approx(
        float(density.sum(-1).mean()), rel=1e-5
    )


def test_a_subsampled_plate_is_exported_whole(two_exported):
    observed = dataset(two_exported, "observed_data")
    np.testing.assert_array_equal(observed["u"], X[:, 0])
    np.testing.assert_array_equal(observed["deep.v"], X)


def test_a_batch_shape_becomes_dimensions():
    def batched(x):
        a = numpyro.param("a", 0.0)
        base = dist.Normal(jnp.arange(3.0), 1)
        with numpyro.plate("rows", len(x), dim=-2):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: a * v, base), obs=x)

    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    fit = untrained(batched, x)
    data = ebm.to_arviz(fit, batched, x, **with_running(fit))
    draws = dataset(data, "posterior_predictive")["x"]
    stats = dataset(data, "sample_stats")
    assert draws.shape == stats["ancestor"].shape == (6, 10, 3)
    walkers = np.asarray(fit.state.walkers["x"].values)
    np.testing.assert_array_equal(
        draws, np.take_along_axis(walkers, stats["ancestor"].values, axis=1)
    )
    # The dimension has one name, so that xarray aligns draws with data.
    (batch,) = draws.dims[2:]
    assert stats["ancestor"].dims == ("chain", "draw", batch)
    assert dataset(data, "observed_data")["x"].dims == ("rows", batch)
    assert np.shape(data.attrs["log_normalizer"]) == (3,)
    expected = dist.Normal(jnp.arange(3.0), 1).log_prob(x).mean()
    assert data.attrs["mean_log_density"] == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_shape_declared_as_event():
    def joined(x):
        a = numpyro.param("a", 0.0)
        base = dist.Normal(jnp.arange(2.0), 1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: a * v, base).to_event(1), obs=x
            )

    data = ebm.to_arviz(untrained(joined, X), joined, X, dims={"x": ["feature"]})
    assert dataset(data, "posterior_predictive")["x"].dims == (
        "chain",
        "draw",
        "feature",
    )
    assert dataset(data, "sample_stats")["log_weight"].dims == (
        "chain",
        "draw",
        "feature",
    )
    assert dataset(data, "observed_data")["x"].dims == ("rows", "feature")


def test_masked_rows_do_not_enter_the_mean_log_density():
    def masked(x, mask):
        a = numpyro.param("a", jnp.zeros(2))
        with numpyro.plate("rows", len(x)), handlers.mask(mask=mask):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: -(v * a).sum(-1), BASE), obs=x
            )

    x, mask = X.copy(), np.ones(20, bool)
    x[3], mask[3] = np.nan, False
    fit = untrained(masked, x, mask)
    data = ebm.to_arviz(fit, masked, x, mask, **with_running(fit))
    expected = BASE.log_prob(x[mask]).mean()
    assert data.attrs["mean_log_density"] == pytest.approx(float(expected), rel=1e-5)


# ArviZ's own functions


def test_summary(exported):
    table = az.summary(exported, group="posterior_predictive", round_to="none")
    assert list(table.index) == ["x[length]", "x[width]"]
    draws = dataset(exported, "posterior_predictive")["x"].values
    np.testing.assert_allclose(
        np.asarray(table["mean"], float), draws.mean((0, 1)), rtol=1e-3
    )
    assert np.isfinite(np.asarray(table["r_hat"], float)).all()
    assert (np.asarray(table["ess_bulk"], float) > 10).all()


@pytest.mark.parametrize("plot", [az.plot_trace, az.plot_forest])
def test_plots_of_draws(exported, plot):
    if hasattr(exported, "children"):
        drawn = plot(exported, group="posterior_predictive", var_names=["x"])
        figure = drawn.viz["figure"].item()
    else:
        axes = plot(dataset(exported, "posterior_predictive"), var_names=["x"])
        figure = np.ravel(axes)[0].figure
    figure.canvas.draw()
    assert any(axes.has_data() for axes in figure.axes)
    plt.close("all")


def test_plot_of_training(exported):
    lines = dataset(exported, "training")["loss"].plot(x="step")
    assert len(lines[0].get_xdata()) == 40
    plt.close("all")


def test_files(exported, tmp_path):
    path = str(tmp_path / "fit.nc")
    exported.to_netcdf(path)
    back = az.from_netcdf(path)
    assert groups(back) == groups(exported)
    for group in groups(exported):
        kept, read = dataset(exported, group), dataset(back, group)
        assert set(read) == set(kept)
        for name in kept:
            assert read[name].dims == kept[name].dims
            np.testing.assert_array_equal(read[name], kept[name])
    assert set(back.attrs) == set(exported.attrs)
    for name, value in exported.attrs.items():
        assert back.attrs[name] == value


def test_importing_the_package_does_not_import_arviz():
    code = (
        "import sys, ebm_ppl; print(sorted({'arviz', 'xarray', 'matplotlib'} & "
        "set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# Parameters


def test_parameters_with_a_score_test(fit, tmp_path):
    test = ebm.score_test(random.key(0), fit, model, X, Y, num_walkers=64)
    data = ebm.to_arviz(fit, model, X, Y, score_test=test, dims={"a": ["axis"]})
    path = str(tmp_path / "fit.nc")
    data.to_netcdf(path)
    data = az.from_netcdf(path)
    for group, expected in (
        ("parameters", fit.params),
        ("standard_errors", test.standard_errors),
        ("distances", test.distance),
    ):
        written = dataset(data, group)
        assert written["a"].dims == ("axis",)
        for name in ("a", "r"):
            np.testing.assert_array_equal(written[name].values, expected[name])
    assert data.attrs["is_at_maximum"] == int(test.is_at_maximum)
    assert data.attrs["gain_per_row"] == test.gain_per_row
    assert tuple(json.loads(data.attrs["score_test_flags"])) == test.flags

    moved = replace(fit, params=fit.params | {"r": fit.params["r"] + 0.1})
    with pytest.raises(ValueError, match=r"score_test belongs to other .*'r' differs"):
        ebm.to_arviz(moved, model, X, Y, score_test=test)
    draws = {name: np.asarray(value)[None, None] for name, value in fit.params.items()}
    with pytest.raises(ValueError, match="score_test is of a point fit"):
        ebm.to_arviz(draws, model, X, Y, score_test=test)


def test_a_fit_prints_what_it_is(fit, generated):
    text = str(fit)
    assert text.startswith(f"Fit by Jarzynski after {len(fit.history['loss'])} updates")
    assert f"r = {np.array2string(np.asarray(fit.params['r']), precision=4)}" in text
    text = repr(generated)
    assert "entropy_weight = 0.5" in text
    assert "gradient_penalty = 0" in text
    net = replace(fit, params={"net$params": {"w": np.zeros((3, 5)), "b": np.zeros(5)}})
    assert "net$params: 20 numbers in 2 arrays" in str(net)


# VERA


def generator():
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample(
        "x", ebm.standardized_normal(BASE, numpyro.param("w", 0.8) * z, scale)
    )


@pytest.fixture(scope="module")
def generated():
    backend = ebm.VERA(
        model,
        generator,
        optax.adam(0.05, b1=0.0),
        optax.adam(0.05, b1=0.0),
        entropy_weight=0.5,
    )
    with pytest.warns(UserWarning, match=r"entropy_weight = 0\.5"):
        return backend.run(random.key(0), 40, X, Y, progress_bar=False)


def test_a_generators_draws_and_their_energies(generated):
    log_z = ebm.LogNormalizer.exact(
        {"x": exact_log_normalizer(generated.params)}, generated.params
    )
    with pytest.warns(
        UserWarning, match="log Z of energy site 'x' is .* the generator's"
    ):
        data = ebm.to_arviz(generated, model, X, Y, log_normalizer=log_z)
    (contradiction,) = json.loads(data.attrs["contradictions"])
    (finding,) = json.loads(data.attrs["findings"])
    assert "was drawn to exp(-U / entropy_weight)" in finding
    assert finding in str(generated)
    assert f"{float(log_z.lower['x']):.3g} at least" in contradiction
    draws, stats = dataset(data, "posterior_predictive"), dataset(data, "sample_stats")
    assert draws["x"].shape == (4, 1000, 2)
    a, r = generated.params["a"], generated.params["r"]
    bowl, tilt = (
        0.5 * r * (draws["x"].values ** 2).sum(-1),
        -(draws["x"].values * np.asarray(a)).sum(-1),
    )
    np.testing.assert_allclose(stats["energy_bowl"], bowl, rtol=1e-4)
    np.testing.assert_allclose(stats["energy"], bowl + tilt, rtol=1e-3, atol=1e-4)
    expected = generated.state.constrained_generator_params()
    variance = float(expected["w"] ** 2 + expected["scale"] ** 2)
    assert abs(draws["x"].values.var() - variance) < 5 * variance * np.sqrt(2 / 8000)
    assert data.attrs["entropy_weight"] == 0.5
    assert data.attrs["gradient_penalty"] == 0.0
    assert (
        data.attrs["log_normalizer_bound"]
        == generated.history["log_normalizer_bound"]["x"][-1]
    )
    assert data.attrs["mean_log_density"] == pytest.approx(
        exact_mean_log_density(generated.params), rel=1e-4
    )
    assert "islands" not in groups(data)
    np.testing.assert_array_equal(
        dataset(data, "training")["entropy"], generated.history["entropy"]["x"]
    )


def test_no_log_z_without_one_for_a_generator(generated):
    data = ebm.to_arviz(generated, model, X, Y)
    assert "log_normalizer" not in data.attrs
    assert "mean_log_density" not in data.attrs


def test_refined_draws_take_the_generators_place(generated, tmp_path):
    refined = np.random.default_rng(0).normal(size=(2, 50, 2)).astype(np.float32)
    data = ebm.to_arviz(generated, model, X, Y, draws={"x": refined})
    np.testing.assert_array_equal(dataset(data, "posterior_predictive")["x"], refined)
    assert dataset(data, "sample_stats")["energy"].shape == (2, 50)
    data.to_netcdf(tmp_path / "fit.nc")
    az.summary(data, group="posterior_predictive")
