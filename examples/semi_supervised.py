"""A classifier of a table from ten labels per class, as a joint energy model, fitted by
both backends.

The table is scikit-learn's digits as 61 columns, or its breast cancer data (30 columns,
two classes).  One small net gives the logits: their log-sum-exp is minus the energy of
x (all rows), their softmax is p(y | x) (labelled rows). The base is the Gaussian of the
columns.  Nothing here knows that digits are images.

Prints accuracy, balanced accuracy and calibration beside what labels alone and kNN
label spreading reach; how well rows that are no data are told from data, by several
scores; writes a figure with reliability and ROC curves and NetCDF files; and ends with
ArviZ's summary of the model's draws.

    python examples/semi_supervised.py [--table digits] [--steps 3000] [--output
    examples/output]
"""

import argparse
import pathlib
import time
import warnings

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
from jax.nn import logsumexp, softmax
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.handlers import scale
from sklearn.calibration import calibration_curve
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import RocCurveDisplay, balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.semi_supervised import LabelSpreading

import ebm_ppl as ebm

LABELS_PER_CLASS = 10
LABEL_WEIGHT = 3.0
BATCH = 256
NUM_LATENTS = 32
NUM_BINS = 15
TABLES = {"digits": load_digits, "breast_cancer": load_breast_cancer}


class Net(nn.Module):
    """256-256-outputs with swish; ``last`` initialises the output layer."""

    outputs: int
    last: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.swish(nn.Dense(256)(x))
        return nn.Dense(self.outputs, kernel_init=self.last)(x)


class Table:
    """Columns in units of their training rows' spread, ``(rows, columns)``, and labels;
    a quarter is held out."""

    def __init__(self, name):
        found = TABLES[name]()
        x, x_test, self.y, self.y_test = train_test_split(
            found.data,
            found.target,
            test_size=0.25,
            stratify=found.target,
            random_state=0,
        )
        kept = np.ptp(x, axis=0) > 0
        x, x_test = x[:, kept], x_test[:, kept]
        is_integer = np.all(x == np.round(x), axis=0)
        spread = np.sqrt(x.var(0) + is_integer / 12)
        # Integers are spread over their unit: a density of integers would be
        # meaningless.
        self.gap = jnp.asarray(np.where(is_integer, 1 / spread, 0.0), jnp.float32)
        self.x, self.x_test = (
            ((rows - x.mean(0)) / spread).astype(np.float32) for rows in (x, x_test)
        )
        rng = np.random.default_rng(0)
        self.classes = np.unique(self.y)
        self.labelled = np.concatenate(
            [
                rng.choice(np.flatnonzero(self.y == k), LABELS_PER_CLASS, replace=False)
                for k in self.classes
            ]
        )

    def dequantised(self, rng_key, x):
        return x + self.gap * (random.uniform(rng_key, x.shape) - 0.5)

    def base(self):
        """The Gaussian of the training columns, with a small ridge."""
        x = np.asarray(self.dequantised(random.key(1), self.x), float)
        cov = np.cov(x.T) + 1e-3 * np.eye(x.shape[1])
        return dist.MultivariateNormal(
            jnp.asarray(x.mean(0), jnp.float32), jnp.asarray(cov, jnp.float32)
        )


def make_model(table, base, net):
    num_rows, num_columns = table.x.shape
    num_labelled = len(table.labelled)

    def model(x, x_labelled, y):
        logits = flax_module("net", net, input_shape=(num_columns,))
        energy = lambda v: -logsumexp(logits(v), axis=-1)  # noqa: E731
        with numpyro.plate("rows", num_rows, subsample_size=BATCH):
            batch = table.dequantised(
                numpyro.prng_key(), numpyro.subsample(x, event_dim=1)
            )
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)
        # As many labels of every class, whatever its share: given x, they follow p(y |
        # x) over the share of class y. Labelled rows count as often as they are met in
        # a batch: a class may have no other there.
        counts = LABELS_PER_CLASS * BATCH / num_rows + jnp.sum(
            softmax(logits(batch)), axis=0
        )
        log_shares = jnp.log(counts / jnp.sum(counts))
        # Scaled as if every row were labelled, times the weight of labels against
        # densities.
        with (
            numpyro.plate("labelled", num_labelled),
            scale(scale=LABEL_WEIGHT * num_rows / num_labelled),
        ):
            found = logits(table.dequantised(numpyro.prng_key(), x_labelled))
            numpyro.sample("y", dist.Categorical(logits=found - log_shares), obs=y)

    return model


