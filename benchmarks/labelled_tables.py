"""Semi-supervised tables: loading, one preparation for all, labels, baselines and the
joint energy model."""

import pathlib
import sys
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array, random
from jax.nn import logsumexp, softmax
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.handlers import scale

import ebm_ppl as ebm

NAMES = ("optdigits", "satimage", "spambase", "magic", "shuttle")
LABELS_PER_CLASS = 10
BATCH = 256
LABEL_WEIGHT = 3.0
NUM_LATENTS = 32


@dataclass(frozen=True)
class Table:
    """Standardised features and labels of both splits.

    Attributes:
        x, x_test: ``(rows, features)``, float32.
        y, y_test: Class of every row, 0, 1, …
        mean, spread: Of the features in their own units, ``(features,)``.
        gap: Width of a value of an integer feature in the units of ``x``, 0 for other
            features, ``(features,)``.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    gap: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(self.y.max()) + 1

    def raw(self, x: np.ndarray) -> np.ndarray:
        return x * self.spread + self.mean

    def standardised(self, raw: np.ndarray) -> np.ndarray:
        return (raw - self.mean) / self.spread

    def dequantised(self, rng_key: Array, x: Array) -> Array:
        return x + self.gap * (random.uniform(rng_key, x.shape) - 0.5)


def load(folder, name) -> Table:
    """Read one table: constant features are dropped, others standardised by the
    training rows."""
    path = pathlib.Path(folder) / f"{name}.npz"
    if not path.exists():
        sys.exit(
            f"{path} is missing: this benchmark needs {name}.npz with X_train, "
            "y_train, X_test, y_test."
        )
    data = np.load(path)
    x, x_test = (
        np.asarray(data[f"X_{part}"], float).reshape(len(data[f"X_{part}"]), -1)
        for part in ("train", "test")
    )
    classes, y = np.unique(data["y_train"], return_inverse=True)
    assert np.all(np.isin(data["y_test"], classes)), (
        f"{name}: test classes that no training row has"
    )
    kept = np.ptp(x, axis=0) > 0
    x, x_test = x[:, kept], x_test[:, kept]
    is_integer = np.all(x == np.round(x), axis=0)
    spread = np.sqrt(x.var(0) + is_integer / 12)
    mean = x.mean(0)
    return Table(
        x=((x - mean) / spread).astype(np.float32),
        y=y,
        x_test=((x_test - mean) / spread).astype(np.float32),
        y_test=np.searchsorted(classes, data["y_test"]),
        mean=mean,
        spread=spread,
        gap=np.where(is_integer, 1 / spread, 0.0).astype(np.float32),
    )


def draw_labels(y: np.ndarray, seed: int) -> np.ndarray:
    """Rows that keep their label: min(10, class size) of every class."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(y == k) for k in range(y.max() + 1)]
    return np.concatenate(
        [rng.choice(r, min(LABELS_PER_CLASS, len(r)), replace=False) for r in rows]
    )


