"""A battery of energies whose log Z is known, most of them made to get a wrong number
certified.

    python benchmarks/hostile.py [--families NAME ...] [--targets NAME ...] [--seeds 3]
    [--jobs 2] [--results PATH] python benchmarks/hostile.py --quick python
    benchmarks/hostile.py --check

Each target is given to ``log_normalizer`` at its default settings, once per seed.  A
run is

- *right*: certified, and the truth lies in [lower, upper] or within 4 of the stated
  standard errors of it;
- *wrong*: certified, and it does not.  An integral that diverges, or is not a number,
  has no right certificate;
- *refused*: there are flags, or a ValueError says why not;
- *failed*: anything else was raised.

Bars: nothing visible is certified and wrong (else the exit status is 1), and at most 5%
of the benign runs, those that a competent method certifies, are refused.  *Invisible*
targets are listed apart: no data, no draw of the base and no gradient points to what
their log Z lacks.

Truths are closed forms, or one-dimensional integrals by SciPy in double precision;
``--check`` compares them with sums over fine grids (up to two dimensions) and over all
states.  With ``--results`` an interrupted run goes on where it stopped: keep one file
for each state of the package.  The whole takes most of an hour on one core.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections import Counter

import jax
import numpy as np
from hostile_targets import check_names, families
from hostile_truths import check
from jax import random

import ebm_ppl as ebm

NUM_ERRORS = 4.0
# What single precision leaves of a log Z of order ten, and a tenth of what LOO over a
# hundred rows could tell: exact methods state no error, and where nothing was to be
# annealed brackets have no width.
ACCURACY = 1e-3
QUICK = {"num_walkers": 32}


# --- One run --------------------------------------------------------------------------


def judge(truth, log_z):
    """Whether what was certified is right, for every element and draw."""
    estimate, stderr, lower, upper = (
        np.asarray(getattr(log_z, name)["x"], float)
        for name in ("estimate", "stderr", "lower", "upper")
    )
    # One direction has one limit: it certified the interval that is as wide on the
    # other side.
    lower, upper = (
        np.where(np.isfinite(lower), lower, 2 * estimate - upper),
        np.where(np.isfinite(upper), upper, 2 * estimate - lower),
    )
    slack = np.maximum(NUM_ERRORS * stderr, ACCURACY)
    truth = np.broadcast_to(truth, estimate.shape)
    right = np.isfinite(truth) & (lower - slack <= truth) & (truth <= upper + slack)
    return "right" if right.all() else "wrong"


def run(target, seed):
    """One line of the results."""
    began = time.perf_counter()
    line = {
        "target": target.name,
        "seed": seed,
        "version": target.version,
        "package": package_digest(),
    }
    arguments = (target.p,) if target.data is None else (target.p, target.data)
    try:
        log_z = ebm.log_normalizer(
            random.key(seed),
            target.model,
            dict(target.params),
            *arguments,
            method=target.method,
            progress_bar=False,
            **target.options,
        )
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        line |= {"outcome": "refused", "reasons": [f"{type(error).__name__}: {error}"]}
    except Exception as error:
        line |= {"outcome": "failed", "reasons": [f"{type(error).__name__}: {error}"]}
    else:
        numbers = {
            name: np.asarray(getattr(log_z, name)["x"], float).round(6).ravel().tolist()
            for name in ("estimate", "stderr", "lower", "upper")
        }
        outcome = judge(target.truth, log_z) if log_z.is_certified else "refused"
        line |= {"outcome": outcome, "reasons": list(log_z.flags["x"])} | numbers
    return line | {"seconds": round(time.perf_counter() - began, 2)}


def package_digest():
    """Tells results of one state of the package from those of another."""
    sources = sorted(pathlib.Path(ebm.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[
        :12
    ]


# --- Many runs ------------------------------------------------------------------------


def key_of(line):
    return line["target"], line["seed"], line["version"]


def read(path):
    """Results that were kept, by target, seed and version; a line that was cut off is
    done again."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[key_of(line)] = line
    return found


def run_family(targets, num_seeds, path):
    """Everything of one family that is not yet in the file."""
    done = read(path)
    for target in targets:
        for seed in range(num_seeds):
            if (target.name, seed, target.version) in done:
                continue
            line = run(target, seed)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def run_side_by_side(chosen, options, path):
    """Families in processes of their own, so many at a time, each with one core."""
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    )
    waiting, running = sorted(chosen, key=lambda family: -len(chosen[family])), {}
    while waiting or running:
        for place in range(options.jobs):
            if place in running and running[place].poll() is not None:
                del running[place]
            if place not in running and waiting:
                command = [
                    sys.executable,
                    __file__,
                    "--families",
                    waiting.pop(0),
                    "--results",
                    str(path),
                ]
                command += [
                    "--seeds",
                    str(options.seeds),
                    *(["--quick"] if options.quick else []),
                ]
                command += ["--targets", *options.targets] if options.targets else []
                running[place] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                if cores[0] is not None:
                    os.sched_setaffinity(
                        running[place].pid, {cores[place % len(cores)]}
                    )
        time.sleep(0.5)


# --- The table ------------------------------------------------------------------------


