"""A joint energy model p(x, y) of real handwritten digits, from ten labels per class.

The data are scikit-learn's 8x8 digits: most rows have no label.  One small net gives
ten logits; their log-sum-exp is the energy of x (all rows, one plate), their softmax is
p(y | x) (labelled rows, another plate).  The base is the Gaussian of the training
pixels, so the energy only has to say how digits differ from it.

For the density alone there is a nearer base: a second energy, without labels, is put on
a mixture of normals, and adds to it.

Prints a table of normalised held-out log-likelihoods and test accuracies beside their
baselines, writes three figures and a NetCDF file, and ends with ArviZ's summary of the
model's draws.

    python examples/digits.py [--steps 2000] [--output examples/output]
"""

import argparse
import pathlib
import time

import arviz as az
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.nn import logsumexp
from numpyro.contrib.module import flax_module
from numpyro.handlers import scale
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.semi_supervised import LabelSpreading

import ebm_ppl as ebm

LABELS_PER_CLASS = 10


class Net(nn.Module):
    """64-256-256-10; the last layer starts at zero, so that the model starts at its
    base with log Z known exactly."""

    size: int = 10

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.swish(nn.Dense(256)(x))
        return nn.Dense(self.size, kernel_init=nn.initializers.zeros)(x)


def make_model(base, num_rows, num_labelled):
    def model(x, x_labelled, y):
        net = flax_module("net", Net(), input_shape=(64,))
        energy = lambda v: -logsumexp(net(2 * v - 1), axis=-1)  # noqa: E731
        with numpyro.plate("rows", num_rows, subsample_size=256):
            batch = numpyro.subsample(x, event_dim=1)
            numpyro.sample(
                "x",
                ebm.EnergyDistribution(energy, base),
                obs=dequantise(numpyro.prng_key(), batch),
            )
        # Scaled as if every row were labelled: the two terms then weigh the same.
        with (
            numpyro.plate("labelled", num_labelled),
            scale(scale=num_rows / num_labelled),
        ):
            logits = net(2 * dequantise(numpyro.prng_key(), x_labelled) - 1)
            numpyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def tilted_mixture(mixture, x_train, steps):
    """An energy on a fitted mixture, its log Z by fresh draws of the mixture."""
    base = ebm.from_sklearn(mixture)
    train, valid = x_train[150:], x_train[:150]

    def model(x):
        net = flax_module("net", Net(1), input_shape=(64,))
        energy = ebm.bounded(lambda v: net(2 * v - 1)[..., 0], 5.0)
        with numpyro.plate("rows", len(x), subsample_size=min(256, len(x))):
            batch = numpyro.subsample(x, event_dim=1)
            noisy = dequantise(numpyro.prng_key(), batch)
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=noisy)

    rate = optax.cosine_decay_schedule(1e-3, steps)
    backend = ebm.MonteCarloMLE(model, optax.adamw(rate, weight_decay=0.1))
    validation = ebm.Validation(valid, every=max(steps // 15, 1))
    fit = backend.run(
        random.key(0), steps, train, averaging=0.99, validation=validation
    )
    return model, fit


def dequantise(rng_key, pixels):
    """Integers 0..16 to a density on (0, 1): a likelihood of integers would be
    meaningless for a continuous model."""
    return (pixels + random.uniform(rng_key, pixels.shape)) / 17.0


def load():
    digits = load_digits()
    split = train_test_split(
        digits.data,
        digits.target,
        test_size=0.25,
        stratify=digits.target,
        random_state=0,
    )
    x_train, x_test, y_train, y_test = split
    rng = np.random.default_rng(0)
    chosen = [
        rng.choice(np.flatnonzero(y_train == k), LABELS_PER_CLASS, replace=False)
        for k in range(10)
    ]
    return (
        jnp.asarray(x_train, jnp.float32),
        jnp.asarray(x_test, jnp.float32),
        y_train,
        y_test,
        np.concatenate(chosen),
    )


def supervised_net(x, y, steps):
    """The same net on the labels alone."""
    net, optim = Net(), optax.adam(1e-3)
    params = net.init(random.key(0), jnp.zeros(64))

    def loss(params, key):
        return optax.softmax_cross_entropy_with_integer_labels(
            net.apply(params, 2 * dequantise(key, x) - 1), y
        ).mean()

    def update(carry, key):
        params, state = carry
        updates, state = optim.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optim.init(params))
    (params, _), _ = jax.jit(
        lambda c: jax.lax.scan(update, c, random.split(random.key(1), steps))
    )(carry)
    return lambda pixels: net.apply(params, 2 * (pixels + 0.5) / 17 - 1)


def accuracy_baselines(x_train, y_train, chosen, x_test, y_test, steps):
    x, y = np.asarray(x_train) / 16, y_train[chosen]
    test = np.asarray(x_test) / 16
    hidden = np.full(len(x), -1)
    hidden[chosen] = y
    spreading = LabelSpreading(
        kernel="knn", n_neighbors=7, alpha=0.2, max_iter=200
    ).fit(x, hidden)
    net = supervised_net(x_train[chosen], jnp.asarray(y), steps)
    return {
        "the same net, labels alone": float((net(x_test).argmax(-1) == y_test).mean()),
        "scikit-learn MLP, labels alone": MLPClassifier(
            (256, 256), max_iter=2_000, random_state=0
        )
        .fit(x[chosen], y)
        .score(test, y_test),
        "logistic regression, labels alone": LogisticRegression(max_iter=5_000)
        .fit(x[chosen], y)
        .score(test, y_test),
        "kNN label spreading, all rows": spreading.score(test, y_test),
    }


def draw_figures(fit, idata, x_train, base, net, folder):
    walkers = idata["posterior_predictive"]["x"].values.reshape(-1, 64)
    rng = np.random.default_rng(0)

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6))
    for panel, rows, title in (
        (panels[0], np.asarray(dequantise(random.key(5), x_train)), "data"),
        (panels[1], walkers, "draws from the model"),
    ):
        count = min(10, int(np.sqrt(len(rows))))
        picked = rows[rng.choice(len(rows), count**2, replace=False)].reshape(
            count, count, 8, 8
        )
        framed = np.pad(
            picked, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan
        )
        panel.imshow(
            framed.transpose(0, 2, 1, 3).reshape(10 * count, 10 * count),
            cmap="gray_r",
            vmin=0,
            vmax=1,
        )
        panel.set_title(title)
        panel.set_axis_off()
    figure.tight_layout()
    figure.savefig(folder / "samples.png", dpi=120, bbox_inches="tight")

    figure = ebm.plot_training(fit)[0].figure
    figure.savefig(folder / "training.png", dpi=120, bbox_inches="tight")

    figure, panel = plt.subplots(figsize=(6, 4))
    data_energy = np.asarray(
        -logsumexp(net(2 * dequantise(random.key(5), x_train) - 1), axis=-1)
    )
    stats = idata["sample_stats"]
    draws = np.take_along_axis(
        stats["energy"].values, stats["ancestor"].values, axis=1
    ).ravel()
    start = np.asarray(
        -logsumexp(net(2 * base.sample(random.key(6), (2_000,)) - 1), axis=-1)
    )
    bins = np.histogram_bin_edges(np.concatenate([data_energy, draws, start]), 60)
    for values, label in (
        (data_energy, "data"),
        (draws, "draws from the model"),
        (start, "draws from the base"),
    ):
        panel.hist(values, bins, density=True, alpha=0.5, label=label)
    panel.set_xlabel("energy")
    panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "energies.png", dpi=120, bbox_inches="tight")
    plt.close("all")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument(
        "--walkers", type=int, default=32, help="walkers per island, on 16 islands"
    )
    parser.add_argument(
        "--temperatures",
        type=int,
        default=600,
        help="rungs of the annealing that gives log Z",
    )
    parser.add_argument(
        "--tilting-steps", type=int, default=2_000, help="updates on the mixture"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "output"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    x_train, x_test, y_train, y_test, chosen = load()
    training_pixels = np.asarray(dequantise(random.key(1), x_train), np.float64)
    base = dist.MultivariateNormal(
        jnp.asarray(training_pixels.mean(0), jnp.float32),
        jnp.asarray(np.cov(training_pixels.T), jnp.float32),
    )
    model = make_model(base, len(x_train), len(chosen))
    data = (x_train, x_train[chosen], jnp.asarray(y_train[chosen]))

    print(
        f"Fitting {len(x_train)} digits, {len(chosen)} of them labelled: "
        f"{options.steps} updates."
    )
    began = time.perf_counter()
    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, options.steps, 0.05), weight_decay=1e-4
    )
    backend = ebm.Jarzynski(
        model,
        optim,
        num_chains=16,
        num_walkers=options.walkers,
        num_kernel_steps=3,
    )
    fit = backend.run(random.key(0), options.steps, *data)
    print(
        f"Fitted in {time.perf_counter() - began:.0f} s. Annealing fresh walkers to "
        "the fit for log Z."
    )
    log_z = ebm.log_normalizer(
        random.key(2),
        model,
        fit.params,
        *data,
        num_walkers=options.walkers,
        num_temperatures=options.temperatures,
    )
    pixels = {"pixel": [f"r{row}c{column}" for row in range(8) for column in range(8)]}
    idata = ebm.to_arviz(
        fit, model, *data, log_normalizer=log_z, coords=pixels, dims={"x": ["pixel"]}
    )

    net = lambda v: Net().apply({"params": fit.params["net$params"]}, v)  # noqa: E731
    test = dequantise(random.key(3), x_test)
    unnormalised = np.asarray(
        base.log_prob(test) + logsumexp(net(2 * test - 1), axis=-1)
    )
    mixture = GaussianMixture(
        50, covariance_type="diag", reg_covar=1e-4, random_state=0
    ).fit(training_pixels)
    tilted_model, tilted = tilted_mixture(mixture, x_train, options.tilting_steps)
    by_draws = ebm.log_normalizer(
        random.key(4), tilted_model, tilted.params, x_test, method="base"
    )
    tilted_data = ebm.to_arviz(
        tilted, tilted_model, x_test, log_normalizer=by_draws, allow_uncertified=True
    )
    density = tilted_data.attrs["mean_log_density"]
    estimate, stderr = float(log_z.estimate["x"]), float(log_z.stderr["x"])
    sampling_error = lambda values: np.std(values) / np.sqrt(len(values))  # noqa: E731
    rows = [
        ("energy model", unnormalised - estimate, stderr),
        ("Gaussian (the base)", np.asarray(base.log_prob(test)), 0.0),
        (
            "mixture of 50 diagonal Gaussians",
            mixture.score_samples(np.asarray(test)),
            0.0,
        ),
    ]
    print(f"\nHeld-out log-likelihood, nats per digit ({len(x_test)} digits)")
    for name, values, error in rows:
        note = f", of which log Z ± {error:.2f}" if error else ""
        print(
            f"  {name:35s} {values.mean():7.2f} ± "
            f"{np.hypot(sampling_error(values), error):.2f}{note}"
        )
    print(f"  {'an energy on that mixture':35s} {density:7.2f}")
    running = float(fit.history["log_normalizer"]["x"][-1])
    running_error = float(fit.history["log_normalizer_stderr"]["x"][-1])
    training = float(fit.history["log_normalizer_training"]["x"][-1])
    print(f"\nlog Z\n  {log_z}\n  on the mixture, {by_draws}")
    print(
        f"  running on held-out islands: {running:.2f} ± {running_error:.2f}; claimed "
        f"by the training islands: {training:.2f}"
    )
    print(f"\nTest accuracy from {LABELS_PER_CLASS} labels per class")
    joint = float((net(2 * (x_test + 0.5) / 17 - 1).argmax(-1) == y_test).mean())
    baselines = accuracy_baselines(
        x_train, y_train, chosen, x_test, y_test, min(options.steps, 1_000)
    )
    for name, value in {"joint energy model": joint, **baselines}.items():
        print(f"  {name:35s} {100 * value:5.1f}%")

    draw_figures(fit, idata, x_train, base, net, options.output)
    idata.to_netcdf(str(options.output / "digits.nc"))
    print(
        "\nWrote samples.png, training.png, energies.png and digits.nc to "
        f"{options.output}\n"
    )
    summary = az.summary(idata, group="posterior_predictive", var_names=["x"])
    print(summary.iloc[24:40].to_string())  # rows 3 and 4 of the image


if __name__ == "__main__":
    main()
