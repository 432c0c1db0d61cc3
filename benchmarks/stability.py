"""How far VERA's joint model of optdigits depends on the training seed, and its density
on penalty and rates.

    python benchmarks/stability.py DATA_FOLDER [--seeds 20] [--steps 3000] [--sweep]

One draw of 10 labels per class, as in semi_supervised.py, and as many training seeds:
test accuracy of each, their spread (largest minus smallest; bar: 3 points), and how
many runs diverged (bar: none).

``--sweep`` instead: γ and the learning rates of energy and generator, each with log Z
by annealing beside the generator's own bound on it, the held-out log-likelihood and the
accuracy.  A gap between log Z and its bound is what the generator has not seen of the
energy.
"""

import argparse
import sys
import time

import labelled_tables as tables
import numpy as np
from jax import random

import ebm_ppl as ebm

SWEEP = (  # γ, rate of the energy, rate of the generator
    (0.1, 3e-4, 6e-4),
    (0.1, 3e-4, 2e-3),
    (0.1, 1e-4, 2e-3),
    (1.0, 3e-4, 6e-4),
    (1.0, 3e-4, 2e-3),
)


def accuracy(problem, fit, table):
    return 100 * np.mean(
        tables.logits_of(problem, fit, table.x_test).argmax(1) == table.y_test
    )


def over_seeds(problem, table, seeds, num_steps):
    found = []
    for seed in range(seeds):
        began = time.perf_counter()
        try:
            fit = tables.fit_vera(problem, seed, num_steps)
        except ebm.NonFiniteError as error:
            print(f"seed {seed}: diverged at update {error.step}", flush=True)
            continue
        found.append(accuracy(problem, fit, table))
        print(
            f"seed {seed}: {found[-1]:.1f}% in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if not found:
        sys.exit(f"all of {seeds} seeds diverged")
    print(
        f"{seeds} seeds, {num_steps} updates: mean {np.mean(found):.1f}%, smallest "
        f"{min(found):.1f}, largest {max(found):.1f}, spread {np.ptp(found):.1f} "
        f"points (bar 3); diverged {seeds - len(found)} (bar 0)"
    )


def sweep(problem, table, num_steps):
    test = np.asarray(table.dequantised(random.key(4), table.x_test))
    base = float(np.mean(np.asarray(problem.base.log_prob(test))))
    print(f"the base: {base:.1f} held-out nats")
    print(
        f"  {'γ':>4s} {'energy':>7s} {'generator':>10s} {'log Z':>14s} {'bound':>7s} "
        f"{'held-out':>9s} {'accuracy':>9s}"
    )
    for gamma, rate, generator_rate in SWEEP:
        fit = tables.fit_vera(
            problem, 0, num_steps, gradient_penalty=gamma, rates=(rate, generator_rate)
        )
        log_z = ebm.log_normalizer(
            random.key(5), problem.model, fit.params, *problem.data
        )
        estimate, error = float(log_z.estimate["x"]), float(log_z.stderr["x"])
        held_out = float(np.mean(tables.log_density(problem, fit, test))) - estimate
        print(
            f"  {gamma:4g} {rate:7g} {generator_rate:10g} {estimate:7.1f} ± "
            f"{error:4.1f} {float(fit.state.log_normalizer_bound):7.1f} "
            f"{held_out:9.1f} {accuracy(problem, fit, table):8.1f}%"
            + ("" if log_z.is_certified else "  not certified"),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    table = tables.load(options.folder, "optdigits")
    problem = tables.joint(table, tables.draw_labels(table.y, 0))
    if options.sweep:
        sweep(problem, table, options.steps)
    else:
        over_seeds(problem, table, options.seeds, options.steps)


if __name__ == "__main__":
    main()
