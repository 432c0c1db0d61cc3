"""Semi-supervised tables: joint energy models p(x, y) by both backends against the best that labels alone can do.

    python benchmarks/semi_supervised.py DATA_FOLDER [--names optdigits ...] [--draws 5] [--steps 3000]

min(10, class size) labels per class, 5 draws of them, the official test split; one setting for all tables, chosen on
optdigits.  Labels alone: the same net at the weight decay that does best *on the test rows* (so the bar is generous
to it), scikit-learn's MLP and logistic regression.  Beside them kNN label spreading, which sees all rows, and the
net with all labels.  Accuracy, balanced accuracy and expected calibration error (15 bins), in %, means over draws.

``seen beforehand`` needs no labels: AUROC by which the energy tells held-out rows from the model's own draws (50 for
a model that fits), the share of features whose commonest value is in more than a third of the rows, and the
base-standard radius that 1% of the rows exceed, in units of the one a Gaussian would have.

Settings of Grathwohl et al. (2021), section 5.3: 10 labels per class, HEPMASS, HUMAN and CROP beside MNIST; those
tables are not among these.
"""

import argparse
import time
import warnings

import jax.numpy as jnp
import labelled_tables as tables
import numpy as np
from jax import random
from jax.nn import softmax
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.semi_supervised import LabelSpreading

import ebm_ppl as ebm
from ebm_ppl.geometry import standardizing_transform

WEIGHT_DECAYS = (0.0, 0.1, 1.0)
LABELS_ONLY = (*(f"net, decay {decay:g}" for decay in WEIGHT_DECAYS), "MLP", "logistic")
BACKENDS = {"Jarzynski": tables.fit_jarzynski, "VERA": tables.fit_vera}
# Of the net with all labels.
CEILING_STEPS = 3_000


