"""What the joint energy model of optdigits makes of rows that are no digits.

    python benchmarks/ood.py DATA_FOLDER [--draws 3] [--steps 3000]

AUROC of the official test rows against (a) the same rows with their pixels permuted,
one permutation per row, and (b) midpoints of two raw digits of different classes,
dequantised afterwards.  Scores: the model's log density, its gain over the base (minus
the energy), max-softmax; beside them max-softmax of the same net trained on labels
alone, the Gaussian base and a mixture of 200 diagonal Gaussians.

(a) is told by any model with the pixels' means and variances: the Gaussian alone is
right about all of them.  (b) lies between data, where a density that is smooth is high:
a midpoint is nearer the mean than either digit.  An AUROC under one half says that a
score prefers midpoints to digits.  Mean over draws of the labels and training seeds.
Bar: the log density's AUROC on midpoints at least 0.3 over the base's.

Settings of Grathwohl et al. (2021), section 5.2: image data sets against one another;
(b) follows their interpolations between CIFAR10 images.
"""

import argparse
from functools import partial

import jax.numpy as jnp
import labelled_tables as tables
import numpy as np
from jax import random
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture


def no_digits(table: tables.Table) -> dict[str, np.ndarray]:
    """Rows that are no digits, in the table's units, not yet dequantised."""
    rng = np.random.default_rng(1)
    # Pixels are permuted in their own units, not in those of their standard deviation.
    pixels = table.raw(table.x_test)
    permuted = table.standardised(rng.permuted(pixels, axis=1))
    partner = rng.permutation(len(table.y_test))
    differ = table.y_test != table.y_test[partner]
    midpoints = 0.5 * (table.x_test + table.x_test[partner])[differ]
    return {"permuted": permuted.astype(np.float32), "midpoints": midpoints}


def confidence(logits: np.ndarray) -> np.ndarray:
    """Log odds of the likeliest class: orders rows as max-softmax does, which rounds to
    1 for many."""
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - np.logaddexp.reduce(ordered[:, :-1], axis=1)


def labels_alone(
    table: tables.Table, chosen: np.ndarray, seed: int, x: np.ndarray
) -> np.ndarray:
    """Confidence of the same net trained on the labelled rows."""
    found = tables.supervised_logits(
        table.x[chosen], table.y[chosen], x, table, seed, weight_decay=0.0
    )
    return confidence(found)


def areas(table: tables.Table, score) -> dict[str, float]:
    data = score(table.dequantised(random.key(5), jnp.asarray(table.x_test)))
    found = {}
    for kind, rows in no_digits(table).items():
        other = score(table.dequantised(random.key(6), jnp.asarray(rows)))
        labels = np.repeat([1, 0], [len(data), len(other)])
        found[kind] = roc_auc_score(labels, np.concatenate([data, other]))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument(
        "--backends", nargs="*", choices=tables.BACKENDS, default=list(tables.BACKENDS)
    )
    options = parser.parse_args()
    table = tables.load(options.folder, "optdigits")
    rows: dict[str, list] = {}
    for draw in range(options.draws):
        chosen = tables.draw_labels(table.y, draw)
        problem = tables.joint(table, chosen)
        rows.setdefault("labels alone: max-softmax", []).append(
            areas(table, partial(labels_alone, table, chosen, draw))
        )
        for backend in options.backends:
            fit = tables.BACKENDS[backend](problem, draw, options.steps)
            density, logits = (
                partial(tables.log_density, problem, fit),
                partial(tables.logits_of, problem, fit),
            )
            for name, score in {
                "log density": density,
                "gain over the base": lambda x, logits=logits: np.logaddexp.reduce(
                    logits(x), axis=1
                ),
                "max-softmax": lambda x, logits=logits: confidence(logits(x)),
            }.items():
                rows.setdefault(f"{backend}: {name}", []).append(areas(table, score))
    train = np.asarray(table.dequantised(random.key(1), jnp.asarray(table.x)))
    mixture = GaussianMixture(
        200, covariance_type="diag", reg_covar=1e-3, random_state=0
    ).fit(train)
    rows["Gaussian base"] = [
        areas(table, lambda x: np.asarray(problem.base.log_prob(x)))
    ]
    rows["mixture of 200"] = [areas(table, mixture.score_samples)]

    print(
        f"AUROC of test digits against rows that are none; {options.draws} draws, "
        f"{options.steps} updates"
    )
    print(f"  {'':32s} {'permuted pixels':>22s} {'midpoints':>22s}")
    for name, found in rows.items():
        cells = []
        for kind in ("permuted", "midpoints"):
            values = [area[kind] for area in found]
            cells.append(
                f"{np.mean(values):8.3f} ({min(values):.3f}, {max(values):.3f})"
            )
        print(f"  {name:32s} {cells[0]:>22s} {cells[1]:>22s}")
    base = rows["Gaussian base"][0]["midpoints"]
    for backend in options.backends:
        density = np.mean(
            [area["midpoints"] for area in rows[f"{backend}: log density"]]
        )
        print(
            f"  {backend}: log density on midpoints {density - base:+.3f} over the "
            "base (bar +0.3)"
        )


if __name__ == "__main__":
    main()
