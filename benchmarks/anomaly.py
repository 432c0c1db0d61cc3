"""Handwritten digits with one class left out: which density tells it?

    python benchmarks/anomaly.py [--classes 0 1 2 ...] [--steps 2000] [--jarzynski]

Every model is fitted to nine classes of scikit-learn's digits (three quarters of their
rows); scores are its log density at the quarter that was set aside, and at all rows of
the tenth class.  AUROC of one against the other: 1 where every digit of the tenth class
is less likely than every other digit, a half where the score says nothing.

The mixture is the one of a small grid with the highest density of validation rows, of
the nine classes alone.  `tilted` is an energy on it (`MonteCarloMLE`), `on the Gaussian`
the same net on the Gaussian of the pixels (`Jarzynski`, slower).  The distance to the
nearest training row stands beside them: it is no density.
"""

import argparse
import warnings

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from tilt import Net, mixtures

import ebm_ppl as ebm


def model_on(base, bound):
    def model(x):
        net = flax_module("net", Net(), input_shape=(64,))
        energy = ebm.bounded(lambda v: net(2 * v - 1), bound)
        with numpyro.plate("rows", len(x), subsample_size=256):
            batch = numpyro.subsample(x, event_dim=1)
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)

    return model


def splits(left_out, seed=0):
    """Rows of nine classes to train on, to choose by, to score; and the tenth's."""
    x, y = load_digits(return_X_y=True)
    x = ((x + np.random.default_rng(seed).uniform(size=x.shape)) / 17).astype(
        np.float32
    )
    train, test = train_test_split(
        x[y != left_out], test_size=0.25, stratify=y[y != left_out], random_state=seed
    )
    valid, train = train[:150], train[150:]
    return train, valid, test, x[y == left_out]


def tilted(mixture, train, valid, steps):
    """Log density, up to log Z, of an energy on the mixture."""
    model = model_on(ebm.from_sklearn(mixture), 5.0)
    optim = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)
    validation = ebm.Validation(valid, every=max(steps // 15, 1))
    fit = ebm.MonteCarloMLE(model, optim).run(
        random.key(0),
        steps,
        train,
        averaging=0.99,
        validation=validation,
        progress_bar=False,
    )
    energy = ebm.fitted(fit, model, train)["x"]
    return lambda rows: -np.asarray(energy.potential(rows))


def on_gaussian(gaussian, train, steps):
    """The same net on a base that every class is far from."""
    model = model_on(gaussian, 100.0)
    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, steps, 0.05), weight_decay=1e-4
    )
    backend = ebm.Jarzynski(
        model, optim, num_chains=16, num_walkers=32, num_kernel_steps=3
    )
    fit = backend.run(random.key(0), steps, train, progress_bar=False)
    energy = ebm.fitted(fit, model, train)["x"]
    return lambda rows: -np.asarray(energy.potential(rows))


def scores_of(left_out, steps, with_jarzynski):
    """AUROC of every model, and its mean log density of rows set aside."""
    train, valid, test, odd = splits(left_out)
    gaussian = dist.MultivariateNormal(
        jnp.asarray(train.mean(0)), jnp.asarray(np.cov(train.T), jnp.float32)
    )
    _, _, mixture = mixtures(train, valid)[0]
    neighbours = NearestNeighbors(n_neighbors=1).fit(train)
    densities = {
        "Gaussian": lambda rows: np.asarray(gaussian.log_prob(rows)),
        "mixture": mixture.score_samples,
        "tilted": tilted(mixture, train, valid, steps),
        "nearest row": lambda rows: -neighbours.kneighbors(rows)[0][:, 0],
    }
    if with_jarzynski:
        densities["on the Gaussian"] = on_gaussian(gaussian, train, steps)

    is_digit = np.r_[np.ones(len(test)), np.zeros(len(odd))]
    return {
        name: roc_auc_score(is_digit, np.r_[density(test), density(odd)])
        for name, density in densities.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--jarzynski", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)

    found = []
    for left_out in options.classes:
        found.append(scores_of(left_out, options.steps, options.jarzynski))
        line = "  ".join(f"{name} {auroc:.3f}" for name, auroc in found[-1].items())
        print(f"without {left_out}:  {line}", flush=True)

    print("\nmean over classes, and the gain over the mixture in each, mean ± s.e.")
    for name in found[0]:
        values = np.array([row[name] for row in found])
        gains = values - [row["mixture"] for row in found]
        error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
        print(f"  {name:16s} {values.mean():.3f}   {gains.mean():+.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
