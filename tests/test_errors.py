"""Every misuse stops with an error that names the site, what was found and what to
write instead."""

import warnings
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints

import ebm_ppl as ebm

X = np.random.default_rng(0).normal(size=12).astype(np.float32)
NORMAL = dist.Normal(0, 1)
FLAT = dist.ImproperUniform(constraints.real, (), ())
SETTINGS = {"num_chains": 6, "num_walkers": 8}


def tilt():
    """E = −a v with a = 0: walkers start at the base."""
    a = numpyro.param("a", jnp.zeros(()))
    return lambda v: -a * v


def declare(obs, base=NORMAL, **options):
    numpyro.sample("x", ebm.EnergyDistribution(tilt(), base, **options), obs=obs)


def model(x, base=NORMAL):
    with numpyro.plate("rows", len(x)):
        declare(x, base)


def initialise(model, *args):
    return ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).init(random.key(0), *args)


def refused(model, *args, match, error=ValueError):
    with pytest.raises(error, match=match):
        initialise(model, *args)


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_walkers": 0}, "num_walkers = 0; expected at least 1"),
        ({"num_kernel_steps": 0}, "num_kernel_steps = 0; expected at least 1"),
        (
            {"num_holdout_chains": 1},
            "num_holdout_chains = 1; expected at least 2.*standard error",
        ),
        ({"num_holdout_chains": 0}, "num_holdout_chains = 0; expected at least 2"),
        (
            {"num_chains": 4},
            "num_chains = 4 with num_holdout_chains = 4 .*expected num_chains > "
            "num_holdout_chains",
        ),
        (
            {"ess_target": 0.0},
            r"ess_target = 0.0; expected a fraction in \(0, 1\), or None",
        ),
        (
            {"ess_target": 1.0},
            r"ess_target = 1.0; expected a fraction in \(0, 1\), or None",
        ),
        (
            {"ess_threshold": 1.5},
            r"ess_threshold = 1.5; expected a fraction in \[0, 1\]",
        ),
        (
            {"ess_threshold": -0.1},
            r"ess_threshold = -0.1; expected a fraction in \[0, 1\]",
        ),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        ebm.Jarzynski(model, optax.sgd(0.1), **options)


@pytest.mark.parametrize("num_holdout_chains", [2, 3])
def test_few_held_out_islands_warn(num_holdout_chains):
    with pytest.warns(
        UserWarning,
        match=f"num_holdout_chains = {num_holdout_chains}: under 4 .*standard error",
    ) as caught:
        ebm.Jarzynski(model, optax.sgd(0.1), num_holdout_chains=num_holdout_chains)
    assert caught[0].filename == __file__


def test_four_held_out_islands_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ebm.Jarzynski(model, optax.sgd(0.1), num_holdout_chains=4)


@pytest.mark.parametrize("optim", [0.1, numpyro.optim.Adam(0.1), optax.sgd])
def test_an_optimiser_that_is_not_optax(optim):
    with pytest.raises(
        TypeError,
        match=f"optim is a {type(optim).__name__}; expected an optax .*optax.adam",
    ):
        ebm.Jarzynski(model, optim)


ENERGY = ebm.EnergyDistribution(jnp.square, NORMAL)


@pytest.mark.parametrize(
    ("rng_key", "found"),
    [
        (0, "a int"),
        (X, r"an array of float32 and shape \(12,\)"),
        (random.split(random.key(0)), r"an array of key<fry> and shape \(2,\)"),
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        lambda key: ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).init(key, X),
        lambda key: ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).run(key, 1, X),
        lambda key: ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).template(key, X),
        lambda key: ebm.log_normalizer(key, ENERGY),
        lambda key: ebm.sample(key, ENERGY),
        lambda key: ebm.score_test(key, {"a": 0.0}, model, X),
        lambda key: ebm.polish(key, {"a": 0.0}, model, X),
    ],
    ids=["init", "run", "template", "log_normalizer", "sample", "score_test", "polish"],
)
def test_what_is_no_key(ask, rng_key, found):
    with pytest.raises(TypeError, match=rf"rng_key is {found}.*jax\.random\.key\(0\)"):
        ask(rng_key)


def test_a_key_of_the_older_kind_is_one():
    log_z = ebm.log_normalizer(random.PRNGKey(0), ENERGY, method="quadrature")
    assert float(log_z) == pytest.approx(-0.5 * np.log(3), abs=1e-5)


