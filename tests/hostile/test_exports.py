"""Exports say what the data were: masked rows, names, dimensions, weights."""

import json
import re

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.export.names import distinct, labels
from ebm_ppl.model.masks import unmasked, unmasked_rows

pytestmark = pytest.mark.xdist_group("arviz")

RNG = np.random.default_rng(0)
TAU = np.exp(0.2 * RNG.normal(size=(2, 60)))
X = RNG.normal(size=(6, 4)).astype(np.float32)
MASK = RNG.random((6, 4)) > 0.3
FILLED = np.where(MASK, X, -99.0).astype(np.float32)
FLAT = dist.ImproperUniform(constraints.real, (), ())


def bowl(tau, base=None):
    """N(0, 1 / (tau + 1 / 25)) where the base is N(0, 5)."""
    return ebm.EnergyDistribution(
        lambda v: 0.5 * tau * v**2, dist.Normal(0, 5) if base is None else base
    )


def log_density(x):
    """Of every element at every draw, ``(2, 60, *x.shape)``."""
    precision = TAU.reshape(TAU.shape + (1,) * x.ndim) + 1 / 25
    return 0.5 * (
        np.log(precision) - np.log(2 * np.pi) - precision * x.astype(float) ** 2
    )


def prior():
    return numpyro.sample("tau", dist.Gamma(2, 2))


def export(model, *args, draws=None, **options):
    """Posterior draws with a log likelihood."""
    draws = {"tau": TAU} if draws is None else draws
    log_z = ebm.log_normalizer(
        None, model, draws, *args, batch_ndims=2, method="quadrature"
    )
    return ebm.to_arviz(draws, model, *args, log_normalizer=log_z, **options)


def untrained(model, *args, history=()):
    backend = ebm.Jarzynski(model, optax.sgd(0.1), num_chains=6, num_walkers=8)
    state = backend.init(random.key(0), *args)
    return ebm.Fit(params=backend.get_params(state), state=state, history=dict(history))


def dataset(data, group):
    found = data[group]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def loo(data, name="x"):
    found = az.loo(data, var_name=name, reff=1.0)
    elpd = found.elpd if hasattr(found, "elpd") else found.elpd_loo
    return elpd, found.se, found.n_data_points


# Masks


def rows(x, mask):
    tau = prior()
    with numpyro.plate("data", len(x)), handlers.mask(mask=mask):
        numpyro.sample("x", bowl(tau), obs=x)


def test_masked_rows_are_missing_and_do_not_enter_loo(tmp_path):
    x, mask, filled = X.ravel(), MASK.ravel(), FILLED.ravel()
    data = export(rows, filled, mask, coords={"data": [f"row {k}" for k in range(24)]})
    alone = export(rows, x[mask], mask[mask])
    assert loo(data) == pytest.approx(loo(alone), rel=1e-6)
    assert loo(data)[2] == mask.sum() == 18

    found = dataset(data, "log_likelihood")["x"]
    assert found.dims == ("chain", "draw", "data")
    assert list(found["data"].values) == [f"row {k}" for k in np.flatnonzero(mask)]
    np.testing.assert_allclose(found, log_density(x)[:, :, mask], rtol=1e-4)
    np.testing.assert_array_equal(
        dataset(data, "observed_data")["x"], np.where(mask, x, np.nan)
    )

    data.to_netcdf(tmp_path / "masked.nc")
    assert loo(az.from_netcdf(str(tmp_path / "masked.nc"))) == pytest.approx(
        loo(alone), rel=1e-6
    )


def test_the_filler_does_not_matter():
    one = export(rows, FILLED.ravel(), MASK.ravel())
    other = export(rows, np.where(MASK, X, np.nan).ravel(), MASK.ravel())
    for group in ("log_likelihood", "observed_data"):
        np.testing.assert_array_equal(
            dataset(one, group)["x"], dataset(other, group)["x"]
        )


def plane(x, mask):
    tau = prior()
    with (
        numpyro.plate("rows", 6, dim=-2),
        numpyro.plate("columns", 4, dim=-1),
        handlers.mask(mask=mask),
    ):
        numpyro.sample("x", bowl(tau), obs=x)
        numpyro.sample("counts", dist.Poisson(tau), obs=np.arange(24).reshape(6, 4))


