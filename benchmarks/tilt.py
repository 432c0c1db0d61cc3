"""Energies on mixtures of the data, against the mixtures, on held-out rows.

    python benchmarks/tilt.py DATA_FOLDER [SET ...] [--seeds 2] [--bound 5]

For every set: the base is the mixture of a small grid with the highest validation
density, and `MonteCarloMLE` puts a bounded energy on it; the test rows are looked at
once.  log Z is found three ways: by draws of the base, and by annealing forwards and
back.  Rows are whitened principal components, in nats of those, but for the digits,
(x + u) / 17 in nats of pixels.  Settings are the same for all sets.

DATA_FOLDER holds satimage.npz, optdigits.npz, magic.npz, shuttle.npz and spambase.npz;
the digits are scikit-learn's own.
"""

import argparse
import pathlib
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from flax import linen as nn
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

import ebm_ppl as ebm

# Name, file, principal components (None: all columns as they are).
SETS = {
    "satimage 16": ("satimage", 16),
    "satimage 36": ("satimage", 36),
    "optdigits 16": ("optdigits", 16),
    "optdigits 32": ("optdigits", 32),
    "optdigits 64": ("optdigits", None),
    "magic 10": ("magic", 10),
    "shuttle 9": ("shuttle", 9),
    "spambase 57": ("spambase", 57),
    "digits 64": (None, None),
}
GRID = [("full", k) for k in (1, 2, 5, 10, 20, 40)]
GRID += [("diag", k) for k in (10, 20, 50, 100, 200)]
MAX_ROWS = 20_000
BY_BASE = {"method": "base", "num_walkers": 16384}


class Net(nn.Module):
    """Two hidden layers; the energy begins at 0."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.swish(nn.Dense(256)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[..., 0]


class Rows(NamedTuple):
    """Raw rows, and how they become what is modelled.

    Attributes:
        train, valid, test: ``(n, d)``; validation rows are of the training set.
        is_integer: Whether uniform noise is added, anew at every update.
        mean, matrix: Of the map to principal components.
        scale: Of the net's input.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    is_integer: bool
    mean: np.ndarray
    matrix: np.ndarray
    scale: float

    def values(self, raw, rng_key):
        noise = random.uniform(rng_key, raw.shape) if self.is_integer else 0.0
        return (raw + noise - self.mean) @ self.matrix


def load(folder, name):
    """Training, validation and test rows, the first two of the training set."""
    file, num_components = SETS[name]
    rng = np.random.default_rng(0)
    if file is None:
        x = load_digits().data
        order = rng.permutation(len(x))
        train, test = x[order[:1347]], x[order[1347:]]
    else:
        path = pathlib.Path(folder) / f"{file}.npz"
        if not path.exists():
            sys.exit(f"{path} is missing (see --help).")
        data = np.load(path)
        train, test = (
            np.asarray(data[k]).reshape(len(data[k]), -1) for k in ("X_train", "X_test")
        )
    is_integer = bool(np.all(train == np.round(train)))
    train = train[rng.permutation(len(train))[:MAX_ROWS]].astype(np.float32)

    if num_components is None:
        mean, matrix, scale = np.zeros(train.shape[1]), np.eye(train.shape[1]) / 17, 2.0
    else:
        noise = 1 / 12 if is_integer else 0.0
        mean, scale = train.mean(0) + 0.5 * is_integer, 1.0
        values, vectors = np.linalg.eigh(
            np.cov((train - mean).T.astype(float)) + noise * np.eye(train.shape[1])
        )
        matrix = (vectors / np.sqrt(values))[:, ::-1][:, :num_components]
    num_valid = len(train) // 5
    return Rows(
        train[num_valid:],
        train[:num_valid],
        test.astype(np.float32),
        is_integer,
        mean.astype(np.float32),
        np.ascontiguousarray(matrix).astype(np.float32),
        scale,
    )


def mixtures(train, valid):
    """The grid's mixtures with their validation densities, best first."""
    found = []
    for kind, size in GRID:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixture = GaussianMixture(
                size, covariance_type=kind, reg_covar=1e-4, random_state=0, max_iter=200
            ).fit(train)
        found.append((mixture.score(valid), f"{size} {kind}", mixture))
    return sorted(found, key=lambda entry: -entry[0])