@pytest.mark.parametrize("wrong", [0.5, [1.0], ENERGY])
def test_what_are_no_parameters(wrong):
    for ask in (ebm.score_test, ebm.polish):
        with pytest.raises(TypeError, match=r"expected a Fit, or constrained param"):
            ask(random.key(0), wrong, model, X)
    with pytest.raises(TypeError, match=r"expected a Fit, or constrained param"):
        ebm.log_normalizer(random.key(0), model, wrong, X)


def test_a_fit_is_no_state():
    backend = ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS)
    fit = ebm.Fit({"a": jnp.zeros(())}, None, {})
    with pytest.raises(TypeError, match=r"init_state is a Fit.*init_state=fit\.state"):
        backend.run(random.key(0), 1, X, init_state=fit)


# What to do where log Z is unknown: the easiest way, and a constant where that serves


@pytest.mark.parametrize(
    ("energy", "match"),
    [
        (ENERGY, r"1 dimension: ebm_ppl\.normalized\(model\).*log_normalizer=0\.0"),
        (
            ebm.EnergyDistribution(
                lambda v: v.sum(-1), dist.Normal(0, 1).expand([2]).to_event(1)
            ),
            r"2 dimensions: ebm_ppl\.normalized\(model\)",
        ),
        (
            ebm.EnergyDistribution(
                lambda v: v.sum(-1), dist.Normal(0, 1).expand([9]).to_event(1)
            ),
            r"Jarzynski\(model.*log_normalizer\(rng_key, model, fit.*0\.0",
        ),
        (
            ebm.EnergyDistribution(jnp.sqrt, dist.Categorical(logits=jnp.zeros(4))),
            r"states are few: ebm_ppl\.normalized\(model\)",
        ),
        (
            ebm.EnergyDistribution(jnp.sqrt, dist.Poisson(2.0)),
            r"Sum it by hand",
        ),
    ],
)
def test_the_way_out_of_an_unknown_normaliser(energy, match):
    value = jnp.ones(
        energy.event_shape, jnp.result_type(energy.base.sample(random.key(0)))
    )
    with pytest.raises(ebm.UnknownNormalizerError, match=match):
        energy.log_prob(value)
    with pytest.raises(ebm.UnknownNormalizerError, match=match):
        energy.sample(random.key(0))


def test_no_constant_is_offered_where_parameters_are_learned():
    def log_density(a):
        return ebm.EnergyDistribution(lambda v: a * v**2, NORMAL).log_prob(0.3)

    with pytest.raises(ebm.UnknownNormalizerError) as caught:
        jax.grad(log_density)(1.0)
    assert "log_normalizer=0.0" not in str(caught.value)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_steps(num_steps):
    backend = ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS)
    with pytest.raises(
        ValueError, match=f"num_steps = {num_steps}; expected at least 1"
    ):
        backend.run(random.key(0), num_steps, X, progress_bar=False)


def test_initial_values_of_unknown_parameters():
    with pytest.raises(ValueError, match=r"init_params names \['b'\]"):
        ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).init(
            random.key(0), X, init_params={"b": 1.0}
        )


def test_an_initial_value_of_the_wrong_shape():
    with pytest.raises(
        ValueError, match=r"init_params\['a'\] has shape \(3,\); expected \(\)"
    ):
        ebm.Jarzynski(model, optax.sgd(0.1), **SETTINGS).init(
            random.key(0), X, init_params={"a": jnp.zeros(3)}
        )


