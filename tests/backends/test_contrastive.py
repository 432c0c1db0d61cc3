"""Contrastive divergence: its gradient where moves are exact, and what it leaves out."""

from dataclasses import dataclass, replace

import jax
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
from ebm_ppl.kernels.base import Kernel, KernelInfo

pytestmark = pytest.mark.xdist_group("contrastive")

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=400) / 2).astype(np.float32)
SKEWED = RNG.gamma(2.0, 0.5, size=400).astype(np.float32)
GRID = np.linspace(-12, 12, 20_001)
METHODS = ["persistent", "data", "base"]


@dataclass(frozen=True)
class Quantiles(Kernel):
    """Places walkers at quantiles of a one-dimensional target: draws without noise."""

    def step(self, rng_key, state, target, tuning):
        grid = jnp.linspace(-12.0, 12.0, 20_001)
        mass = jnp.cumsum(jax.nn.softmax(-target.value(grid).potential))
        num = len(state.position)
        places = jnp.interp((jnp.arange(num) + 0.5) / num, mass, grid)
        ones = jnp.ones_like(state.potential)
        return self.evaluate(target, places), KernelInfo(0 * ones, ones)


@dataclass(frozen=True)
class Still(Kernel):
    """Leaves walkers where they are."""

    def step(self, rng_key, state, target, tuning):
        ones = jnp.ones_like(state.potential)
        return state, KernelInfo(0 * ones, ones)


