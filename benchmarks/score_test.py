"""The score test and `polish` over many data sets, against exact maximum likelihood.

    python benchmarks/score_test.py [--seeds 100] [--rows 1000] [--backend NAME] [NAME ...]
    python benchmarks/score_test.py --cost [NAME ...]

For every target and seed: data are drawn from the model itself, a backend (jarzynski,
vera or monte-carlo) fits them, and these things are counted.

- The fit itself, in standard errors from the maximum, and whether the run warned.
- The test is silent on a fit that stands within a standard error of the maximum
  (wanted: 95 of 100).
- It is loud on a fit that ended over three standard errors away, and so is the run.
- It is loud on the same fit stopped at a tenth of its updates, where that is over three
  standard errors away; the gain that it predicts stands beside the true one.
- `polish` from there ends within its own Monte Carlo errors of the maximum, which are
  under a fifth of the standard errors.
- The 90% interval of `polish` covers the parameters that the data were drawn at (wanted:
  82 to 98 of 100).

``--cost`` instead: the time of `score_test` over that of `log_normalizer` with as many
walkers and temperatures, medians of alternated calls after a first one of each (wanted:
1.1 at most, that is a tenth for all that is not annealing).
"""

import argparse
import time

import jax
import numpy as np
import optax
from jax import random
from vera_targets import (
    TARGETS,
    distance,
    drawn,
    maximum_of,
    monte_carlo_error,
    nats_a_row,
    run_and_warnings,
)

import ebm_ppl as ebm

NAMES = (
    "precision 4",
    "skewed quartic",
    "exp(-a abs(x))",
    "gamma",
    "precisions 3-d",
    "joint model",
)
NUM_UPDATES = 1000


def backend_of(name, target):
    rate = optax.cosine_decay_schedule(2e-2, NUM_UPDATES, 0.02)
    if name == "vera":
        plain = optax.adam(rate, b1=0.0)
        return ebm.VERA(target.model, target.generator, plain, plain)
    made = {"jarzynski": ebm.Jarzynski, "monte-carlo": ebm.MonteCarloMLE}[name]
    return made(target.model, optax.adam(rate))


def fit_of(backend, target, seed, num_updates):
    """The fit, and whether the run warned."""
    fit, told = run_and_warnings(backend, seed, num_updates, target.x)
    return fit, bool(told)


def covers(polished, truth):
    """Whether 90% intervals hold the truth, by parameter."""
    inside = jax.tree.map(
        lambda m, e, t: np.abs(np.asarray(m) - t) < 1.645 * e,
        polished.params,
        polished.standard_errors,
        truth,
    )
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(inside)])


def report(name, num_seeds, num_rows, backend_name):
    began = time.perf_counter()
    silent = healthy = loud = early = warned = away = told = tested = 0
    ratios, distances, noises, covered, fitted = [], [], [], [], []
    # One model and one backend for all data, which are arguments: compiled once.
    plain = TARGETS[name]()
    backend = backend_of(backend_name, plain)
    for seed in range(num_seeds):
        target = drawn(plain, seed, num_rows)
        best, errors = maximum_of(target)
        args = (target.model, target.x)

        # The whole run, judged unless it ended between here and there
        fit, has_warned = fit_of(backend, target, seed, NUM_UPDATES)
        fitted.append(distance(fit.params, best, errors))
        is_healthy, is_away = fitted[-1] <= 1.0, fitted[-1] > 3.0
        if is_healthy or is_away:
            test = ebm.score_test(random.key(seed), fit, *args)
            healthy, away = healthy + is_healthy, away + is_away
            warned += is_healthy and has_warned
            told += is_away and has_warned
            silent += is_healthy and test.is_at_maximum
            tested += is_away and not test.is_at_maximum

        # A tenth of it
        short, _ = fit_of(backend, target, seed, NUM_UPDATES // 10)
        lost = nats_a_row(target, best) - nats_a_row(target, short.params)
        if distance(short.params, best, errors) > 3.0:
            early += 1
            test = ebm.score_test(random.key(seed), short, *args)
            loud += not test.is_at_maximum
            if lost < 0.2:
                ratios.append(test.gain_per_row / lost)

        # Taken to the maximum
        polished = ebm.polish(random.key(seed), short, *args)
        covered.append(covers(polished, target.start))
        noises.append(monte_carlo_error(polished, errors))
        distances.append(distance(polished.params, best, errors))

    low, high = np.quantile(ratios, [0.05, 0.95]) if ratios else (np.nan, np.nan)
    coverage = ", ".join(f"{100 * share:.0f}%" for share in np.mean(covered, 0))
    print(
        f"{name:16} fits off by {np.median(fitted):.2f} standard errors, worst "
        f"{max(fitted):.2f}; {warned} of {healthy} healthy runs warned, {told} of {away} "
        f"that ended far off; test silent {silent} of {healthy}, loud {tested} of {away} "
        f"far off and {loud} of {early} early, "
        f"gain over truth {low:.2f} to {high:.2f}; polished: worst "
        f"{max(distances):.2f} standard errors off, Monte Carlo at most "
        f"{max(noises):.2f}, 90% intervals cover {coverage}; "
        f"{(time.perf_counter() - began) / num_seeds:.1f} s a seed",
        flush=True,
    )


def cost(name, num_pairs=7):
    """Alternated calls, on the same data."""
    target = drawn(TARGETS[name](), 0, 1000)
    best, _ = maximum_of(target)
    options = {"num_walkers": 256, "progress_bar": False}
    calls = {
        "log_normalizer": lambda key: ebm.log_normalizer(
            key, target.model, best, target.x, **options
        ),
        "score_test": lambda key: ebm.score_test(
            key, best, target.model, target.x, **options
        ),
    }
    spent = {which: [] for which in calls}
    for index in range(num_pairs + 1):
        for which, call in calls.items():
            began = time.perf_counter()
            call(random.key(index))
            spent[which].append(time.perf_counter() - began)

    plain, test = (np.array(spent[which][1:]) for which in calls)
    print(
        f"{name:16} log_normalizer {np.median(plain):.2f} s, score_test "
        f"{np.median(test):.2f} s, ratio {np.median(test / plain):.3f} "
        f"({np.min(test / plain):.3f} to {np.max(test / plain):.3f})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--backend", default="jarzynski")
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    for name in asked.names or NAMES:
        if asked.cost:
            cost(name)
        else:
            report(name, asked.seeds, asked.rows, asked.backend)
        # Every target has programs of its own, and each maps memory.
        jax.clear_caches()


if __name__ == "__main__":
    main()
