"""VERA where the maximum of the likelihood is known: what it finds, and what it says.

    python benchmarks/vera_truth.py [NAME ...] [--seeds 2] [--polish] [--part 0 2]

Every fit ends within three standard errors of the maximum, or it is told twice: by a
warning of the run, and by `score_test`.  Fits are 2,000 updates of Adam, 1e-2 on a
cosine, unless a row says otherwise.  ``--polish`` takes every fit to its maximum by
`polish` besides, whose Monte Carlo errors stay under a fifth of the standard errors;
``--part 0 2`` runs every second row.
"""

import argparse
import time

import jax
import numpy as np
import optax
from jax import random
from vera_targets import (
    SETTINGS,
    TARGETS,
    distance,
    maximum_of,
    monte_carlo_error,
    nats_a_row,
    run_and_warnings,
)

import ebm_ppl as ebm


def rate(peak, num_steps):
    return optax.adam(optax.cosine_decay_schedule(peak, num_steps, 0.02), b1=0.0)


def fit_of(target, options, rates, seed, num_steps=2000):
    backend = ebm.VERA(
        target.model,
        target.generator,
        rate(rates[0], num_steps),
        rate(rates[1], num_steps),
        **options,
    )
    return run_and_warnings(backend, seed, num_steps, target.x)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--polish", action="store_true")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="K of N")
    asked = parser.parse_args()
    right = told_twice = silent = total = 0

    part, num_parts = asked.part
    for name, settings in SETTINGS[part::num_parts]:
        if asked.names and name not in asked.names:
            continue
        target = TARGETS[name]()
        best, errors = maximum_of(target)
        top = nats_a_row(target, best)
        for seed in range(asked.seeds):
            began = time.perf_counter()
            options, rates = settings
            fit, told = fit_of(target, options, rates, seed)
            spent = time.perf_counter() - began
            test = ebm.score_test(random.key(100 + seed), fit, target.model, target.x)

            away = distance(fit.params, best, errors)
            lost = top - nats_a_row(target, fit.params)
            is_loud = bool(told) and not test.is_at_maximum
            total, right = total + 1, right + (away <= 3)
            told_twice += away > 3 and is_loud
            silent += away > 3 and not is_loud
            verdict = "right" if away <= 3 else "told" if is_loud else "SILENT"
            print(
                f"{name:22} {options} {rates} seed {seed}: {verdict:6} {away:6.1f} "
                f"standard errors off, {lost:.4f} nats a row lost (the test says "
                f"{test.gain_per_row:.4f}), test {'loud' if test.flags else 'silent'}, "
                f"{len(told)} warnings, ESS "
                f"{np.mean(fit.history['generator_ess']['x'][-500:]):.2f}, {spent:.0f} s",
                flush=True,
            )
            if asked.polish:
                polished = ebm.polish(
                    random.key(200 + seed), fit, target.model, target.x
                )
                away = distance(polished.params, best, errors)
                noise = monte_carlo_error(polished, errors)
                print(
                    f"    polished in {polished.num_rounds} rounds: {away:.2f} standard "
                    f"errors off, Monte Carlo {noise:.2f} of them, flags "
                    f"{list(polished.flags)}",
                    flush=True,
                )
        # Every row has programs of its own, and each maps memory.
        jax.clear_caches()

    print(
        f"{total} fits: {right} within three standard errors, {told_twice} told by a "
        f"warning and the test, {silent} neither"
    )


if __name__ == "__main__":
    main()
