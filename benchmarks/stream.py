"""A fit of more rows than memory holds, from an iterator: does memory stay flat?

    python benchmarks/stream.py [--rows 10000000] [--batch 10000]

Rows of 16 numbers, a normal of another precision than the base's, are drawn as they are
asked for.  Printed: what all rows would take, the process's memory after a tenth of
them and at the end, and the precision beside the one that was drawn from.
"""

import argparse
import pathlib
import time

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.distributions import constraints

import ebm_ppl as ebm

DIM, PRECISION = 16, 1.5
MIB = 2**20


def memory():
    """Resident memory of this process, in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def model(x, num_rows):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    base = dist.Normal(jnp.zeros(DIM), 1.0).to_event(1)
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * (precision - 1) * jnp.sum(v**2, -1), base
    )
    with numpyro.plate("rows", num_rows, subsample_size=len(x)):
        numpyro.sample("x", energy, obs=x)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=10_000)
    asked = parser.parse_args()
    num_steps = asked.rows // asked.batch
    seen = {}

    def batches():
        rng = np.random.default_rng(0)
        for step in range(num_steps):
            seen[step] = memory()
            x = rng.normal(size=(asked.batch, DIM)) * PRECISION**-0.5
            yield x.astype(np.float32)

    began = time.perf_counter()
    optim = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    fit = ebm.MonteCarloMLE(model, optim).run(
        random.key(0),
        num_steps,
        batches=batches(),
        num_rows=asked.rows,
        progress_bar=False,
    )
    print(
        f"{asked.rows:,} rows of {4 * DIM * asked.rows / MIB:,.0f} MiB in {num_steps:,} "
        f"batches, {time.perf_counter() - began:.0f} s: memory {seen[num_steps // 10]:.0f} "
        f"MiB after a tenth of them, {memory():.0f} MiB at the end; precision "
        f"{float(fit.params['precision']):.4f} (drawn from {PRECISION})"
    )


if __name__ == "__main__":
    main()