def test_a_mask_over_two_plates_leaves_rows_with_their_places():
    data = export(plane, FILLED, MASK)
    alone = export(rows, X[MASK], MASK[MASK])
    assert loo(data) == pytest.approx(loo(alone), rel=1e-6)

    found = dataset(data, "log_likelihood")
    assert found["x"].dims == ("chain", "draw", "x_row")
    np.testing.assert_array_equal(
        [found["x_rows"], found["x_columns"]], np.nonzero(MASK)
    )
    np.testing.assert_allclose(found["x"], log_density(X)[:, :, MASK], rtol=1e-4)


def test_integers_become_floats_where_some_are_missing():
    counts = dataset(export(plane, FILLED, MASK), "observed_data")["counts"]
    assert counts.dtype.kind == "f"
    np.testing.assert_array_equal(
        counts, np.where(MASK, np.arange(24).reshape(6, 4), np.nan)
    )
    whole = dataset(export(plane, X, np.ones((6, 4), bool)), "observed_data")["counts"]
    assert whole.dtype.kind == "i"


@pytest.mark.parametrize("shape", [(6, 4), (6, 1)])
def test_whole_slices_keep_the_plates(shape):
    mask = np.ones(shape, bool)
    mask[2] = False
    found = dataset(export(plane, X, mask), "log_likelihood")["x"]
    assert found.dims == ("chain", "draw", "rows", "columns")
    assert list(found["rows"].values) == [0, 1, 3, 4, 5]
    np.testing.assert_allclose(found, log_density(X)[:, :, [0, 1, 3, 4, 5]], rtol=1e-4)


def three_sites(x, mask):
    tau = prior()
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", bowl(tau).mask(mask), obs=x)
        numpyro.sample("y", dist.Normal(0, 1 / jnp.sqrt(tau)), obs=x)
        numpyro.sample("none", bowl(tau).mask(False), obs=x)


def test_sites_of_one_plate_with_masks_of_their_own():
    x, mask = X.ravel(), MASK.ravel()
    data = export(three_sites, x, mask)
    found = dataset(data, "log_likelihood")
    assert set(found) == {"x", "y"}
    assert found["y"].dims == ("chain", "draw", "data")
    assert found["x"].dims == ("chain", "draw", "x_data")
    np.testing.assert_array_equal(found["x_data"], np.flatnonzero(mask))
    assert loo(data)[2] == 18
    assert loo(data, "y")[2] == 24
    assert np.isnan(dataset(data, "observed_data")["none"]).all()


def elements(x, mask):
    tau = prior()
    with numpyro.plate("data", len(x)):
        site = bowl(tau, dist.Normal(0, jnp.full(4, 5.0))).mask(mask).to_event(1)
        numpyro.sample("x", site, obs=x)


def test_masked_elements_inside_an_event():
    """A row counts with what was seen of it; a row of which nothing was seen does
    not."""
    mask = MASK.copy()
    mask[1] = False
    data = export(elements, np.where(mask, X, -99.0), mask)
    seen = mask.any(1)
    expected = np.where(mask, log_density(X), 0.0).sum(-1)[:, :, seen]
    np.testing.assert_allclose(
        dataset(data, "log_likelihood")["x"], expected, rtol=1e-4
    )
    np.testing.assert_array_equal(
        dataset(data, "observed_data")["x"], np.where(mask, X, np.nan)
    )


def fitted_elements(x, mask):
    tau = numpyro.param("tau", 0.0)
    with numpyro.plate("data", len(x)):
        site = bowl(tau, dist.Normal(0, jnp.full(4, 5.0))).mask(mask).to_event(1)
        numpyro.sample("x", site, obs=x)


def test_the_mean_log_density_is_over_the_rows_that_count():
    mask = MASK.copy()
    mask[1] = False
    fit = untrained(fitted_elements, np.where(mask, X, -99.0), mask)
    log_z = ebm.LogNormalizer.exact({"x": np.zeros(4)}, fit.params)
    data = ebm.to_arviz(
        fit, fitted_elements, np.where(mask, X, -99.0), mask, log_normalizer=log_z
    )
    density = np.where(mask, np.asarray(dist.Normal(0, 5).log_prob(X)), 0.0)
    assert data.attrs["mean_log_density"] == pytest.approx(
        density.sum() / mask.any(1).sum(), rel=1e-5
    )


def test_nan_under_an_element_mask_is_data_nowhere_else():
    """NaN beside a masked element of the same row is still refused, and under the mask
    it is not."""
    untrained(fitted_elements, np.where(MASK, X, np.nan), MASK)
    bad = np.where(MASK, X, np.nan)
    bad[tuple(np.argwhere(MASK)[0])] = np.nan
    with pytest.raises(ValueError, match=r"site 'x' is NaN or infinite in 1 of 6 rows"):
        untrained(fitted_elements, bad, MASK)