def measures(probability: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Accuracy, balanced accuracy and expected calibration error in %."""
    guess, confidence = probability.argmax(1), probability.max(1)
    right = guess == y
    recalls = [right[y == k].mean() for k in np.unique(y)]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
    return 100 * np.array([right.mean(), np.mean(recalls), np.sum(gaps) / len(y)])


def of_classifier(classifier, table):
    probability = np.zeros((len(table.y_test), table.num_classes))
    probability[:, classifier.classes_] = classifier.predict_proba(table.x_test)
    return measures(probability, table.y_test)


def baselines(table, chosen, draw):
    """Measures by name, of everything that is no joint model."""
    x, y = table.x[chosen], table.y[chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = np.full(len(table.x), -1)
        hidden[chosen] = y
        found = {
            "MLP": MLPClassifier((256, 256), max_iter=2_000, random_state=draw).fit(x, y),
            "logistic": LogisticRegression(max_iter=5_000).fit(x, y),
            "label spreading": LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2, max_iter=200).fit(
                table.x, hidden
            ),
        }
        rows = {name: of_classifier(classifier, table) for name, classifier in found.items()}
    for name, decay in zip(LABELS_ONLY, WEIGHT_DECAYS, strict=False):
        logits = tables.supervised_logits(x, y, table.x_test, table, draw, weight_decay=decay)
        rows[name] = measures(np.asarray(softmax(logits)), table.y_test)
    return rows


def misfit(problem, fit, table, rng_key):
    """AUROC of the energy between held-out rows and the model's draws, in %; 50 where they cannot be told apart."""
    idata = ebm.to_arviz(fit, problem.model, *problem.data)
    drawn = idata["posterior_predictive"]["x"].values.reshape(-1, table.x.shape[1])
    held_out = table.dequantised(rng_key, jnp.asarray(table.x_test))
    value = lambda x: np.asarray(problem.base.log_prob(x)) + _log_sum_exp(tables.logits_of(problem, fit, x))  # noqa: E731
    labels = np.repeat([1, 0], [len(table.x_test), len(drawn)])
    return 100 * roc_auc_score(labels, np.concatenate([value(held_out), value(drawn)]))


def _log_sum_exp(logits):
    return np.logaddexp.reduce(logits, axis=1)


def seen_beforehand(table, base):
    _, counts = zip(*(np.unique(column, return_counts=True) for column in table.x.T), strict=True)
    commonest = np.array([count.max() for count in counts]) / len(table.x)
    standard = np.asarray(standardizing_transform(base).inv(jnp.asarray(table.x)))
    radius = np.quantile(np.linalg.norm(standard, axis=1), 0.99)
    return 100 * np.mean(commonest > 1 / 3), radius / stats.chi(table.x.shape[1]).ppf(0.99)


def report(name, rows, ceiling):
    """The table of one data set, and the gain of the better backend."""
    print(f"\n{name}: mean over {len(rows['MLP'])} draws (smallest, largest)")
    print(f"  {'':20s} {'accuracy':>22s} {'balanced':>9s} {'calibration error':>18s}")
    for label, found in rows.items():
        found = np.array(found)
        accuracy = found[:, 0]
        print(
            f"  {label:20s} {accuracy.mean():8.1f} ({accuracy.min():4.1f}, {accuracy.max():4.1f}) "
            f"{found[:, 1].mean():9.1f} {found[:, 2].mean():18.1f}"
        )
    print(f"  {'net, all labels':20s} {ceiling[0]:8.1f} {ceiling[1]:23.1f} {ceiling[2]:18.1f}")
    mean = {label: np.mean([row[0] for row in found]) for label, found in rows.items()}
    best = max(LABELS_ONLY, key=mean.__getitem__)
    better = max(mean.keys() & BACKENDS.keys(), key=mean.__getitem__)
    gains = np.array([a[0] - b[0] for a, b in zip(rows[better], rows[best], strict=True)])
    error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
    print(
        f"  gain of {better} over the best of labels alone ({best}): {gains.mean():+.1f} ± {error:.1f} points",
        flush=True,
    )
    return better, best, gains.mean(), error


def one_table(folder, name, backends, draws, num_steps):
    table = tables.load(folder, name)
    rows: dict[str, list] = {}
    for draw in range(draws):
        chosen = tables.draw_labels(table.y, draw)
        found = baselines(table, chosen, draw)
        problem = tables.joint(table, chosen)
        for backend in backends:
            fit_with = BACKENDS[backend]
            began = time.perf_counter()
            fit = fit_with(problem, draw, num_steps)
            found[backend] = measures(np.asarray(softmax(tables.logits_of(problem, fit, table.x_test))), table.y_test)
            told = (
                f", AUROC {misfit(problem, fit, table, random.key(9)):.0f} between rows and draws" if not draw else ""
            )
            print(
                f"{name} draw {draw}: {backend} {found[backend][0]:.1f}% in {time.perf_counter() - began:.0f} s{told}",
                flush=True,
            )
        for label, value in found.items():
            rows.setdefault(label, []).append(value)
    logits = tables.supervised_logits(
        table.x, table.y, table.x_test, table, 0, weight_decay=1e-2, num_steps=CEILING_STEPS
    )
    gain = report(name, rows, measures(np.asarray(softmax(logits)), table.y_test))
    share, tail = seen_beforehand(table, problem.base)
    print(f"  seen beforehand: {share:.0f}% of features mostly one value; radius exceeded by 1% of rows {tail:.1f}")
    return gain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--names", nargs="+", choices=tables.NAMES, default=list(tables.NAMES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3_000)
    options = parser.parse_args()
    gains = {
        name: one_table(options.folder, name, options.backends, options.draws, options.steps) for name in options.names
    }
    print("\ngain over the best of labels alone (bar: 3 points on three of five tables)")
    for name, (better, best, gain, error) in gains.items():
        print(f"  {name:12s} {gain:+5.1f} ± {error:.1f}  ({better}; labels alone: {best})")


if __name__ == "__main__":
    main()
