"""The 50-dimensional mixture of Carbone et al. (2023), section 4.1, against its closed
form.

Two unit Gaussians at -10 and +6 on the first axis, a quarter of the data in the first.
The energy learns both means and the log mass between them from an initial mixture whose
modes nearly coincide, so the mass has to follow walkers from one place to two.  Printed
per seed: the closed-form KL divergence, the learned mass, and the error of log Z as the
held-out and as the training walkers see it; then the same for contrastive divergence,
with as many walkers, the same moves and the same rates: persistent walkers (PCD) and
walkers that begin at the rows (CD-1, CD-10).

    python benchmarks/gmm50.py [--seeds 5] [--steps 8000] [--baselines PCD CD-1 CD-10]
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.nn import logsumexp

import ebm_ppl as ebm

DIM, NUM_DATA, NUM_FIRST = 50, 10_000, 2_500
NUM_CHAINS, NUM_HOLDOUT, NUM_WALKERS = 16, 4, 625
STEP_SIZE = 0.1
RATES = {"first": 0.0025, "second": 0.0025, "log_mass": 0.0125}
T3_995 = 5.841  # Student t, 3 degrees of freedom, 99.5%


def potential(first, second, log_mass, x):
    """U(x) = -log(exp(-|x - a|²/2) + exp(-|x - b|²/2 - z))."""
    distances = jnp.stack(
        [((x - first) ** 2).sum(-1), ((x - second) ** 2).sum(-1) + 2 * log_mass]
    )
    return -logsumexp(-0.5 * distances, axis=0)


def true_log_normalizer(log_mass):
    return 0.5 * DIM * np.log(2 * np.pi) + np.log1p(np.exp(-log_mass))


def make_data(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(NUM_DATA, DIM))
    x[:NUM_FIRST, 0] -= 10
    x[NUM_FIRST:, 0] += 6
    return jnp.asarray(x, jnp.float32)


def initial_params(seed):
    rng = np.random.default_rng(1_000 + seed)
    first, second = 0.01 * rng.normal(size=(2, DIM))
    first[0] -= 0.1
    second[0] += 0.1
    as32 = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
    return {"first": as32(first), "second": as32(second), "log_mass": as32(0.0)}


def make_model(init):
    """The mixture at the initial parameters as base; E = U + log base, so Z is the
    integral of exp(-U)."""
    means = jnp.stack([init["first"], init["second"]])
    # The energy evaluates it too: without NumPyro's support checks, which a
    # hand-written loop would not make.
    base = dist.MixtureSameFamily(
        dist.Categorical(
            logits=jnp.stack([0.0, -init["log_mass"]]), validate_args=False
        ),
        dist.Normal(means, 1.0, validate_args=False).to_event(1),
        validate_args=False,
    )

    def model(x):
        first = numpyro.param("first", init["first"])
        second = numpyro.param("second", init["second"])
        log_mass = numpyro.param("log_mass", init["log_mass"])
        energy = lambda v: potential(first, second, log_mass, v) + base.log_prob(v)  # noqa: E731
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=x)

    return model


def sgd():
    """Plain gradient steps on the *mean* loss: the package's loss is a sum."""
    labels = {name: name for name in RATES}
    return optax.multi_transform(
        {name: optax.sgd(rate / NUM_DATA) for name, rate in RATES.items()}, labels
    )


def divergence(params):
    """KL(truth ‖ model) for modes so far apart that they do not overlap."""
    first, second = np.array(params["first"]), np.array(params["second"])
    first[0] += 10
    second[0] -= 6
    mass = learned_mass(params)
    return 0.25 * (0.5 * (first**2).sum() + np.log(0.25 / mass)) + 0.75 * (
        0.5 * (second**2).sum() + np.log(0.75 / (1 - mass))
    )


def learned_mass(params):
    return float(1 / (1 + np.exp(-float(params["log_mass"]))))