def test_unmasked_sees_through_every_wrapper():
    inner = dist.Normal(0, jnp.ones(4))
    assert unmasked(inner.mask(MASK).to_event(1)).shape == (6, 4)
    np.testing.assert_array_equal(
        unmasked(inner.mask(MASK).to_event(1).mask(np.arange(6) > 0))[0], False
    )
    np.testing.assert_array_equal(
        unmasked_rows(inner.mask(MASK).to_event(1)), MASK.any(1)
    )
    np.testing.assert_array_equal(
        unmasked(inner.mask(MASK[0]).expand((6, 4))), np.broadcast_to(MASK[0], (6, 4))
    )


def masked_by_draws(x):
    tau = prior()
    with numpyro.plate("data", len(x)), handlers.mask(mask=x < tau):
        numpyro.sample("x", bowl(tau), obs=x)


def test_a_mask_that_differs_by_draw_is_refused():
    x = np.linspace(-1, 2, 12, dtype=np.float32)
    with pytest.raises(
        ValueError, match="mask at site 'x' is not the same for every draw"
    ):
        export(masked_by_draws, x)


# Names


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ({"a/b"}, {"a/b": "a.b"}),
        ({"a/b", "a.b"}, {"a.b": "a.b", "a/b": "a.b_"}),
        (
            {"a/b/c", "a.b/c", "a/b.c"},
            {"a.b/c": "a.b.c", "a/b.c": "a.b.c_", "a/b/c": "a.b.c__"},
        ),
        (
            {"chain", "chain_", "draw", "step"},
            {"chain_": "chain_", "chain": "chain__", "draw": "draw_", "step": "step_"},
        ),
    ],
)
def test_names_are_never_lost(names, written):
    assert distinct(names) == written
    assert len(set(distinct(names).values())) == len(names)


def test_labels_of_sites_that_end_as_others_begin():
    stems = dict.fromkeys(
        ("x", "stderr_x", "holdout_x", "source", "a/b", "a.b"),
        ("z", "z_stderr", "ess", "ess_holdout"),
    )
    ends = labels(list(stems), stems, ("z_source", "z", "z_stderr"))
    keys = [stem + ends[site] for site in stems for stem in stems[site]]
    assert len(set(keys)) == len(keys)
    assert "z_source" not in keys
    assert ends["x"] == "_x"
    assert ends["a.b"] == "_a.b"
    assert labels(["x"], stems, ()) == {"x": ""}


def sites(names, plates):
    def model(x):
        lam = numpyro.param("lam", 1.0, constraint=constraints.positive)
        for k, (name, plate) in enumerate(zip(names, plates, strict=True)):
            with numpyro.plate(plate, len(x) - k):
                energy = ebm.EnergyDistribution(
                    lambda v, k=k: 0.5 * (k + 1) * lam * v**2,
                    FLAT,
                    start=dist.Normal(0, 1),
                )
                numpyro.sample(name, energy, obs=x[k:])

    return model


@pytest.mark.parametrize(
    "names", [("a/b", "a.b"), ("x", "stderr_x"), ("chain", "draw"), ("x", "source")]
)
def test_two_sites_stay_two(names):
    x = X.ravel()[:6]
    model = sites(names, [f"rows {name}" for name in names])
    fit = untrained(
        model, x, history={"ess": {name: np.full(3, k) for k, name in enumerate(names)}}
    )
    log_z = ebm.log_normalizer(None, model, fit.params, x, method="quadrature")
    data = ebm.to_arviz(fit, model, x, log_normalizer=log_z)

    observed = dataset(data, "observed_data")
    assert sorted(tuple(v.values) for v in observed.values()) == sorted(
        [tuple(x), tuple(x[1:])]
    )
    assert len(dataset(data, "posterior_predictive")) == 2
    assert len(dataset(data, "sample_stats")) == 6
    assert sorted(v.values[0] for v in dataset(data, "training").values()) == [0, 1]

    # log Z of N(0, 1/k) is ½ log(2π/k); every standard error is 0, and the source is
    # the method
    estimates = [0.5 * np.log(2 * np.pi / k) for k in (1, 2)]
    assert data.attrs["log_normalizer_source"] == "quadrature"
    values = [
        v
        for key, v in data.attrs.items()
        if re.fullmatch(r"log_normalizer_(?!source$|flags).*", key)
    ]
    assert sorted(values) == pytest.approx(sorted(3 * estimates + [0.0, 0.0]), abs=1e-5)