class Net(nn.Module):
    """256-256-outputs with swish; the last layer starts at zero, so that the energy
    starts at the base."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.swish(nn.Dense(256)(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros)(x)


class GeneratorNet(nn.Module):
    """256-256-outputs with leaky ReLU."""

    outputs: int

    @nn.compact
    def __call__(self, z):
        for _ in range(2):
            z = nn.leaky_relu(nn.Dense(256)(z), 0.2)
        return nn.Dense(self.outputs)(z)


def gaussian(table: Table) -> dist.MultivariateNormal:
    """The base: mean and covariance of the dequantised training rows, with a small
    ridge."""
    x = np.asarray(table.dequantised(random.key(1), table.x), float)
    cov = np.cov(x.T)
    cov += 1e-3 * np.mean(np.diag(cov)) * np.eye(len(cov))
    return dist.MultivariateNormal(
        jnp.asarray(x.mean(0), jnp.float32), jnp.asarray(cov, jnp.float32)
    )


class Joint(NamedTuple):
    """A joint model of one table and one draw of labels."""

    model: object
    data: tuple
    base: dist.MultivariateNormal
    net: Net


def joint(table: Table, chosen: np.ndarray) -> Joint:
    """p(x, y): all rows under the energy −logsumexp of the logits, labelled rows under
    their softmax.

    Labels are drawn per class, not from the population: given x, they follow p(y | x)
    times the number of labels of class y over its share, which the rows without labels
    tell.
    """
    base, net = gaussian(table), Net(table.num_classes)
    num_labels = jnp.asarray(np.bincount(table.y[chosen], minlength=table.num_classes))
    num_rows, num_features = table.x.shape

    def model(x, x_labelled, y):
        logits = flax_module("net", net, input_shape=(num_features,))
        energy = lambda v: -logsumexp(logits(v), axis=-1)  # noqa: E731
        with numpyro.plate("rows", num_rows, subsample_size=BATCH):
            batch = table.dequantised(
                numpyro.prng_key(), numpyro.subsample(x, event_dim=1)
            )
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)
        # Labelled rows count as often as they are met in a batch: a class may have no
        # other there.
        counts = num_labels * BATCH / num_rows + jnp.sum(softmax(logits(batch)), axis=0)
        log_odds = jnp.log(num_labels / counts)
        # Scaled as if every row were labelled, and by the weight of labels against
        # densities.
        with (
            numpyro.plate("labelled", len(chosen)),
            scale(scale=LABEL_WEIGHT * num_rows / len(chosen)),
        ):
            found = logits(table.dequantised(numpyro.prng_key(), x_labelled))
            numpyro.sample("y", dist.Categorical(logits=found + log_odds), obs=y)

    data = (
        jnp.asarray(table.x),
        jnp.asarray(table.x[chosen]),
        jnp.asarray(table.y[chosen]),
    )
    return Joint(model, data, base, net)


def fit_jarzynski(problem: Joint, seed: int, num_steps: int) -> ebm.Fit:
    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, num_steps, 0.05), weight_decay=1e-4
    )
    backend = ebm.Jarzynski(
        problem.model, optim, num_chains=16, num_walkers=32, num_kernel_steps=3
    )
    return backend.run(random.key(seed), num_steps, *problem.data, progress_bar=False)


def make_generator(base: dist.Distribution):
    (num_features,) = base.event_shape

    def generator():
        net = flax_module(
            "generator", GeneratorNet(num_features), input_shape=(NUM_LATENTS,)
        )
        noise = numpyro.param("scale", 0.5, constraint=constraints.interval(0.01, 1.0))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([NUM_LATENTS]).to_event(1))
        numpyro.sample("x", ebm.standardized_normal(base, net(z), noise))

    return generator


def fit_vera(
    problem: Joint,
    seed: int,
    num_steps: int,
    *,
    gradient_penalty: float = 1.0,
    rates: tuple[float, float] = (3e-4, 6e-4),
) -> ebm.Fit:
    # Without momentum: with it the two players circle each other.
    optim, generator_optim = (
        optax.adam(optax.cosine_decay_schedule(rate, num_steps, 0.05), b1=0.0, b2=0.9)
        for rate in rates
    )
    # A stiff penalty: otherwise the energy outruns the generator, log Z tens of nats
    # over its bound.
    backend = ebm.VERA(
        problem.model,
        make_generator(problem.base),
        optim,
        generator_optim,
        gradient_penalty=gradient_penalty,
        score=ebm.ImportanceScore(local=False),
    )
    return backend.run(random.key(seed), num_steps, *problem.data, progress_bar=False)


BACKENDS = {"Jarzynski": fit_jarzynski, "VERA": fit_vera}


def log_density(problem: Joint, fit: ebm.Fit, x: np.ndarray) -> np.ndarray:
    """Without −log Z."""
    return np.asarray(problem.base.log_prob(x)) + np.logaddexp.reduce(
        logits_of(problem, fit, x), axis=1
    )


def logits_of(problem: Joint, fit: ebm.Fit, x: np.ndarray) -> np.ndarray:
    return np.asarray(
        problem.net.apply({"params": fit.params["net$params"]}, jnp.asarray(x))
    )


def supervised_logits(
    x,
    y,
    x_test,
    table: Table,
    seed: int,
    *,
    weight_decay: float,
    num_steps: int = 1_000,
):
    """The same net on labelled rows alone, dequantised as in the joint model."""
    net = Net(table.num_classes)
    params = net.init(random.key(seed), jnp.zeros(x.shape[1]))
    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, num_steps, 0.05), weight_decay=weight_decay
    )
    size = min(BATCH, len(x))
    x, y = jnp.asarray(x), jnp.asarray(y)

    def loss(params, key):
        key_rows, key_noise = random.split(key)
        rows = (
            random.choice(key_rows, len(x), (size,), replace=False)
            if size < len(x)
            else jnp.arange(size)
        )
        logits = net.apply(params, table.dequantised(key_noise, x[rows]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def update(carry, key):
        params, state = carry
        updates, state = optim.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = random.split(random.key(seed + 100), num_steps)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))(
        (params, optim.init(params))
    )
    return np.asarray(net.apply(params, jnp.asarray(x_test)))
