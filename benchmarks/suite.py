"""All that the papers and this package claim, one row after another, in one command.

    python benchmarks/suite.py [NAME ...] [--data FOLDER] [--again] [--quick] [--list]

A row is a script of this folder in a process of its own, with one core.  What it prints
is kept in benchmarks/results, so that a run that was stopped goes on where it was; a row
whose command changed, or ``--again``, is run anew.  Before anything starts, the rows and
what they take are printed.  At the end docs/benchmarks.md is written from all that is
kept: each claim, its command, and what came out.

``--quick`` runs every row at a size that shows only that it runs, and keeps nothing.
``--list`` prints the rows and ends.  Rows that need data are left out without FOLDER.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
PACKAGES = ("ebm_ppl", "jax", "jaxlib", "numpyro", "optax")
DATA = "DATA_FOLDER"


@dataclass(frozen=True)
class Row:
    """One claim.

    ``arguments`` are the script's, with DATA_FOLDER in the place of the data's; ``quick``
    those that only show that it runs; ``minutes`` what it takes on one core.
    """

    name: str
    claim: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    minutes: int

    @property
    def needs_data(self):
        return DATA in self.arguments

    def command(self, folder, is_quick=False):
        arguments = self.quick if is_quick else self.arguments
        return [str(folder) if part == DATA else part for part in arguments]


def row(name, claim, minutes, arguments, quick):
    return Row(name, claim, tuple(arguments.split()), tuple(quick.split()), minutes)


ROWS = [
    row(
        "mixture",
        "A mixture in 50 dimensions whose modes form as it is fitted (Carbone et al. "
        "2023, section 4.1): walkers with weights find the mass, contrastive divergence "
        "does not. KL from the truth, the mass (right: 0.25), the error of log Z.",
        60,
        "gmm50.py --seeds 5",
        "gmm50.py --seeds 1 --steps 20",
    ),
    row(
        "nice",
        "A flow of MNIST whose likelihood is exact, and only maximum likelihood is told "
        "so (Grathwohl et al. 2021, section 5.1): VERA comes nearer than contrastive "
        "divergence and score matching. Equal wall time; nats of test rows.",
        35,
        f"nice.py {DATA} --seconds 150",
        f"nice.py {DATA} --seconds 5 --methods PCD denoising --budget 100000",
    ),
    row(
        "entropy",
        "The gradient of a generator's entropy against its closed form (the check of "
        "Grathwohl et al. 2021, section 5.1).",
        5,
        "ppca.py plane",
        "ppca.py plane",
    ),
    row(
        "tables",
        "Ten labels per class (Grathwohl et al. 2021, section 5.3): joint energy models "
        "against what the labels alone give.",
        90,
        f"semi_supervised.py {DATA} --draws 2",
        f"semi_supervised.py {DATA} --names optdigits --draws 1 --steps 20",
    ),
    row(
        "stability",
        "VERA's joint model from ten seeds: spread of the accuracy, and how many runs "
        "diverge.",
        25,
        f"stability.py {DATA} --seeds 10",
        f"stability.py {DATA} --seeds 2 --steps 20",
    ),
    row(
        "densities",
        "Energies on the best mixture of each table, against the mixture and against "
        "flows that train as long; rows that were set aside.",
        90,
        f"tilt.py {DATA}",
        f"tilt.py {DATA} magic --seeds 1",
    ),
    row(
        "walkers",
        "What learning from its own walkers does to a fit, and what renewal undoes.",
        25,
        "adaptation.py --rows adam narrow --seeds 3",
        "adaptation.py --rows narrow --seeds 1",
    ),
    row(
        "anomaly",
        "One class of digits left out: which density tells it.",
        20,
        "anomaly.py",
        "anomaly.py --classes 0 --steps 20",
    ),
    row(
        "judged",
        "The score test over many data sets: silent at the maximum, loud elsewhere, its "
        "errors right.",
        40,
        "score_test.py --seeds 20",
        "score_test.py --seeds 1",
    ),
    row(
        "stream",
        "Ten million rows from an iterator: memory stays flat.",
        1,
        "stream.py",
        "stream.py --rows 100000",
    ),
    row(
        "cost",
        "An update of MonteCarloMLE against the same arithmetic by hand.",
        5,
        "monte_carlo_cost.py",
        "monte_carlo_cost.py --pairs 2",
    ),
]


def kept(row):
    path = RESULTS / f"{row.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def is_done(row):
    found = kept(row)
    return found is not None and found["arguments"] == list(row.arguments)


def run(row, folder, is_quick):
    """What the row printed, and how it ended."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    script, *arguments = row.command(folder, is_quick)
    command = [sys.executable, str(HERE / script), *arguments]
    if hasattr(os, "sched_getaffinity"):
        core = max(os.sched_getaffinity(0))
        command = ["taskset", "-c", str(core), *command]

    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )
    return done, time.perf_counter() - began


def keep(row, done, seconds):
    found = {
        "arguments": list(row.arguments),
        "output": done.stdout,
        "minutes": seconds / 60,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{row.name}.json"
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def page():
    """The documentation's page of all rows that are kept."""
    parts = [
        "# Benchmarks",
        "Each section is one row of `python benchmarks/suite.py`, as it came out; "
        "DATA_FOLDER holds the public data sets that the script names.",
    ]
    for row in ROWS:
        found = kept(row)
        if found is None:
            continue
        versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
        parts += [
            f"## {row.name.capitalize()}",
            row.claim,
            f"```sh\npython benchmarks/{' '.join(found['arguments'])}\n```",
            f"```text\n{found['output'].strip()}\n```",
            f"{found['minutes']:.0f} minutes on one core, {found['date']}; Python "
            f"{found['python']}, {versions}.",
        ]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*names, []])
    parser.add_argument("--data", type=lambda path: pathlib.Path(path).resolve())
    for option in ("--again", "--quick", "--list"):
        parser.add_argument(option, action="store_true")
    asked = parser.parse_args()

    # What is to be run
    chosen = [row for row in ROWS if not asked.names or row.name in asked.names]
    due = []
    for row in chosen:
        is_kept = is_done(row) and not asked.again and not asked.quick
        has_data = asked.data is not None or not row.needs_data
        state = "kept" if is_kept else f"{row.minutes} min" if has_data else "no data"
        print(f"{row.name:12s} {state:>8s}  {' '.join(row.arguments)}")
        if has_data and not is_kept:
            due.append(row)
    if asked.list:
        return 0
    if due and not asked.quick:
        print(f"{sum(row.minutes for row in due)} minutes in all")

    # Run
    num_failed = 0
    for row in due:
        done, seconds = run(row, asked.data, asked.quick)
        print(
            f"{row.name}: {'ok' if done.returncode == 0 else 'FAILED'}, {seconds:.0f} s"
        )
        if done.returncode:
            num_failed += 1
            print(done.stderr[-2000:])
        elif not asked.quick:
            keep(row, done, seconds)
            PAGE.write_text(page(), encoding="utf-8")
        sys.stdout.flush()
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
