"""Fits that end beside the maximum of their likelihood, and where `polish` takes them.

    python benchmarks/polish.py [--seeds 1] [drift] [rate] [stopped]

The maximum is known from the likelihood in closed form.  For every fit: how many
standard errors it stands from the maximum, what the run and `score_test` say, and the
same of the polished one (wanted: within two standard errors, Monte Carlo error under a
fifth of one).

- drift: two normals in 10 dimensions, 30% of 10,000 rows in one of them; Adam, 4,000
  updates.  Walkers that teach the parameters are left behind by them.
- rate: the precision of a normal, sixty rows, Adam at a constant rate of 2e-2: the last
  iterate carries the walkers' noise.
- stopped: one precision of two sites, stopped after a fifth of its updates.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from adaptation import late_cosine, log_of_two, two_normals
from jax import random
from numpyro.distributions import constraints
from vera_targets import (
    Target,
    distance,
    maximum_of,
    monte_carlo_error,
    nats_a_row,
    run_and_warnings,
)

import ebm_ppl as ebm


def known(model, x, log_p, log_z, start):
    """A target without a generator."""
    return Target(model, None, np.asarray(x), log_p, log_z, start)


def drift(seed):
    num_dims, num_steps = 10, 4000
    model, x, log_z = two_normals(seed, num_dims, 0.3, (-7.0, 5.0))

    means = np.zeros((2, num_dims))
    means[:, 0] = -7.0, 5.0
    start = {"means": means, "z": np.log(0.7 / 0.3)}
    target = known(model, x, log_of_two, log_z, start)
    return (
        target,
        (x,),
        ebm.Jarzynski(model, optax.adam(late_cosine(num_steps))),
        num_steps,
    )


def precision_of(name, constant=1.0):
    return numpyro.param(name, constant, constraint=constraints.positive)


def log_p_of_precision(name):
    """Of N(0, 1 / parameter), and its log Z."""

    def log_p(params, v):
        return -0.5 * params[name] * v**2

    def log_z(params):
        return 0.5 * jnp.log(2 * jnp.pi / params[name])

    return log_p, log_z


def rate(seed):
    x = 0.6 * random.normal(random.key(seed), (60,))

    def model(x):
        lam, base = precision_of("lam", 0.5), dist.Normal(0.0, 1.0)
        energy = ebm.EnergyDistribution(lambda v: 0.5 * (lam - 1) * v**2, base)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", energy, obs=x)

    start = {"lam": np.array(1 / np.mean(np.square(x)))}
    target = known(model, x, *log_p_of_precision("lam"), start)
    backend = ebm.Jarzynski(model, optax.adam(2e-2), num_walkers=256)
    return target, (x,), backend, 3000


def stopped(seed):
    """x ~ N(0, 1/k) and y ~ N(0, 1/(2k)): √2 y is of the law of x."""
    x, y = (
        random.normal(key, (size,)) / np.sqrt(0.09 * factor)
        for key, size, factor in zip(
            random.split(random.key(seed)), (200, 300), (1.0, 2.0), strict=True
        )
    )
    flat = dist.ImproperUniform(constraints.real, (), ())

    def model(x, y):
        k, near = precision_of("k"), dist.Normal(0.0, 1.0)
        for name, values, factor in (("x", x, 1.0), ("y", y, 2.0)):
            energy = ebm.EnergyDistribution(
                lambda v, factor=factor: 0.5 * factor * k * v**2, flat, start=near
            )
            with numpyro.plate(f"rows of {name}", len(values)):
                numpyro.sample(name, energy, obs=values)

    both = np.concatenate([np.asarray(x), np.sqrt(2) * np.asarray(y)])
    start = {"k": np.array(1 / np.mean(both**2))}
    target = known(model, both, *log_p_of_precision("k"), start)
    return target, (x, y), ebm.Jarzynski(model, optax.adam(1e-2)), 200


def report(name, seed):
    target, args, backend, num_steps = ROWS[name](seed)
    best, errors = maximum_of(target)
    fit, told = run_and_warnings(backend, seed, num_steps, *args)

    quiet = {"progress_bar": False}
    test = ebm.score_test(random.key(100 + seed), fit, target.model, *args, **quiet)
    lost = nats_a_row(target, best) - nats_a_row(target, fit.params)
    print(
        f"{name}, seed {seed}: {distance(fit.params, best, errors):.1f} standard errors "
        f"off, {lost:.4f} nats a row lost (the test says {test.gain_per_row:.4f}, "
        f"{'silent' if test.is_at_maximum else 'not at a maximum'}), "
        f"{'warned' if told else 'silent'}",
        flush=True,
    )

    began = time.perf_counter()
    polished = ebm.polish(random.key(200 + seed), fit, target.model, *args, **quiet)
    print(
        f"    polished in {polished.num_rounds} rounds and "
        f"{time.perf_counter() - began:.0f} s: "
        f"{distance(polished.params, best, errors):.2f} standard errors off, Monte Carlo "
        f"{monte_carlo_error(polished, errors):.2f} of them; standard "
        f"errors stated {ratio(polished.standard_errors, errors)} of the true ones; "
        f"flags {list(polished.flags)}",
        flush=True,
    )
    jax.clear_caches()


def ratio(stated, errors):
    """Smallest and largest of all parameters."""
    ratios = jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(a / b), stated, errors))
    flat = np.concatenate(ratios)
    return f"{flat.min():.2f} to {flat.max():.2f}"


ROWS = {"drift": drift, "rate": rate, "stopped": stopped}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    for name in asked.rows:
        for seed in range(asked.seeds):
            report(name, seed)


if __name__ == "__main__":
    main()
