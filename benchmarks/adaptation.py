"""What learning from its own walkers does to a fit, and what renewal undoes.

    python benchmarks/adaptation.py [--seeds 6] [--rows adam plain narrow net] [--data FOLDER]

Every row is fitted with ``renew_every=50`` and with None, the paper's algorithm; seeds
are those of data and walkers.

- adam: two normals at −7 and +5 in the first of 10 coordinates, 30% in one of them;
  Adam, 5e-3 on a cosine over the last third, 4,000 updates.
- plain: two normals at −3 and +3 in the first of 24 and of 30 coordinates, 20% in one
  of them; plain gradient descent, 6,000 and 24,000 updates.
- narrow: a unit normal and a narrow one at a distance of four, whose weight and width are
  learned: what annealing from the base finds now and then; Adam, 1e-2 on a cosine,
  2,000 updates.
- net: two layers of 256 on a normal base, of the first 16 principal components of
  optdigits and satimage, 3,000 updates.  FOLDER holds optdigits.npz and satimage.npz.

A warning of a run is told by "warned".
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.nn import logsumexp
from numpyro.contrib.module import flax_module
from tilt import Net, load, mean_log_density

import ebm_ppl as ebm

RENEWALS = (50, None)


def run(model, optim, seed, num_steps, x, renew_every):
    backend = ebm.Jarzynski(model, optim, renew_every=renew_every)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = backend.run(random.key(seed), num_steps, x, progress_bar=False)
    return fit, bool(told), time.perf_counter() - began


def last(fit, key):
    values = fit.history[key]["x"]
    return float(np.mean(values[-max(1, len(values) // 20) :]))


def log_of_two(params, v):
    """Log of two unit normals around ``means``, with odds ``z``, not normalised."""
    squares = jnp.sum((v[..., None, :] - params["means"]) ** 2, -1)
    tilts = jnp.stack([jnp.zeros_like(params["z"]), params["z"]])
    return logsumexp(-0.5 * squares - tilts, -1)


def two_normals(seed, num_dims, share, gap):
    """Data, and a model of two means and the odds of their normals."""
    key, key_start = random.split(random.key(seed))
    means = jnp.zeros((2, num_dims)).at[:, 0].set(jnp.array(gap))
    is_first = jnp.arange(10_000)[:, None] < 10_000 * share
    x = random.normal(key, (10_000, num_dims)) + jnp.where(is_first, means[0], means[1])
    start = 0.01 * random.normal(key_start, (2, num_dims))
    start = start.at[:, 0].set(jnp.sign(jnp.array(gap)) * 0.1)
    base = dist.Normal(x.mean(0), x.std(0)).to_event(1)

    def model(x):
        params = {
            "means": numpyro.param("means", start),
            "z": numpyro.param("z", jnp.zeros(())),
        }
        energy = lambda v: base.log_prob(v) - log_of_two(params, v)  # noqa: E731

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    def log_z(params):
        z = params["z"]
        return 0.5 * num_dims * np.log(2 * np.pi) + jnp.logaddexp(0.0, -z)

    return model, x, log_z


def narrow_mode(seed, num_dims, width, share, num_rows=1000):
    """Data, and a model of a narrow normal's weight and width beside the base."""
    rng, centre = np.random.default_rng(seed), 4 * num_dims**-0.5
    is_far = np.arange(num_rows)[:, None] < share * num_rows
    x = rng.normal(size=(num_rows, num_dims))
    x = np.where(is_far, centre + width * x, x).astype(np.float32)
    base = dist.Normal(jnp.zeros(num_dims), 1.0).to_event(1)

    def model(x):
        z, s = numpyro.param("z", 0.0), numpyro.param("s", 0.0)

        def energy(v):
            squares = jnp.sum((v - centre) ** 2, -1) * jnp.exp(-2 * s)
            odds = -z - 0.5 * squares - num_dims * s + 0.5 * jnp.sum(v**2, -1)
            return -jnp.logaddexp(0.0, odds)

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    return model, x, lambda params: jnp.logaddexp(0.0, -params["z"])