def test_todays_names_stay_where_nothing_collides():
    x = X.ravel()[:6]
    model = sites(("u", "deep/v"), ("rows", "deep/rows"))
    data = ebm.to_arviz(
        untrained(model, x), model, x, coords={"deep/rows": list("abcde")}
    )
    assert set(dataset(data, "observed_data")) == {"u", "deep.v"}
    assert dataset(data, "observed_data")["deep.v"].dims == ("deep.rows",)
    assert list(dataset(data, "observed_data")["deep.rows"].values) == list("abcde")
    assert {"log_normalizer_u", "log_normalizer_stderr_deep.v"} <= set(data.attrs)


def test_a_scoped_model_is_exported():
    model = handlers.scope(lambda x: sites(("x",), ("rows",))(x), prefix="a")
    x = X.ravel()
    data = ebm.to_arviz(untrained(model, x), model, x)
    assert dataset(data, "observed_data")["a.x"].dims == ("a.rows",)
    np.testing.assert_array_equal(dataset(data, "observed_data")["a.x"], x)


def scoped_inside(x):
    tau = prior()
    with handlers.scope(prefix="a"), numpyro.plate("rows", len(x)):
        numpyro.sample("x", bowl(tau), obs=x)


def test_a_scope_inside_a_model_has_a_log_likelihood():
    found = dataset(export(scoped_inside, X.ravel()), "log_likelihood")["a.x"]
    assert found.dims == ("chain", "draw", "a.rows")
    np.testing.assert_allclose(found, log_density(X.ravel()), rtol=1e-4)


def test_factors_whose_names_collide():
    def model(x):
        lam = numpyro.param("lam", 1.0)
        factors = {"a/b": lambda v: lam * v, "a.b": lambda v: 2 * lam * v}
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(factors, dist.Normal(0, 1)), obs=x
            )

    stats = dataset(
        ebm.to_arviz(untrained(model, X.ravel()), model, X.ravel()), "sample_stats"
    )
    np.testing.assert_allclose(stats["energy_a.b"], 2 * stats["energy_a.b_"], rtol=1e-5)


def test_plates_of_one_name_and_two_sizes():
    model = sites(("u", "v"), ("rows", "rows"))
    x = X.ravel()
    fit = untrained(model, x)
    with pytest.raises(
        ValueError, match="Dimension 'rows' has 24 elements in 'u' and 23 in 'v'"
    ):
        ebm.to_arviz(fit, model, x)


def test_a_plate_with_the_name_of_a_parameter():
    model = sites(("x",), ("lam",))
    for step in (
        lambda: untrained(model, X.ravel()),
        lambda: ebm.log_normalizer(
            None, model, {"lam": 1.0}, X.ravel(), method="quadrature"
        ),
    ):
        with pytest.raises(ValueError, match=r"both called 'lam'.*Rename the plate"):
            step()


# Dimensions and coordinates


def features(x):
    beta = numpyro.sample("beta", dist.Gamma(2, 2).expand([3]).to_event(1))
    net = numpyro.sample("net", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        base = dist.Normal(0, 2).expand([3]).to_event(1)
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(lambda v: 0.5 * (beta * v**2).sum(-1) + net, base),
            obs=x,
        )


ROWS = RNG.normal(size=(8, 3)).astype(np.float32)
DRAWS = {"beta": np.ones((2, 5, 3)), "net": np.zeros((2, 5))}


def test_parameters_have_dims_and_coords():
    data = ebm.to_arviz(
        DRAWS,
        features,
        ROWS,
        dims={"beta": ["feature"], "x": ["feature"]},
        coords={"feature": ["a", "b", "c"]},
    )
    beta = dataset(data, "posterior")["beta"]
    assert beta.dims == ("chain", "draw", "feature")
    assert list(beta["feature"].values) == ["a", "b", "c"]
    assert dataset(data, "observed_data")["x"].dims == ("data", "feature")