def make_generator(base):
    (num_columns,) = base.event_shape

    def generator():
        net = flax_module(
            "generator",
            Net(num_columns, last=nn.initializers.lecun_normal()),
            input_shape=(NUM_LATENTS,),
        )
        noise = numpyro.param("scale", 0.5, constraint=constraints.interval(0.01, 1.0))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([NUM_LATENTS]).to_event(1))
        numpyro.sample("x", ebm.standardized_normal(base, net(z), noise))

    return generator


def make_backends(model, base, steps):
    decayed = lambda rate: optax.cosine_decay_schedule(rate, steps, 0.05)  # noqa: E731
    # VERA's two players circle each other with momentum, hence b1 = 0.  The generator
    # is the faster one, and a stiff gradient penalty keeps the energy from outrunning
    # it.
    optim, generator_optim = (
        optax.adam(decayed(rate), b1=0.0, b2=0.9) for rate in (3e-4, 2e-3)
    )
    return {
        "Jarzynski": ebm.Jarzynski(
            model,
            optax.adamw(decayed(1e-3), weight_decay=1e-4),
            num_chains=16,
            num_walkers=32,
            num_kernel_steps=3,
        ),
        "VERA": ebm.VERA(
            model,
            make_generator(base),
            optim,
            generator_optim,
            gradient_penalty=1.0,
            score=ebm.ImportanceScore(local=False),
        ),
    }


def supervised_net(table, net, steps):
    """The same net on the labels alone."""
    x, y = jnp.asarray(table.x[table.labelled]), jnp.asarray(table.y[table.labelled])
    optim = optax.adamw(1e-3, weight_decay=0.1)
    params = net.init(random.key(0), x[0])

    def loss(params, key):
        return optax.softmax_cross_entropy_with_integer_labels(
            net.apply(params, table.dequantised(key, x)), y
        ).mean()

    def update(carry, key):
        params, state = carry
        updates, state = optim.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = random.split(random.key(1), steps)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, keys))(
        (params, optim.init(params))
    )
    return np.asarray(softmax(net.apply(params, table.x_test)))


def without_energy(table, net, steps):
    """Class probabilities of the test rows, ``(rows, classes)``, by method."""
    x, y = table.x[table.labelled], table.y[table.labelled]
    hidden = np.full(len(table.y), -1)
    hidden[table.labelled] = y
    with warnings.catch_warnings():
        # Rows whose neighbours have no label leave zeros to normalise.
        warnings.simplefilter("ignore", RuntimeWarning)
        spreading = LabelSpreading(
            kernel="knn", n_neighbors=7, alpha=0.2, max_iter=200
        ).fit(table.x, hidden)
        spread = np.nan_to_num(
            spreading.predict_proba(table.x_test), nan=1 / len(table.classes)
        )
    return {
        "the same net, labels alone": supervised_net(table, net, steps),
        "scikit-learn MLP, labels alone": MLPClassifier(
            (256, 256), max_iter=2_000, random_state=0
        )
        .fit(x, y)
        .predict_proba(table.x_test),
        "logistic regression, labels alone": LogisticRegression(max_iter=5_000)
        .fit(x, y)
        .predict_proba(table.x_test),
        "kNN label spreading, all rows": spread,
    }


def calibration_error(probability, y):
    """Mean distance between confidence and accuracy over bins of confidence, weighted
    by their rows."""
    confidence, right = probability.max(1), probability.argmax(1) == y
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return sum(
        abs(np.sum(right[bins == k]) - np.sum(confidence[bins == k]))
        for k in range(NUM_BINS)
    ) / len(y)


def no_data(table):
    """Rows that are no data: every column shuffled on its own, and midpoints of rows of
    different classes."""
    rng = np.random.default_rng(1)
    shuffled = np.stack([rng.permutation(column) for column in table.x_test.T], axis=1)
    partner = rng.permutation(len(table.y_test))
    differ = table.y_test != table.y_test[partner]
    midpoints = 0.5 * (table.x_test + table.x_test[partner])[differ]
    return {"columns shuffled": shuffled, "midpoints of two classes": midpoints}


def confidence(logits):
    """Log odds of the likeliest class: orders rows as max-softmax does, which rounds to
    1 for many."""
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - np.logaddexp.reduce(ordered[:, :-1], axis=1)


def scores(base, logits, x):
    """What could tell data from other rows; larger for data."""
    found = logits(x)
    gain = np.asarray(logsumexp(found, axis=-1))
    plain = np.asarray(base.log_prob(x))
    return {
        "log density": plain + gain,
        "gain over the base": gain,
        "base alone": plain,
        "max-softmax": confidence(np.asarray(found)),
    }