def table(chosen, num_seeds, results):
    """Print what came out, by family; return how many visible runs are certified and
    wrong, failed or missing."""
    rows, targets = {}, {}
    for family, members in chosen.items():
        rows[family] = []
        for target in members:
            targets[target.name] = target
            lines = [
                results.get((target.name, seed, target.version))
                for seed in range(num_seeds)
            ]
            rows[family] += [line for line in lines if line is not None]

    def count(lines):
        outcomes = Counter(
            (
                line["outcome"],
                targets[line["target"]].benign,
                bool(targets[line["target"]].invisible),
            )
            for line in lines
        )

        def number(*wanted):
            return sum(n for key, n in outcomes.items() if wanted == key[: len(wanted)])

        return (
            len(lines),
            number("right"),
            number("wrong") - outcomes["wrong", False, True],
            outcomes["wrong", False, True],
            number("refused", True),
            number("refused", False),
            number("failed"),
            sum(line["seconds"] for line in lines) / max(len(lines), 1),
        )

    print(
        "family         | targets | runs | certified and right | certified and wrong "
        "| wrong, invisible | refused though benign | refused hostile | failed | s a "
        "run"
    )
    every = [line for lines in rows.values() for line in lines]
    for family, lines in [*rows.items(), ("total", every)]:
        num_targets = len(chosen.get(family, targets))
        runs, right, wrong, invisible, benign, hostile, failed, seconds = count(lines)
        print(
            f"{family:<14} | {num_targets:7d} | {runs:4d} | {right:19d} | {wrong:19d} "
            f"| {invisible:16d} | {benign:21d} | {hostile:15d} | {failed:6d} | "
            f"{seconds:7.2f}"
        )

    bad = [line for line in every if line["outcome"] in ("wrong", "failed")]
    visible = [line for line in bad if not targets[line["target"]].invisible]
    describe(f"certified and wrong, or failed: {len(visible)}", visible, targets)
    unseen = [line for line in bad if targets[line["target"]].invisible]
    describe(f"certified and wrong, but invisible: {len(unseen)}", unseen, targets)
    benign = [line for line in every if targets[line["target"]].benign]
    refused = [line for line in benign if line["outcome"] == "refused"]
    describe(f"refused though benign: {len(refused)}", refused, targets)
    nameless = [
        line
        for line in every
        if line["outcome"] == "refused"
        and "estimate" not in line
        and "'x'" not in line["reasons"][0]
    ]
    describe(
        f"refused by a message that does not name the site: {len(nameless)}",
        nameless,
        targets,
    )

    share = len(refused) / max(len(benign), 1)
    print(
        f"\n{len(targets)} targets ({sum(t.benign for t in targets.values())} benign, "
        f"{sum(bool(t.invisible) for t in targets.values())} invisible), {len(every)} "
        f"runs of {len(targets) * num_seeds}: {len(visible)} certified and wrong or "
        f"failed, {len(unseen)} more that nothing points to; {share:.1%} of the benign "
        f"runs refused; {sum(line['seconds'] for line in every):.0f} s."
    )
    if len({line["package"] for line in every}) > 1:
        print("These results come from more than one state of the package.")
    num_missing = len(targets) * num_seeds - len(every)
    if num_missing:
        print(f"{num_missing} runs are missing: a process ended early.")
    return len(visible) + num_missing


def describe(title, lines, targets):
    """Each run with what it stated, and where the truth lies."""
    print(f"\n{title}")
    for line in lines:
        target = targets[line["target"]]
        print(f"  {line['target']} (seed {line['seed']}): {stated(target, line)}")
        for reason in line["reasons"][:1]:
            print(f"    {reason[:200]}")
        if target.invisible and line["seed"] == 0:
            print(f"    invisible: {target.invisible}")


def stated(target, line):
    """The element or draw that is furthest off."""
    truth = np.ravel(target.truth)
    if "estimate" not in line:
        return f"truth {truth.min():.4g}"
    estimate, stderr, lower, upper = (
        np.asarray(line[name]) for name in ("estimate", "stderr", "lower", "upper")
    )
    truth = np.broadcast_to(truth, estimate.shape)
    # A truth that is no number is off by however much.
    known = np.isfinite(truth)
    off = np.where(
        known,
        np.maximum(
            lower - np.where(known, truth, 0), np.where(known, truth, 0) - upper
        ),
        np.inf,
    )
    worst = int(np.argmax(off))
    where = "" if truth.size == 1 else f"element {worst} of {truth.size}: "
    return (
        f"{where}{estimate[worst]:.4f} ± {stderr[worst]:.4f} [{lower[worst]:.4f}, "
        f"{upper[worst]:.4f}], truth {truth[worst]:.4f}"
    )


# --- The command ----------------------------------------------------------------------


def selection(options):
    """The targets asked for, by family."""
    every = {family: list(members()) for family, members in families().items()}
    check_names(every)
    chosen = {}
    for family in options.families or every:
        members = [
            t for t in every[family] if not options.targets or t.name in options.targets
        ]
        if options.quick:
            members = [_quick(target) for target in members if target.quick]
        if members:
            chosen[family] = members
    return chosen


def _quick(target):
    sampled = target.method not in ("quadrature", "enumeration")
    return dataclasses.replace(
        target, options=(QUICK if sampled else {}) | target.options
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(families()))
    parser.add_argument("--targets", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few cheap targets, one seed: for the tests",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="families side by side, a core each"
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        help="a file of JSON lines, one a run, that is added to",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the truths with brute force; run nothing",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = 1
    chosen = selection(options)
    if options.check:
        return int(check(chosen) > 0)

    with tempfile.TemporaryDirectory() as folder:
        path = options.results or pathlib.Path(folder) / "results.jsonl"
        if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write(
                    "\n"
                )  # the line at which an earlier run was cut off stays by itself
        if options.jobs > 1:
            run_side_by_side(chosen, options, path)
        else:
            for targets in chosen.values():
                run_family(targets, options.seeds, path)
                # Every program maps memory, of which Linux allows a process 65,530
                # pieces.
                if not options.quick:
                    jax.clear_caches()
        return int(table(chosen, options.seeds, read(path)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
