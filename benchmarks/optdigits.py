"""Density and joint models of the 8x8 optdigits by the Jarzynski backend, against
held-out likelihood and labels.

    python benchmarks/optdigits.py DATA_FOLDER density [--steps 12000]
    python benchmarks/optdigits.py DATA_FOLDER joint [--draws 5] [--steps 4000]

``density``: log-likelihood in nats of (x + u)/17, u ~ U(0, 1), on the official test
split, with log Z by annealing fresh walkers and, beside it, the running held-out value.
``joint``: p(x, y) from 10 labels per class, test accuracy over draws of the labels,
beside the labels alone and kNN label spreading.

DATA_FOLDER holds optdigits.npz with X_train, y_train, X_test, y_test (3823 and 1797
rows of 64 pixels, 0..16).
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.nn import logsumexp
from labelled_tables import Net, draw_labels
from numpyro.contrib.module import flax_module
from numpyro.handlers import scale

import ebm_ppl as ebm


def load(folder):
    path = pathlib.Path(folder) / "optdigits.npz"
    if not path.exists():
        sys.exit(f"{path} is missing: this benchmark needs optdigits.npz (see --help).")
    data = dict(np.load(path))
    return data | {name: data[name].reshape(-1, 64) for name in ("X_train", "X_test")}


def dequantise(rng_key, x):
    return (x + random.uniform(rng_key, x.shape)) / 17.0


def gaussian(x, rng_key):
    """A Gaussian with the mean and covariance of the dequantised training data."""
    x = np.asarray(dequantise(rng_key, x), np.float64)
    cov = np.cov(x.T)
    return dist.MultivariateNormal(
        jnp.asarray(x.mean(0), jnp.float32), jnp.asarray(cov, jnp.float32)
    )


def report_log_normalizer(name, model, fit, args, seconds, *, num_temperatures):
    began = time.perf_counter()
    log_z = ebm.log_normalizer(
        random.key(7),
        model,
        fit.params,
        *args,
        num_chains=16,
        num_walkers=64,
        num_temperatures=num_temperatures,
    )
    running = float(fit.history["log_normalizer"]["x"][-1])
    error = float(fit.history["log_normalizer_stderr"]["x"][-1])
    fresh, fresh_error = float(log_z.estimate["x"]), float(log_z.stderr["x"])
    training = float(fit.history["log_normalizer_training"]["x"][-1])
    print(
        f"{name}: log Z by annealing {fresh:.3f} ± {fresh_error:.3f} "
        f"({num_temperatures} temperatures, 1,024 walkers, "
        f"{time.perf_counter() - began:.0f} s); running held-out {running:.3f} ± "
        f"{error:.3f}, off by "
        f"{abs(running - fresh) / np.hypot(error, fresh_error):.1f} se (t, 3 df, "
        f"99.5%: 5.8); training walkers {training:.3f}; min ESS "
        f"{fit.history['ess']['x'].min():.2f} (held out "
        f"{fit.history['ess_holdout']['x'].min():.2f}), resampled "
        f"{int((fit.history['resampled']['x'] > 0).sum())} times; training took "
        f"{seconds:.0f} s"
    )
    return fresh, fresh_error, running, training


def density(data, steps, num_temperatures):
    x_train, x_test = (
        jnp.asarray(data["X_train"], jnp.float32),
        jnp.asarray(data["X_test"], jnp.float32),
    )
    base = gaussian(x_train, random.key(1))
    # The net sees whitened pixels; the walkers move in whitened coordinates because the
    # base says so.
    whiten = jnp.linalg.inv(base.scale_tril).T

    def model(x):
        net = flax_module("net", Net(1), input_shape=(64,))
        energy = lambda v: net((v - base.loc) @ whiten)[..., 0]  # noqa: E731
        with numpyro.plate("rows", x.shape[0], subsample_size=256):
            batch = dequantise(numpyro.prng_key(), numpyro.subsample(x, event_dim=1))
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)

    schedule = optax.cosine_decay_schedule(1e-3, steps, 0.02)
    backend = ebm.Jarzynski(
        model,
        optax.adamw(schedule, weight_decay=1e-4),
        num_chains=16,
        num_walkers=64,
        num_kernel_steps=4,
    )
    began = time.perf_counter()
    fit = backend.run(random.key(0), steps, x_train)
    seconds = time.perf_counter() - began
    fresh, error, running, training = report_log_normalizer(
        "density", model, fit, (x_train,), seconds, num_temperatures=num_temperatures
    )
    test = dequantise(random.key(2), x_test)
    net = Net(1)

    @jax.jit
    def unnormalised(x):
        energy = net.apply(
            {"params": fit.params["net$params"]}, (x - base.loc) @ whiten
        )[..., 0]
        return jnp.mean(base.log_prob(x) - energy)

    value = float(unnormalised(test))
    train = float(unnormalised(dequantise(random.key(3), x_train)))
    print(
        f"test log-likelihood {value - fresh:.2f} ± {error:.2f} nats (bar 68.0; train "
        f"{train - fresh:.2f}), by the running held-out log Z {value - running:.2f}, "
        f"by the training walkers {value - training:.2f}; the Gaussian base alone "
        f"{float(base.log_prob(test).mean()):.2f}"
    )


def joint_model(base, num_rows, num_labelled):
    """p(x, y) in two plates: all rows under the energy, labelled rows (scaled to weigh
    as much) under the labels."""

    def model(x, x_labelled, y):
        net = flax_module("net", Net(10), input_shape=(64,))
        energy = lambda v: -logsumexp(net(2 * v - 1), axis=-1)  # noqa: E731
        with numpyro.plate("rows", num_rows, subsample_size=256):
            batch = dequantise(numpyro.prng_key(), numpyro.subsample(x, event_dim=1))
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)
        with (
            numpyro.plate("labelled", num_labelled),
            scale(scale=num_rows / num_labelled),
        ):
            logits = net(2 * dequantise(numpyro.prng_key(), x_labelled) - 1)
            numpyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def labels_only(x, y, test, y_test, unlabelled):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.semi_supervised import LabelSpreading

    x, test, unlabelled = (
        np.asarray(x) / 16,
        np.asarray(test) / 16,
        np.asarray(unlabelled) / 16,
    )
    mlp = (
        MLPClassifier((256, 256), max_iter=2_000, random_state=0)
        .fit(x, y)
        .score(test, y_test)
    )
    logistic = LogisticRegression(max_iter=5_000).fit(x, y).score(test, y_test)
    everything = np.concatenate([x, unlabelled])
    targets = np.concatenate([y, np.full(len(unlabelled), -1)])
    spreading = LabelSpreading(
        kernel="knn", n_neighbors=7, alpha=0.2, max_iter=200
    ).fit(everything, targets)
    return mlp, logistic, spreading.score(test, y_test)


def supervised_net(x, y, test, y_test, seed):
    """The same net on the labels alone, with the same dequantisation."""
    net = Net(10)
    params = net.init(random.key(seed), jnp.zeros(64))
    optim = optax.adam(1e-3)

    def loss(params, key):
        logits = net.apply(params, 2 * dequantise(key, x) - 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def update(carry, key):
        params, state = carry
        updates, state = optim.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = random.split(random.key(seed + 100), 1_000)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))(
        (params, optim.init(params))
    )
    return float(
        (net.apply(params, 2 * (test + 0.5) / 17 - 1).argmax(-1) == y_test).mean()
    )


def joint(data, draws, steps, num_temperatures):
    x_train, x_test = (
        jnp.asarray(data["X_train"], jnp.float32),
        jnp.asarray(data["X_test"], jnp.float32),
    )
    y_train, y_test = data["y_train"], data["y_test"]
    base = gaussian(x_train, random.key(1))
    accuracies, others = [], []
    for draw in range(draws):
        chosen = draw_labels(y_train, draw)
        x_labelled, y = x_train[chosen], jnp.asarray(y_train[chosen])
        model = joint_model(base, len(x_train), len(chosen))
        schedule = optax.cosine_decay_schedule(1e-3, steps, 0.05)
        backend = ebm.Jarzynski(
            model,
            optax.adamw(schedule, weight_decay=1e-4),
            num_chains=16,
            num_walkers=32,
            num_kernel_steps=3,
        )
        began = time.perf_counter()
        fit = backend.run(random.key(draw), steps, x_train, x_labelled, y)
        seconds = time.perf_counter() - began
        logits = Net(10).apply(
            {"params": fit.params["net$params"]}, 2 * (x_test + 0.5) / 17 - 1
        )
        accuracies.append(float((logits.argmax(-1) == y_test).mean()))
        others.append(
            (
                supervised_net(x_labelled, y, x_test, y_test, draw),
                *labels_only(x_labelled, y_train[chosen], x_test, y_test, x_train),
            )
        )
        print(
            f"draw {draw}: joint {100 * accuracies[-1]:.1f}% in {seconds:.0f} s; "
            f"labels alone: net {100 * others[-1][0]:.1f}%, MLP "
            f"{100 * others[-1][1]:.1f}%, logistic {100 * others[-1][2]:.1f}%; kNN "
            f"label spreading {100 * others[-1][3]:.1f}%",
            flush=True,
        )
        if draw == 0 and num_temperatures:
            args = (x_train, x_labelled, y)
            fresh, error, _, _ = report_log_normalizer(
                "joint", model, fit, args, seconds, num_temperatures=num_temperatures
            )
            test = dequantise(random.key(2), x_test)
            energy = -logsumexp(
                Net(10).apply({"params": fit.params["net$params"]}, 2 * test - 1),
                axis=-1,
            )
            value = float(jnp.mean(base.log_prob(test) - energy)) - fresh
            print(
                f"joint: test log-likelihood {value:.2f} ± {error:.2f} nats", flush=True
            )
    columns = 100 * np.mean(others, axis=0)
    print(
        f"mean of {draws} label draws: joint {100 * np.mean(accuracies):.1f}% (bar "
        f"95), worst {100 * min(accuracies):.1f}% (bar 93); labels alone: net "
        f"{columns[0]:.1f}%, MLP {columns[1]:.1f}%, logistic {columns[2]:.1f}%; kNN "
        f"label spreading {columns[3]:.1f}%"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("task", choices=["density", "joint"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--temperatures", type=int, default=4_000)
    options = parser.parse_args()
    data = load(options.folder)
    if options.task == "density":
        density(data, options.steps or 12_000, options.temperatures)
    else:
        joint(data, options.draws, options.steps or 4_000, options.temperatures)


if __name__ == "__main__":
    main()