def draw_reliability(ax, probabilities, y):
    ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, probability in probabilities.items():
        fractions, confidences = calibration_curve(
            probability.argmax(1) == y,
            probability.max(1),
            n_bins=8,
            strategy="quantile",
        )
        label = f"{name}: {100 * calibration_error(probability, y):.1f}%"
        ax.plot(confidences, fractions, marker=".", label=label)
    ax.set(
        xlabel="confidence", ylabel="accuracy", title="reliability (calibration error)"
    )
    ax.legend(fontsize=7)


def tell_apart(table, base, logits, ax=None):
    """AUROC by kind of row and score; the ROC curves of the midpoints are drawn on
    ``ax``."""
    data = scores(base, logits, table.dequantised(random.key(5), table.x_test))
    areas = {}
    for kind, rows in no_data(table).items():
        other = scores(base, logits, table.dequantised(random.key(6), rows))
        for name in data:
            labels = np.repeat([1, 0], [len(data[name]), len(other[name])])
            values = np.concatenate([data[name], other[name]])
            areas[kind, name] = roc_auc_score(labels, values)
            if ax is not None and kind.startswith("midpoints"):
                RocCurveDisplay.from_predictions(labels, values, name=name, ax=ax)
    return areas


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, default="digits")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument(
        "--temperatures",
        type=int,
        default=2_000,
        help="rungs of the annealing that gives log Z",
    )
    parser.add_argument(
        "--walkers",
        type=int,
        default=64,
        help="walkers per island of that annealing, on 16 islands",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "output"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    table = Table(options.table)
    base, net = table.base(), Net(len(table.classes))
    model = make_model(table, base, net)
    data = (
        jnp.asarray(table.x),
        jnp.asarray(table.x[table.labelled]),
        jnp.asarray(table.y[table.labelled]),
    )
    print(
        f"{options.table}: {len(table.x)} rows, {len(table.labelled)} of them "
        f"labelled; {options.steps} updates."
    )
    test = table.dequantised(random.key(3), table.x_test)
    gaussian = float(base.log_prob(test).mean())
    probabilities, areas, idata = {}, {}, {}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for (name, backend), ax in zip(
        make_backends(model, base, options.steps).items(), axes[1:], strict=True
    ):
        began = time.perf_counter()
        fit = backend.run(random.key(0), options.steps, *data)
        seconds = time.perf_counter() - began
        log_z = ebm.log_normalizer(
            random.key(2),
            model,
            fit.params,
            *data,
            num_walkers=options.walkers,
            num_temperatures=options.temperatures,
        )
        logits = lambda x, fit=fit: net.apply({"params": fit.params["net$params"]}, x)  # noqa: E731
        density = float(np.mean(scores(base, logits, test)["log density"])) - float(
            log_z.estimate["x"]
        )
        print(
            f"{name}: fitted in {seconds:.0f} s; held-out log-likelihood {density:.2f} "
            f"nats per row (the Gaussian base {gaussian:.2f})\n  {log_z}"
        )
        if name == "VERA":
            print(
                "  the generator's bound on log Z: "
                f"{float(fit.state.log_normalizer_bound):.2f}"
            )
        probabilities[name] = np.asarray(softmax(logits(table.x_test)))
        areas[name] = tell_apart(table, base, logits, ax)
        ax.set_title(f"{name}: data against midpoints")
        ax.legend(fontsize=7)
        idata[name] = ebm.to_arviz(
            fit, model, *data, log_normalizer=log_z, allow_uncertified=True
        )
        idata[name].to_netcdf(
            str(options.output / f"{options.table}_{name.lower()}.nc")
        )

    probabilities |= without_energy(table, net, min(options.steps, 1_000))
    print(f"\n{'':36s} accuracy  balanced  calibration error")
    for name, found in probabilities.items():
        guess = found.argmax(1)
        print(
            f"  {name:34s} {100 * np.mean(guess == table.y_test):7.1f}% "
            f"{100 * balanced_accuracy_score(table.y_test, guess):8.1f}% "
            f"{100 * calibration_error(found, table.y_test):17.1f}%"
        )
    print("\nAUROC of held-out rows against rows that are no data")
    for name, found in areas.items():
        for (kind, score), area in found.items():
            print(f"  {name:10s} {kind:25s} {score:20s} {area:.2f}")

    draw_reliability(axes[0], probabilities, table.y_test)
    figure.savefig(options.output / f"{options.table}.png", dpi=120)
    plt.close(figure)
    print(f"\nWrote {options.table}.png and the NetCDF files to {options.output}\n")
    print(
        az.summary(idata["VERA"], group="posterior_predictive").iloc[20:30].to_string()
    )


if __name__ == "__main__":
    main()