def jarzynski(seed, num_steps):
    init = initial_params(seed)
    model = make_model(init)
    # Plain gradient steps and walkers that stay, as in the paper.
    backend = ebm.Jarzynski(
        model,
        sgd(),
        kernel=ebm.ULA(STEP_SIZE),
        num_chains=NUM_CHAINS,
        num_walkers=NUM_WALKERS,
        num_holdout_chains=NUM_HOLDOUT,
        num_kernel_steps=1,
        ess_target=None,
        renew_every=None,
    )
    fit = backend.run(random.key(seed), num_steps, make_data(seed), progress_bar=False)
    truth = true_log_normalizer(float(fit.params["log_mass"]))
    history = fit.history
    return {
        "kl": divergence(fit.params),
        "mass": learned_mass(fit.params),
        "held-out": float(history["log_normalizer"]["x"][-1]) - truth,
        "se": float(history["log_normalizer_stderr"]["x"][-1]),
        "training": float(history["log_normalizer_training"]["x"][-1]) - truth,
        "ess": float(history["ess"]["x"].min()),
        "resampled": int((history["resampled"]["x"] > 0).sum()),
    }


BASELINES = {
    "PCD": {"method": "persistent", "num_walkers": NUM_CHAINS * NUM_WALKERS},
    "CD-1": {"method": "data"},
    "CD-10": {"method": "data", "num_kernel_steps": 10},
}


def baseline(name, seed, num_steps):
    model = make_model(initial_params(seed))
    backend = ebm.ContrastiveDivergence(
        model, sgd(), kernel=ebm.ULA(STEP_SIZE), **BASELINES[name]
    )
    fit = backend.run(random.key(seed), num_steps, make_data(seed), progress_bar=False)
    return {"kl": divergence(fit.params), "mass": learned_mass(fit.params)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES, default=list(BASELINES)
    )
    options = parser.parse_args()
    print(
        "seed |     KL |   mass | log Z error: held-out (se, in se) | training | min "
        "ESS | resampled"
    )
    rows = []
    for seed in range(options.seeds):
        began = time.perf_counter()
        row = jarzynski(seed, options.steps)
        rows.append(row)
        print(
            f"{seed:4d} | {row['kl']:.4f} | {row['mass']:.4f} | "
            f"{row['held-out']:+.4f} ({row['se']:.4f}, "
            f"{abs(row['held-out']) / row['se']:.1f}) | {row['training']:+.4f} | "
            f"{row['ess']:.3f} | {row['resampled']:5d}   "
            f"[{time.perf_counter() - began:.0f} s]",
            flush=True,
        )
        for name in options.baselines:
            began = time.perf_counter()
            found = baseline(name, seed, options.steps)
            print(
                f"     {name}: KL {found['kl']:.4f}, mass {found['mass']:.4f}   "
                f"[{time.perf_counter() - began:.0f} s]",
                flush=True,
            )
    mean = {
        name: np.mean([row[name] for row in rows])
        for name in ("kl", "mass", "held-out", "training")
    }
    worst = {
        "KL (bar 0.02)": max(row["kl"] for row in rows),
        "|mass - 1/4| (0.025)": max(abs(row["mass"] - 0.25) for row in rows),
        "|held-out error| (0.08)": max(abs(row["held-out"]) for row in rows),
        f"|held-out error| / se ({T3_995})": max(
            abs(row["held-out"]) / row["se"] for row in rows
        ),
    }
    smallest = min(abs(row["training"]) for row in rows)
    print(
        "worst of the seeds: "
        + ", ".join(f"{name}: {value:.4f}" for name, value in worst.items())
    )
    print(
        f"means: mass {mean['mass']:.4f} (bar 0.25 ± 0.01), held-out error "
        f"{mean['held-out']:+.4f} (bar 0.04), training error {mean['training']:+.4f}, "
        f"smallest training error {smallest:.4f} (over 0.1)"
    )


if __name__ == "__main__":
    main()