def test_dims_as_arviz_gives_them_with_the_plate():
    data = ebm.to_arviz(
        DRAWS, features, ROWS, dims={"x": ["data", "feature"], "beta": "feature"}
    )
    assert dataset(data, "observed_data")["x"].dims == ("data", "feature")
    assert dataset(data, "posterior")["beta"].dims == ("chain", "draw", "feature")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"dims": {"typo": ["f"]}},
            r"dims names 'typo', which is no variable here; expected one of \['beta', "
            r"'net', 'x'\]",
        ),
        (
            {"coords": {"nothing": [1]}},
            r"coords names \['nothing'\].*expected some of \['beta_dim_0', 'chain'",
        ),
        (
            {"dims": {"beta": ["f", "g"]}},
            r"dims\['beta'\] = \['f', 'g'\]; a value of parameter 'beta' has 1 dim",
        ),
        (
            {"dims": {"net": ["f"]}},
            r"dims\['net'\] = \['f'\]; a value of parameter 'net' has 0 dim",
        ),
        (
            {"dims": {"x": ["f"]}, "coords": {"f": [1, 2]}},
            r"coords\['f'\] has 2 values; dimension 'f' has 3",
        ),
        (
            {"coords": {"data": [1, 2]}},
            r"coords\['data'\] has 2 values; dimension 'data' has 8",
        ),
        ({"dims": {"x": ["data"]}}, r"gives two dimensions of 'x' one name"),
        (
            {"dims": {"x": ["chain"]}},
            r"dimension 'chain', which is the name of something else",
        ),
        (
            {"dims": {"x": ["beta"]}},
            r"dimension 'beta', which is the name of something else",
        ),
        ({"dims": {"x": ["a/b"]}}, r"dimension 'a/b', which has a slash"),
    ],
)
def test_dims_and_coords_that_fit_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        ebm.to_arviz(DRAWS, features, ROWS, **options)


def tree(x):
    net = numpyro.param("net", {"w/1": jnp.ones((2, 3)), "b": jnp.zeros(3)})
    with numpyro.plate("data", len(x)):
        base = dist.Normal(0, 2).expand([3]).to_event(1)
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(
                lambda v: (v @ net["w/1"].T).sum(-1) + net["b"].sum(), base
            ),
            obs=x,
        )


def test_leaves_of_trees_have_dims():
    draws = {"net": {"w/1": np.ones((2, 5, 2, 3)), "b": np.zeros((2, 5, 3))}}
    data = ebm.to_arviz(
        draws,
        tree,
        ROWS,
        dims={"net['w/1']": ["hidden", "feature"], "net['b']": ["feature"]},
    )
    posterior = dataset(data, "posterior")
    assert posterior["net['w.1']"].dims == ("chain", "draw", "hidden", "feature")
    assert posterior["net['b']"].dims == ("chain", "draw", "feature")


def test_a_fit_takes_dims_of_events_and_knows_its_parameters():
    fit = untrained(tree, ROWS)
    data = ebm.to_arviz(
        fit,
        tree,
        ROWS,
        dims={"x": ["feature"], "net['b']": ["unit"]},
        coords={"feature": list("abc"), "unit": list("uvw")},
    )
    draws = dataset(data, "posterior_predictive")["x"]
    assert draws.dims == ("chain", "draw", "feature")
    assert list(draws["feature"].values) == list("abc")
    with pytest.raises(ValueError, match="dims names 'lam', which is no variable"):
        ebm.to_arviz(fit, tree, ROWS, dims={"lam": ["f"]})
    with pytest.raises(
        ValueError, match=r"dims\[\"net\['b'\]\"\]|dims\['net\['b'\]'\]"
    ):
        ebm.to_arviz(fit, tree, ROWS, dims={"net['b']": ["f", "g"]})


# Weights


def test_groups_say_whether_their_draws_are_weighted(tmp_path):
    model, x = sites(("u", "deep/v"), ("rows", "deep/rows")), X.ravel()
    data = ebm.to_arviz(untrained(model, x), model, x)
    stats, draws = dataset(data, "sample_stats"), dataset(data, "posterior_predictive")
    assert stats.attrs["draws_are_weighted"] == 1
    for end in ("_u", "_deep.v"):
        group, variable = stats.attrs[f"log_weights{end}"].split("/")
        assert group == "sample_stats"
        assert variable in stats
    assert draws.attrs["draws_are_weighted"] == 0
    assert "resampled" in draws.attrs["draws"]

    data.to_netcdf(tmp_path / "weights.nc")
    back = dataset(az.from_netcdf(str(tmp_path / "weights.nc")), "sample_stats")
    assert back.attrs["draws_are_weighted"] == 1