def values_of(rows):
    """Training, validation and test values, noise drawn once."""
    return [
        np.asarray(rows.values(raw, random.key(i)), float)
        for i, raw in enumerate((rows.train, rows.valid, rows.test))
    ]


def mean_log_density(fit, model, raw, **options):
    """log Z, by options of `log_normalizer`, and the mean log density of rows."""
    log_z = ebm.log_normalizer(random.key(1), model, fit.params, raw, **options)
    data = ebm.to_arviz(fit, model, raw, log_normalizer=log_z, allow_uncertified=True)
    return log_z, data.attrs["mean_log_density"]


def tilted(base, rows, asked, seed):
    """A fit of a bounded net on the base, and its model."""
    # The net sees a row's values and, as spreads differ by orders of magnitude, its ranks.
    train = rows.values(rows.train, random.key(0))
    levels = jnp.linspace(-1.5, 1.5, 129)
    knots = jnp.quantile(train, jnp.linspace(0, 1, 129), axis=0)
    ranks = jax.vmap(jnp.interp, (1, 1, None), 1)

    def features(v):
        return jnp.concatenate(
            [rows.scale * v - (rows.scale - 1.0), ranks(v, knots, levels)], axis=-1
        )

    def model(x):
        net = flax_module("net", Net(), input_shape=(2 * train.shape[1],))
        energy = ebm.EnergyDistribution(
            ebm.bounded(lambda v: net(features(v)), asked.bound), base
        )
        with numpyro.plate("rows", len(x), subsample_size=min(256, len(x))):
            batch = numpyro.subsample(x, event_dim=1)
            noisy = rows.values(batch, numpyro.prng_key())
            numpyro.sample("x", energy, obs=noisy)

    rate = optax.cosine_decay_schedule(1e-3, asked.steps)
    backend = ebm.MonteCarloMLE(model, optax.adamw(rate, weight_decay=0.1))
    fit = backend.run(
        random.key(seed),
        asked.steps,
        rows.train,
        averaging=0.99,
        validation=ebm.Validation(rows.valid),
        progress_bar=False,
    )
    return fit, model


def report(name, asked):
    rows = load(asked.folder, name)
    began = time.perf_counter()
    train, valid, test = values_of(rows)
    grid = mixtures(train, valid)
    _, chosen, mixture = grid[0]
    best = max(m.score(test) for _, _, m in grid)
    print(
        f"{name} ({len(train)} rows): base {chosen}, {mixture.score(test):.2f} on test; best "
        f"mixture of the grid on test {best:.2f} ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    for seed in range(asked.seeds):
        began = time.perf_counter()
        fit, model = tilted(ebm.from_sklearn(mixture), rows, asked, seed)
        seconds = time.perf_counter() - began
        args = (model, fit.params, rows.test)
        draws, density = mean_log_density(fit, model, rows.test, **BY_BASE)
        text = (
            f"draws {float(draws.estimate['x']):.3f} ± {float(draws.stderr['x']):.3f}"
        )
        text += f" in [{float(draws.lower['x']):.3f}, {float(draws.upper['x']):.3f}]"
        if asked.bracket:
            both = ebm.log_normalizer(random.key(2), *args, progress_bar=False)
            text += f"; {both}"
        looks = np.nan_to_num(fit.history["density_validation"], nan=-np.inf)
        step = int(np.argmax(looks)) + 1 if np.any(np.isfinite(looks)) else asked.steps
        print(
            f"  seed {seed}: tilted {density:.2f} on test, {density - mixture.score(test):+.2f} "
            f"over its base, {density - best:+.2f} over the best mixture; log Z {text}; "
            f"ESS {fit.history['ess']['x'][-1]:.2f}, step {step}, {seconds:.0f} s",
            flush=True,
        )


def arguments():
    """What every comparison of tilted fits is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--bound", type=float, default=5.0)
    return parser


def main():
    parser = arguments()
    parser.add_argument("--bracket", action="store_true")
    asked = parser.parse_args()
    for name in asked.names or SETS:
        report(name, asked)
        # Every set has programs of its own, and each maps memory.
        jax.clear_caches()


if __name__ == "__main__":
    main()
