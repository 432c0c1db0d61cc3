"""Fits in files: what goes in comes out, and what is no fit is told."""

import json
import zipfile
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.training.state import OnlyParameters

pytestmark = pytest.mark.xdist_group("storage")

X = np.random.default_rng(0).gamma(2.0, 0.5, size=30).astype(np.float32)
NORMAL = dist.Normal(0.0, 1.0)


def model(x):
    rate = numpyro.param("rate", 2.0, constraint=constraints.positive)
    energy = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def backend(optim=None, num_draws=64):
    optim = optax.adam(0.05) if optim is None else optim
    return ebm.MonteCarloMLE(model, optim, num_draws=num_draws)


@pytest.fixture(scope="module")
def fit():
    return backend().run(random.key(0), 20, X, progress_bar=False)


@pytest.fixture(scope="module")
def log_z(fit):
    return ebm.log_normalizer(None, model, fit, X, method="quadrature")


@pytest.fixture
def path(fit, log_z, tmp_path):
    path = tmp_path / "fit.npz"
    ebm.save(path, fit, log_z)
    return path


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(jnp.result_type(ours), jax.dtypes.prng_key):
            assert ours == theirs
        else:
            np.testing.assert_array_equal(ours, theirs)
            assert jnp.result_type(ours) == jnp.result_type(theirs)


def test_a_fit_comes_back_and_goes_on(fit, path):
    """Bit for bit; `test_processes` does it in another process."""
    again = ebm.load(path, backend(), X).fit
    assert_equal(again.params, fit.params)
    assert_equal(again.history, fit.history)
    assert_equal(again.state, fit.state)
    assert repr(again) == repr(fit)

    on = [
        backend().run(random.key(1), 5, X, init_state=state, progress_bar=False)
        for state in (fit.state, again.state)
    ]
    assert_equal(on[0].state, on[1].state)


def test_the_model_alone_is_enough_to_score(fit, log_z, path):
    """Another number of rows, no backend, no optimiser."""
    again, log_z_again = ebm.load(path, model, X[:3])
    assert_equal(again.params, fit.params)
    expected = ebm.log_density(fit, model, X, log_normalizer=log_z)["x"]
    found = ebm.log_density(again, model, X, log_normalizer=log_z_again)["x"]
    np.testing.assert_array_equal(found, expected)
    assert "Fit by MonteCarloMLE after 20 updates" in repr(again)
    idata = ebm.to_arviz(again, model, X, log_normalizer=log_z_again)
    assert np.isfinite(idata.attrs["mean_log_density"])


def test_what_was_read_without_a_state_does_not_go_on(path):
    again = ebm.load(path, model, X).fit
    assert isinstance(again.state, OnlyParameters)
    with pytest.raises(ValueError, match=r"load\(path, backend.*init_params=fit"):
        backend().run(random.key(0), 5, X, init_state=again.state)
    on = backend().run(random.key(0), 1, X, init_params=again, progress_bar=False)
    assert abs(float(on.params["rate"] - again.params["rate"])) < 0.2


def test_a_fit_without_its_state_is_saved_again(log_z, path, tmp_path):
    """With a certificate that it did not have before, say."""
    again = ebm.load(path, model, X).fit
    ebm.save(tmp_path / "again.npz", again, log_z)
    found = ebm.load(tmp_path / "again.npz", model, X)
    assert_equal(found.fit.params, again.params)
    assert float(found.log_normalizer) == float(log_z)
    with pytest.raises(ValueError, match="another state"):
        ebm.load(tmp_path / "again.npz", backend(), X)


def test_no_place_for_a_file(fit, tmp_path):
    for path in (tmp_path, tmp_path / "absent" / "fit.npz"):
        with pytest.raises(FileNotFoundError, match="is no place for a file"):
            ebm.save(path, fit)
    with pytest.raises(TypeError, match="source is a str; expected the backend"):
        ebm.load(tmp_path, "model")


def test_log_z_comes_back_whole(log_z, path):
    again = ebm.load(path, model, X).log_normalizer
    assert again.method == log_z.method
    assert again.flags == log_z.flags
    assert again.conditions == log_z.conditions
    for name in ("estimate", "stderr", "lower", "upper", "ess", "khat", "fingerprints"):
        assert_equal(getattr(again, name), getattr(log_z, name))
    assert str(again) == str(log_z)
    assert float(again) == float(log_z)


def test_flags_stay_flags(fit, tmp_path):
    flagged = ebm.LogNormalizer.exact({"x": np.nan}, fit.params)
    ebm.save(tmp_path / "fit", fit, flagged)
    again = ebm.load(tmp_path / "fit", model, X).log_normalizer
    assert again.flags == flagged.flags
    with pytest.raises(ebm.UncertifiedNormalizerError):
        ebm.normalized(model, again)


def test_a_log_z_of_other_parameters_is_not_saved(fit, tmp_path):
    other = ebm.LogNormalizer.exact({"x": 0.0}, {"rate": jnp.asarray(9.0)})
    with pytest.raises(ValueError, match="belongs to other parameters"):
        ebm.save(tmp_path / "fit.npz", fit, other)
    assert list(tmp_path.iterdir()) == []