def precision(x):
    lam = numpyro.param("lam", 1.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (lam - 1) * v**2, dist.Normal(0.0, 1.0)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def quartic(x):
    """Skewed: U = a v⁴ / 4 − b v + ½ ((v − ½) / 1.5)²."""
    a, b = numpyro.param("a", 0.5), numpyro.param("b", 0.5)
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * a * v**4 - b * v, dist.Normal(0.5, 1.5)
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def gradients(model, x, **options):
    """By one plain update of rate 1."""
    options = {"num_walkers": 2000, **options}
    backend = ebm.ContrastiveDivergence(model, optax.sgd(1.0), **options)
    state = backend.init(random.key(0), x)
    new, _ = jax.jit(backend.update)(state, x)
    return {name: float(state.params[name] - new.params[name]) for name in new.params}


def mean_under(density, statistic):
    return np.sum(density * statistic) / np.sum(density)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_likelihoods_where_moves_are_exact(method):
    """Quantiles leave out half of a walker at either end: 1/n of the tails."""
    x = np.tile(ROWS, 5)
    (found,) = gradients(precision, x, kernel=Quantiles(), method=method).values()
    right = len(x) * 0.5 * (np.mean(x**2) - 1 / 1.5)
    assert found == pytest.approx(right, rel=1e-2)

    x = np.tile(SKEWED, 5)
    found = gradients(quartic, x, kernel=Quantiles(), method=method)
    potential = 0.125 * GRID**4 - 0.5 * GRID + 0.5 * ((GRID - 0.5) / 1.5) ** 2
    density = np.exp(-potential)
    right_a = np.mean(x**4.0) - mean_under(density, GRID**4)
    right_b = np.mean(x) - mean_under(density, GRID)
    assert found["a"] == pytest.approx(0.25 * len(x) * right_a, rel=1e-2)
    assert found["b"] == pytest.approx(-len(x) * right_b, rel=1e-2)


def test_walkers_begin_where_the_method_says():
    """Left there, they give the data's own gradient, or the base's."""
    (found,) = gradients(precision, ROWS, kernel=Still(), method="data").values()
    assert found == 0.0

    for method in ("base", "persistent"):
        (found,) = gradients(precision, ROWS, kernel=Still(), method=method).values()
        error = len(ROWS) * 0.5 * np.sqrt(2 / 2000)
        assert abs(found - len(ROWS) * 0.5 * (np.mean(ROWS**2) - 1.0)) < 4 * error


def test_moves_have_noise_of_their_own():
    """Apart from that of where walkers begin: draws of a normal stay draws of it."""

    def model(x):
        a = numpyro.param("a", 0.0)
        energy = ebm.EnergyDistribution(lambda v: a * v, dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    backend = ebm.ContrastiveDivergence(
        model, optax.sgd(0.0), kernel=ebm.MALA(0.1), num_walkers=4000, reset_rate=0.99
    )
    new, _ = jax.jit(backend.update)(backend.init(random.key(0), ROWS), ROWS)
    assert abs(np.var(new.position["x"]) - 1.0) < 4 * np.sqrt(2 / 4000)


def test_a_share_begins_again():
    backend = ebm.ContrastiveDivergence(
        precision, optax.sgd(0.0), kernel=Still(), reset_rate=0.2
    )
    state = backend.init(random.key(0), ROWS)
    far = replace(state, position={"x": jnp.full(1024, 50.0)})
    new, _ = jax.jit(backend.update)(far, ROWS)
    share = float(np.mean(np.asarray(new.position["x"]) < 10.0))
    assert abs(share - 0.2) < 4 * np.sqrt(0.16 / 1024)


def test_persistent_walkers_find_a_precision():
    rate = optax.cosine_decay_schedule(5e-2, 800)
    backend = ebm.ContrastiveDivergence(precision, optax.adam(rate))
    fit = backend.run(random.key(0), 800, ROWS, progress_bar=False)
    right = 1 / np.mean(ROWS**2)
    # Walkers of the last 80 updates, which remember one another for some ten.
    error = right * np.sqrt(2 / (1024 * 8))
    assert abs(fit.params["lam"] - right) < 4 * error

    (population,) = fit.state.populations(random.key(1), {}).values()
    assert population.values.shape == (4, 256)
    assert population.log_weight is None


def test_walkers_that_are_stuck_are_told():
    """Their gradient never ends, and the rate runs on."""
    backend = ebm.ContrastiveDivergence(precision, optax.adam(1e-2), kernel=Still())
    with pytest.warns(UserWarning, match="Not at a maximum: parameter 'lam'"):
        backend.run(random.key(0), 900, ROWS, progress_bar=False)


def test_masks_scales_and_rows_of_their_own():
    """CD-k of 100 of 400 rows; one energy for each row of a batch; rows that are masked."""
    x = RNG.normal(size=400).astype(np.float32)
    y = (1.5 * x + RNG.normal(size=400)).astype(np.float32)
    keep = np.arange(400) % 3 > 0
    filled = np.where(keep, y, np.nan).astype(np.float32)

    def model(x, y, keep):
        w = numpyro.param("w", 0.0)
        with (
            numpyro.plate("rows", 4 * len(x), subsample_size=len(x)),
            handlers.mask(mask=keep),
        ):
            base = dist.Normal(jnp.zeros(len(x)), 1.0)
            numpyro.sample(
                "y", ebm.EnergyDistribution(lambda v: -w * x * v, base), obs=y
            )

    def gradient(x, y, keep, kernel):
        backend = ebm.ContrastiveDivergence(
            model, optax.sgd(1.0), method="data", kernel=kernel
        )
        state = backend.init(random.key(0), x, y, keep)
        new, _ = jax.jit(backend.update)(state, x, y, keep)
        return float(state.params["w"] - new.params["w"])

    @dataclass(frozen=True)
    class ToZero(Kernel):
        def step(self, rng_key, state, target, tuning):
            ones = jnp.ones_like(state.potential)
            return self.evaluate(target, 0 * state.position), KernelInfo(0 * ones, ones)

    # Walkers at y = 0 have no gradient: what is left is the data's.
    right = -4 * np.sum((x * y)[keep])
    assert gradient(x, filled, keep, ToZero()) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("method", ["persistent", "base"])
def test_walkers_beyond_a_wall_do_not_count(method):
    """A normal of precision λ cut at 0; half of the base's draws begin beyond it."""

    def model(x):
        lam = numpyro.param("lam", 1.5)

        def energy(v):
            return jnp.where(v > 0, 0.5 * (lam - 1) * v**2, jnp.inf)

        with numpyro.plate("rows", len(x)):
            base = dist.Normal(0.0, 1.0)
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    x = np.abs(ROWS)
    (found,) = gradients(model, x, kernel=Still(), method=method).values()
    error = len(x) * 0.5 * np.sqrt(2 / 1000)
    assert abs(found - len(x) * 0.5 * (np.mean(x**2) - 1.0)) < 4 * error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cd"}, "method = 'cd'; expected one of"),
        ({"num_walkers": 0}, "num_walkers = 0; expected at least 1"),
        ({"num_kernel_steps": 0}, "num_kernel_steps = 0; expected at least 1"),
        ({"reset_rate": 1.0}, "reset_rate = 1.0; expected a probability under 1"),
        ({"reset_rate": 0.1, "method": "data"}, "reset_rate = 0.1 has no meaning"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ebm.ContrastiveDivergence(precision, optax.sgd(0.1), **options)


def test_supports_are_checked():
    def model(x):
        a = numpyro.param("a", 0.0)
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda v: a * v, dist.Bernoulli(0.5)), obs=x
        )

    with pytest.raises(ValueError, match="'x' has a discrete support"):
        ebm.ContrastiveDivergence(model, optax.sgd(0.1)).init(random.key(0), 1)

    def flat(x):
        a = numpyro.param("a", 1.0, constraint=constraints.positive)
        base = dist.ImproperUniform(constraints.real, (), ())
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: a * v**2, base), obs=x)

    with pytest.raises(ebm.UnknownNormalizerError, match="nowhere to start from"):
        ebm.ContrastiveDivergence(flat, optax.sgd(0.1)).init(random.key(0), 1.0)