def report(name, model, x, log_z, optim, num_steps, seed):
    for renew_every in RENEWALS:
        fit, told, seconds = run(model, optim, seed, num_steps, x, renew_every)
        right = float(log_z(fit.params))
        mass = 1 / (1 + np.exp(-float(fit.params["z"])))
        print(
            f"{name}, {num_steps} updates, seed {seed}, renew_every={renew_every}: mass "
            f"{mass:.3f}, log Z by training islands off "
            f"{last(fit, 'log_normalizer_training') - right:+.2f}, by held-out "
            f"{last(fit, 'log_normalizer') - right:+.2f}, ESS {last(fit, 'ess'):.2f}, "
            f"{'warned' if told else 'silent'}, {seconds:.0f} s",
            flush=True,
        )
    jax.clear_caches()


def late_cosine(num_steps):
    """A rate of 5e-3, on a cosine over the last third."""
    last = num_steps // 3
    parts = optax.constant_schedule(5e-3), optax.cosine_decay_schedule(5e-3, last)
    return optax.join_schedules(parts, [num_steps - last])


def adam_rows(asked):
    num_steps = 4000
    rate = late_cosine(num_steps)
    for seed in range(asked.seeds):
        model, x, log_z = two_normals(seed, 10, 0.3, (-7.0, 5.0))
        report("adam 10-d (0.3)", model, x, log_z, optax.adam(rate), num_steps, seed)


def plain_rows(asked):
    for num_dims, share in ((24, 0.2), (30, 0.2)):
        for num_steps in (6000, 24_000):
            for seed in range(asked.seeds):
                model, x, log_z = two_normals(seed, num_dims, share, (-3.0, 3.0))
                name = f"plain {num_dims}-d ({share})"
                optim = optax.sgd(asked.rate)
                report(name, model, x, log_z, optim, num_steps, seed)


def narrow_rows(asked):
    num_steps = 2000
    rate = optax.cosine_decay_schedule(1e-2, num_steps)
    for num_dims, width in ((5, 0.5), (2, 0.3), (1, 0.05)):
        for share in (0.5, 0.2):
            for seed in range(asked.seeds):
                model, x, log_z = narrow_mode(seed, num_dims, width, share)
                name = f"narrow {width} in {num_dims}-d ({1 - share})"
                report(name, model, x, log_z, optax.adam(rate), num_steps, seed)


def net_rows(asked):
    for name in ("optdigits 16", "satimage 16"):
        rows = load(asked.data, name)
        train = np.asarray(rows.values(rows.train, random.key(0)))
        base = dist.Normal(train.mean(0), train.std(0)).to_event(1)

        def model(x, base=base, rows=rows, size=train.shape[1]):
            net = flax_module("net", Net(), input_shape=(size,))
            with numpyro.plate("rows", len(x), subsample_size=min(256, len(x))):
                batch = numpyro.subsample(x, event_dim=1)
                noisy = rows.values(batch, numpyro.prng_key())
                numpyro.sample("x", ebm.EnergyDistribution(net, base), obs=noisy)

        optim = optax.adam(optax.cosine_decay_schedule(1e-3, asked.steps))
        for renew_every in RENEWALS:
            fit, told, seconds = run(
                model, optim, 0, asked.steps, rows.train, renew_every
            )
            gap = last(fit, "log_normalizer_training") - last(fit, "log_normalizer")
            log_z, density = mean_log_density(fit, model, rows.test, progress_bar=False)
            print(
                f"net on {name}, {asked.steps} updates, renew_every={renew_every}: "
                f"training minus held-out log Z {gap:+.2f}, test density {density:.2f}, "
                f"{'certified' if log_z.is_certified else 'flagged'}, "
                f"{'warned' if told else 'silent'}, {seconds:.0f} s\n  {log_z}",
                flush=True,
            )
        jax.clear_caches()


ROWS = {
    "adam": adam_rows,
    "plain": plain_rows,
    "narrow": narrow_rows,
    "net": net_rows,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="+", default=["adam", "plain"], choices=ROWS)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rate", type=float, default=2e-7)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--data", default=".")
    asked = parser.parse_args()
    for name in asked.rows:
        ROWS[name](asked)


if __name__ == "__main__":
    main()