def test_a_net_of_equinox_and_numbers_of_half_precision(tmp_path):
    """Neither has a name in NumPy: the structure is code, the type is described."""

    def of_net(x):
        net = eqx_module("net", eqx.nn.MLP(1, "scalar", 4, 1, key=random.key(0)))
        energy = ebm.EnergyDistribution(lambda v: jax.vmap(net)(v[:, None]), NORMAL)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    optim = optax.adam(0.01, mu_dtype=jnp.bfloat16)
    trainer = ebm.MonteCarloMLE(of_net, optim, num_draws=64)
    fit = trainer.run(random.key(0), 3, X, progress_bar=False)
    ebm.save(tmp_path / "fit.npz", fit)
    again, log_z = ebm.load(tmp_path / "fit.npz", trainer, X)
    assert log_z is None
    assert_equal(again.params, fit.params)
    assert_equal(again.state, fit.state)
    leaves = jax.tree.leaves(again.state.optim_state)
    assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in leaves}


# Files that are no fits


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_damaged_file(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"fit\.npz' is damaged, or no file that"):
        ebm.load(path, model, X)


def test_a_changed_byte(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("params['rate'].npy").header_offset
    content[place + 170] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged"):
        ebm.load(path, model, X)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "fit.npz"
    np.savez(path, weights=X)
    with pytest.raises(ValueError, match="no file that ebm_ppl"):
        ebm.load(path, model, X)
    np.save(tmp_path / "array.npy", X)
    with pytest.raises(ValueError, match="no file that ebm_ppl"):
        ebm.load(tmp_path / "array.npy", model, X)
    np.savez(path, weights=np.array([{}]))
    with pytest.raises(ValueError, match="no file that ebm_ppl"):
        ebm.load(path, model, X)
    with pytest.raises(FileNotFoundError):
        ebm.load(tmp_path / "absent.npz", model, X)


def test_a_newer_file(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    described = json.loads(str(arrays["description"])) | {"version": 2}
    np.savez(path, **arrays | {"description": json.dumps(described)})
    with pytest.raises(ValueError, match=r"version 2; expected .* 1 or older"):
        ebm.load(path, model, X)


def renamed(x):
    scale = numpyro.param("scale", 1.0)
    energy = ebm.EnergyDistribution(lambda v: scale * v, NORMAL)
    numpyro.sample("x", energy, obs=x[0])


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (renamed, r"another params.*params\['scale'\] is absent in the file"),
        (backend(optax.sgd(0.05)), r"another state.*state\.optim_state.* absent there"),
    ],
)
def test_a_fit_of_something_else(path, source, match):
    with pytest.raises(ValueError, match=match):
        ebm.load(path, source, X)


def test_another_constraint_is_another_state(path):
    """The state's numbers are unconstrained: log 2 would be taken for a rate."""

    def unconstrained(x):
        rate = numpyro.param("rate", 2.0)
        energy = ebm.EnergyDistribution(lambda v: 0.5 * (rate - 1.0) * v**2, NORMAL)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    other = ebm.MonteCarloMLE(unconstrained, optax.adam(0.05), num_draws=64)
    with pytest.raises(ValueError, match="'rate' has another constraint"):
        ebm.load(path, other, X)


def test_a_model_alone_of_a_narrower_constraint(path):
    def narrower(x):
        rate = numpyro.param("rate", 0.2, constraint=constraints.interval(0.1, 0.3))
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: rate * v**2, NORMAL))

    with pytest.raises(ValueError, match=r"'rate' .* outside of it"):
        ebm.load(path, narrower, X)


def test_log_z_of_another_site(path):
    def other(x):
        rate = numpyro.param("rate", 2.0, constraint=constraints.positive)
        numpyro.sample("y", ebm.EnergyDistribution(lambda v: rate * v**2, NORMAL))

    with pytest.raises(ValueError, match=r"sites \['x'\], but the model .* site 'y'"):
        ebm.load(path, other, X)


def test_other_islands_held_out_are_another_state(tmp_path):
    """Islands that drove the parameters would count as held out, and certify them."""
    made = [
        ebm.Jarzynski(
            model, optax.adam(0.05), num_walkers=8, num_holdout_chains=num, num_chains=8
        )
        for num in (4, 5)
    ]
    state = made[0].init(random.key(0), X)
    params = made[0].get_params(state)
    ebm.save(tmp_path / "fit.npz", ebm.Fit(params, state, {}))
    assert_equal(ebm.load(tmp_path / "fit.npz", made[0], X).fit.state, state)
    with pytest.raises(ValueError, match=r"num_holdout_chains = 4.* has 5"):
        ebm.load(tmp_path / "fit.npz", made[1], X)


def test_the_old_file_stays_where_writing_fails(fit, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ebm.save(path, fit)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_as_readable_as_others(path, tmp_path):
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_only_fits_are_saved(fit, tmp_path):
    with pytest.raises(TypeError, match=r"fit is a dict; expected a Fit"):
        ebm.save(tmp_path / "fit.npz", fit.params)


# What is typed after a fit's dot


@pytest.mark.parametrize("name", ["sample", "save", "log_density", "log_normalizer"])
def test_a_fit_names_the_function(fit, name):
    with pytest.raises(AttributeError, match=rf"'{name}'; write ebm_ppl\.{name}\("):
        getattr(fit, name)


def test_a_fit_is_copied_and_replaced(fit):
    assert replace(fit, history={}).params is fit.params
    with pytest.raises(AttributeError, match="has no attribute 'weights'"):
        _ = fit.weights