def test_given_draws_have_no_ancestors_among_the_walkers():
    model, x = sites(("x",), ("rows",)), X.ravel()
    data = ebm.to_arviz(untrained(model, x), model, x, draws={"x": np.zeros((2, 5))})
    assert set(dataset(data, "sample_stats")) == {"log_weight", "energy"}
    assert dataset(data, "posterior_predictive").attrs["draws"] == "given to to_arviz"


@pytest.mark.parametrize(
    ("draws", "match"),
    [
        ({"z": np.zeros((2, 5))}, r"draws names site 'z'.*expected some of \['x'\]"),
        ({"x": np.zeros(5)}, r"draws\['x'\] has shape \(5,\); expected \(chain, draw"),
    ],
)
def test_draws_that_fit_no_site(draws, match):
    model, x = sites(("x",), ("rows",)), X.ravel()
    with pytest.raises(ValueError, match=match):
        ebm.to_arviz(untrained(model, x), model, x, draws=draws)


@pytest.mark.parametrize(
    "draws", [{"tau": np.ones(5)}, {"tau": np.ones((2, 5)), "other": np.ones((2, 4))}]
)
def test_posterior_draws_that_are_not_by_chain(draws):
    with pytest.raises(
        ValueError, match=r"Posterior draws have shapes .*group_by_chain=True"
    ):
        ebm.to_arviz(draws, rows, X.ravel(), MASK.ravel())


def test_attributes_are_strings_and_numbers():
    model, x = sites(("x",), ("rows",)), X.ravel()
    data = ebm.to_arviz(untrained(model, x), model, x)
    for group in ("sample_stats", "posterior_predictive"):
        assert all(
            isinstance(value, str | int)
            for value in dataset(data, group).attrs.values()
        )
    assert json.loads(data.attrs["holdout_chains"]) == [2, 3, 4, 5]


# Posterior draws of odd models


def exported(model, tau, *args, **more):
    """Quadrature's log Z at every draw, and the export with it."""
    draws = {"tau": tau} | more
    log_z = ebm.log_normalizer(
        None, model, draws, *args, batch_ndims=2, method="quadrature"
    )
    return ebm.to_arviz(draws, model, *args, log_normalizer=log_z)


def test_a_mask_that_only_later_draws_change_is_refused():
    """The first draw has every row: the others' zeros became log likelihoods."""

    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0))
        least = numpyro.sample("least", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)), handlers.mask(mask=x > least):
            numpyro.sample("x", bowl(tau), obs=x)

    least = np.where(np.arange(120).reshape(2, 60) == 0, -9.0, 0.0)
    with pytest.raises(ValueError, match="mask at site 'x' is not the same for every"):
        exported(model, TAU, X.ravel(), least=least)


def test_one_value_for_all_rows_of_a_plate():
    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0))
        outer, inner = (
            numpyro.plate("a", 2, dim=-2),
            numpyro.plate("b", 12, dim=-1),
        )
        with outer, inner:
            numpyro.sample("x", bowl(tau), obs=x)
            numpyro.sample("y", dist.Normal(tau, 1.0), obs=0.5)
            numpyro.sample("z", dist.Normal(tau, 1.0), obs=np.array([[0.5], [0.6]]))

    data = exported(model, TAU, X.reshape(2, 12))
    assert dataset(data, "observed_data")["z"].dims == ("a", "b")
    likelihood = dataset(data, "log_likelihood")
    for name in ("x", "y", "z"):
        assert likelihood[name].dims == ("chain", "draw", "a", "b")
        assert likelihood[name].shape == (2, 60, 2, 12)


def test_numpy_data_picked_by_a_plates_indices():
    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0))
        with numpyro.plate("rows", len(x), subsample_size=4) as index:
            numpyro.sample("x", bowl(tau), obs=x[index])

    found = dataset(exported(model, TAU, X.ravel()), "log_likelihood")["x"]
    np.testing.assert_allclose(found, log_density(X.ravel()), rtol=1e-4)


def test_rows_without_a_density_are_told():
    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", bowl(tau), obs=x)

    rows = np.where(np.arange(24) == 3, np.nan, X.ravel())
    with pytest.warns(
        UserWarning, match=r"site 'x' is NaN or infinite at 1 of 24 rows"
    ):
        exported(model, TAU, rows)


def test_rows_under_an_obs_mask():
    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", bowl(tau), obs=x, obs_mask=x > 0)

    with pytest.raises(ValueError, match=r"handlers\.mask"):
        exported(model, TAU, X.ravel())