def test_a_start_that_cannot_reach_the_whole_support():
    """Walkers would stay positive: log Z of half of the line."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            declare(x, FLAT, start=dist.HalfNormal(1.0))

    refused(
        model,
        np.abs(X),
        match=r"start of the energy at site 'x'.*leaves out part of the base's",
    )


def test_an_energy_that_is_nan_on_part_of_the_base():
    """log v of a negative draw: named as NaN, not as far from the base."""

    def model(x):
        a = numpyro.param("a", jnp.ones(()))
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: -a * jnp.log(v), NORMAL), obs=x
            )

    refused(model, np.abs(X), match=r"site 'x' is NaN at \d+ of 256 draws of its base")


# The declaration


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((1.0, NORMAL), {}, TypeError, "'energy' is a float; expected a callable"),
        (
            ({"bowl": jnp.square, "tilt": 3}, NORMAL),
            {},
            TypeError,
            "'tilt' is a int; expected a callable",
        ),
        (({}, NORMAL), {}, ValueError, "empty; name at least one"),
        (
            (jnp.square, 0.5),
            {},
            TypeError,
            "base is a float; expected a numpyro Distribution",
        ),
        (
            (jnp.square, dist.Normal(0, 1).expand([3]).to_event(1)),
            {"start": NORMAL},
            ValueError,
            r"start has shape \(\); expected the base's \(3,\).*start.expand",
        ),
        (
            (jnp.square, FLAT),
            {"start": 0.5},
            TypeError,
            "start is a float; expected a numpyro Distribution",
        ),
        (
            (jnp.square, NORMAL),
            {"log_normalizer": np.zeros(3)},
            ValueError,
            r"log_normalizer has shape \(3,\); expected a scalar or the base's batch "
            r"shape \(\)",
        ),
    ],
)
def test_declarations_that_cannot_be(arguments, options, error, match):
    with pytest.raises(error, match=match):
        ebm.EnergyDistribution(*arguments, **options)


@pytest.mark.parametrize(
    ("energy", "found"),
    [
        (lambda v: v**2, r"\(12, 2\)"),
        (lambda v: (v**2).sum(-1, keepdims=True), r"\(12, 1\)"),
        (lambda v: (v**2).sum(), r"\(\)"),
    ],
)
def test_an_energy_of_the_wrong_shape_is_named_with_its_factor(energy, found):
    distribution = ebm.EnergyDistribution(
        {"bowl": energy}, dist.Normal(0, 1).expand([2]).to_event(1)
    )
    with pytest.raises(
        ValueError,
        match=rf"factor 'bowl' returned shape {found} .*expected \(12,\).*sum\(-1\)",
    ):
        distribution.energy(np.zeros((12, 2)))


def test_an_energy_of_the_wrong_shape_names_its_site():
    def wrong(x):
        a = numpyro.param("a", 0.0)
        base = dist.Normal(0, 1).expand([2]).to_event(1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: a * v, base), obs=x)

    refused(
        wrong,
        np.zeros((12, 2)),
        match=r"site 'x' returned shape \(\d+, 2\).*expected \(\d+,\)",
    )


def test_a_value_of_the_wrong_shape():
    distribution = ebm.EnergyDistribution(
        lambda v: v.sum(-1), dist.Normal(0, 1).expand([3]).to_event(1)
    )
    with pytest.raises(
        ValueError,
        match=r"value has shape \(5, 2\); expected \(\.\.\., 3\).*event shape \(3,\)",
    ):
        distribution.energy(np.zeros((5, 2)))


# Data


def test_nan_and_infinite_data():
    for bad in (np.nan, np.inf, -np.inf):
        x = X.copy()
        x[[3, 7]] = bad
        refused(
            model,
            x,
            match=r"site 'x' is NaN or infinite in 2 of 12 rows \(first: row 3\).*handlers.mask",
        )


def masked_model(x, mask):
    with numpyro.plate("rows", len(x)), handlers.mask(mask=mask):
        declare(x)


def test_nan_rows_that_are_masked_are_fine():
    x, mask = X.copy(), np.ones(12, bool)
    x[3], mask[3] = np.nan, False
    initialise(masked_model, x, mask)


def test_nan_rows_that_are_not_masked():
    x, mask = X.copy(), np.ones(12, bool)
    x[3], mask[4] = np.nan, False
    refused(
        masked_model,
        x,
        mask,
        match=r"site 'x' is NaN or infinite in 1 of 12 rows \(first: row 3\)",
    )


def test_data_of_the_wrong_event_shape():
    base = dist.Normal(0, 1).expand([3]).to_event(1)

    def wrong(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: a * v.sum(-1), base), obs=x
            )

    refused(
        wrong,
        np.zeros((12, 2)),
        match=r"site 'x' has shape \(12, 2\).*expected.*3.*event shape \(3,\)",
    )


def test_data_without_its_plate():
    refused(declare, X, match=r"'x' has shape \(12,\); expected \(\)")


def test_an_empty_plate():
    refused(model, X[:0], match="Plate 'rows' has size 0: there are no rows")


# Bases


def test_an_improper_base_without_a_start():
    refused(
        model,
        X,
        FLAT,
        match=r"site 'x' is improper.*start=",
        error=ebm.UnknownNormalizerError,
    )


def test_an_improper_base_under_wrappers_without_a_start():
    def wrapped(x):
        a = numpyro.param("a", 0.0)
        base = dist.ImproperUniform(constraints.real, (2,), ()).to_event(1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: a * v.sum(-1), base), obs=x
            )

    refused(
        wrapped,
        np.zeros((12, 2)),
        match=r"site 'x' is improper.*start=",
        error=ebm.UnknownNormalizerError,
    )


def test_an_improper_start():
    with pytest.raises((ValueError, ebm.UnknownNormalizerError), match="improper"):
        initialise(lambda: declare(0.5, FLAT, start=FLAT))


def test_a_discrete_support():
    counts = np.arange(12)
    refused(
        model,
        counts,
        dist.Poisson(3.0),
        match=r"site 'x' has a discrete support.*continuous",
    )


def test_an_own_batch_shape_under_a_subsampled_plate():
    def one_z_per_row(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x), subsample_size=4):
            base = dist.Normal(numpyro.subsample(x, event_dim=0), 1)
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(lambda v: a * v, base),
                obs=numpyro.subsample(x, event_dim=0),
            )

    refused(
        one_z_per_row,
        X,
        match="site 'x' has one normaliser per row of plate 'rows', which is subsampled.*Drop",
    )


def test_an_energy_of_the_rows_of_a_mini_batch():
    def leaking(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x), subsample_size=4):
            rows = numpyro.subsample(x, event_dim=0)
            energy = ebm.EnergyDistribution(lambda v: a * rows.mean() * v, NORMAL)
            numpyro.sample("x", energy, obs=rows)

    refused(
        leaking,
        X,
        match="energy at site 'x' changes with the random key.*subsampled plate",
    )


# Models


def test_no_energy_site():
    def plain(x):
        numpyro.sample("x", dist.Normal(numpyro.param("a", 0.0), 1), obs=x)

    refused(
        plain, 0.5, match=r"no energy site.*EnergyDistribution\(energy, base\).*SVI"
    )


def test_no_parameters():
    def fixed(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(jnp.square, NORMAL), obs=x)

    refused(fixed, X, match="no parameters to fit")


def test_an_unobserved_energy_site():
    refused(
        declare, None, match="Energy site 'x' is not observed.*obs=.*log_normalizer="
    )


def test_obs_mask():
    def partly_observed(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(tilt(), NORMAL),
                obs=x,
                obs_mask=np.arange(len(x)) > 2,
            )

    refused(
        partly_observed, X, match=r"site 'x.* is not observed.*obs_mask=.*handlers.mask"
    )


def test_an_energy_site_whose_normaliser_is_known():
    refused(
        lambda x: declare(x, log_normalizer=0.0),
        0.5,
        match="site 'x' already has a log_normalizer.*SVI or MCMC",
    )


def test_a_discrete_latent():
    def mixture(x):
        numpyro.sample("z", dist.Bernoulli(0.5))
        declare(x)

    refused(mixture, 0.5, match="site 'z' is discrete.*Marginalise")


def test_a_latent_in_a_plate():
    def hierarchy(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(0, 1))
            declare(x)

    refused(hierarchy, X, match="site 'z' is local to plate rows.*global.*marginalise")


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, v, deterministic):
        return nn.Dense(1)(
            nn.Dropout(0.5, deterministic=deterministic)(nn.tanh(nn.Dense(8)(v)))
        )[..., 0]


def dropout_model(x, deterministic):
    net = flax_module("net", Dropout(), input_shape=(1, 1), deterministic=True)
    rngs = None if deterministic else {"dropout": numpyro.prng_key()}
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(
            lambda v: 0.001 * net(v[..., None], deterministic, rngs=rngs), NORMAL
        )
        numpyro.sample("x", energy, obs=x)


def test_dropout():
    refused(
        dropout_model,
        X,
        False,
        match="energy at site 'x' changes with the random key.*dropout.*deterministic=True",
    )


def test_dropout_that_is_switched_off_is_fine():
    initialise(dropout_model, X, True)


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, v):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(v))[..., 0]


def test_batch_norm():
    def stateful(x):
        net = flax_module(
            "net", BatchNorm(), input_shape=(1, 1), mutable=["batch_stats"]
        )
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: net(v[..., None]), NORMAL), obs=x
            )

    refused(stateful, X, match="'net.*' is mutable state.*batch norm.*layer norm")


# Numbers that go wrong on the way


def scaled_model(x, energy):
    scale = numpyro.param("scale", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: scale * energy(v), NORMAL), obs=x
        )


def test_an_energy_not_bounded_below():
    """−v⁴ has no normaliser: walkers run away."""
    refused(
        scaled_model,
        X,
        lambda v: -(v**4),
        match="site 'x'.*stopped at inverse temperature.*not bounded below.*start=",
    )


def test_annealing_whose_islands_disagree():
    """Two temperatures to a mode 10 base scales away and 10 times narrower."""
    backend = ebm.Jarzynski(
        scaled_model, optax.sgd(0.1), num_temperatures=2, **SETTINGS
    )
    with pytest.warns(
        UserWarning,
        match="site 'x': its islands disagree about log Z.*not be bounded below",
    ):
        backend.init(random.key(0), X, lambda v: 50 * (v - 10.0) ** 2)


def breaking_model(x):
    a = numpyro.param("a", jnp.zeros(()))
    with numpyro.plate("rows", len(x)):
        numpyro.sample(
            "x",
            ebm.EnergyDistribution(
                lambda v: -jnp.where(a > 1.5, jnp.nan, a) * v, NORMAL
            ),
            obs=x,
        )


def test_an_energy_that_goes_nan_keeps_the_last_good_state():
    """All x = 3 pull a up by 0.01 · 12 · (3 − E[x]) a step, E[x] near a: over the cliff
    in under twenty steps."""
    x = np.full(12, 3.0, np.float32)
    backend = ebm.Jarzynski(
        breaking_model, optax.sgd(0.01), ess_target=None, **SETTINGS
    )
    start = backend.init(random.key(0), x)
    with pytest.raises(
        ebm.NonFiniteError, match=r"NaN or an infinity.*learning rate"
    ) as caught:
        backend.run(random.key(0), 500, x, init_state=start, progress_bar=False)
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert f"Step {error.step} " in str(error)
    assert "site 'x'" in str(error)
    assert 3 <= error.step < 50
    history = error.fit.history
    assert all(
        len(leaf) == error.step
        for leaf in (history["loss"], history["ess"]["x"], history["grad_norm"])
    )
    assert np.isfinite(history["loss"]).all()
    assert 0 < error.fit.params["a"] <= 1.5
    assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(error.fit.state.walkers["x"])
    )
    # Exactly the state that as many good steps give.
    good = backend.run(
        random.key(0), error.step, x, init_state=start, progress_bar=False
    )
    np.testing.assert_array_equal(good.history["loss"], history["loss"])
    jax.tree.map(
        np.testing.assert_array_equal,
        with_raw_key(good.state),
        with_raw_key(error.fit.state),
    )


def with_raw_key(state):
    return replace(state, rng_key=random.key_data(state.rng_key))


def test_a_first_step_that_is_nan_gives_an_empty_history():
    x = np.full(12, 3.0, np.float32)
    backend = ebm.Jarzynski(breaking_model, optax.sgd(1.0), ess_target=None, **SETTINGS)
    with pytest.raises(ebm.NonFiniteError) as caught:
        backend.run(random.key(0), 5, x, progress_bar=False)
    assert caught.value.step == 0
    assert caught.value.fit.history["loss"].shape == (0,)
    assert caught.value.fit.params["a"] == 0


# log_normalizer and to_arviz


def test_log_normalizer_needs_two_islands():
    with pytest.raises(ValueError, match="num_chains = 1; expected at least 2"):
        ebm.log_normalizer(
            random.key(0), ebm.EnergyDistribution(jnp.square, NORMAL), num_chains=1
        )


def test_log_normalizer_needs_an_energy_site():
    with pytest.raises(ValueError, match="no energy site"):
        ebm.log_normalizer(
            random.key(0), lambda: numpyro.sample("y", dist.Normal(0, 1))
        )


def test_log_normalizer_of_a_discrete_support():
    with pytest.raises(ValueError, match="discrete"):
        ebm.log_normalizer(
            random.key(0), ebm.EnergyDistribution(jnp.square, dist.Poisson(3.0))
        )


def test_data_outside_the_support_of_the_base():
    def model(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(lambda v: a * v, dist.Exponential(1.0)),
                obs=x,
            )

    x = np.array([0.5, 1.0, -0.1, 2.0])
    backend = ebm.Jarzynski(model, optax.adam(0.1), num_walkers=4)
    with pytest.raises(
        ValueError, match=r"site 'x' lies outside .* 1 of 4 rows \(first: row 2\)"
    ):
        backend.init(random.key(0), x)
