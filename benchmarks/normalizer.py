"""Certified log Z: coverage of its intervals and brackets, exact methods, traps, and
fitted digits.

    python benchmarks/normalizer.py coverage [--seeds 100] [--targets NAME ...]
    python benchmarks/normalizer.py exact
    python benchmarks/normalizer.py traps [--seeds 5]
    python benchmarks/normalizer.py loo
    python benchmarks/normalizer.py digits DATA_FOLDER [--steps 4000]

``coverage``: energies whose log Z is known, annealed in both directions from 100 seeds
each: how often the 90% interval covers the truth (bar 82 to 98 of 100), how often the
bracket does (bar 90), and the limits' mean slack in its standard errors (bar: above
−3).  ``exact``: quadrature and enumeration in double precision (bar: relative error
1e-6).  ``traps``: cases where a naive estimate is wrong, which must be flagged, refused
or covered, and good ones, which must not be flagged.  ``loo``: λ of 40 numbers by NUTS
with quadrature inside the model (bar: elpd −34.24 ± 0.1, the true model first in
az.compare; with numpyro.factor it is not).  ``digits``: a density of optdigits (see
optdigits.py), its bracket (bar 0.3 nats within 60 s) beside what held-out and training
walkers claim.
"""

import argparse
import itertools
import time

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.nn import logsumexp
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from optdigits import Net, dequantise, gaussian, load
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import norm

import ebm_ppl as ebm

# --- Energies whose log Z is known ----------------------------------------------------


def normal(num_dims):
    return dist.Normal(0.0, 1.0).expand([num_dims]).to_event(1)


def shifted_gaussian(num_dims):
    """E = ½ Σ λᵢ xᵢ² − b Σ xᵢ over N(0, I)."""
    rates = jnp.geomspace(0.3, 5.0, num_dims) if num_dims > 1 else jnp.array([3.0])
    shift = 1.5 / np.sqrt(num_dims)
    energy = lambda v: 0.5 * (rates * v**2).sum(-1) - shift * v.sum(-1)  # noqa: E731
    precision = 1.0 + np.asarray(rates, float)
    return ebm.EnergyDistribution(energy, normal(num_dims)), 0.5 * np.sum(
        shift**2 / precision - np.log(precision)
    )


def two_modes(num_dims=5, distance=3.0):
    """A mixture of two Gaussians of unequal mass and width, times e^2, from a start
    that covers both."""
    locs = jnp.zeros((2, num_dims)).at[:, 0].set(jnp.array([-distance, distance]))
    scales, log_mass = jnp.array([1.0, 0.6]), jnp.log(jnp.array([0.3, 0.7]))

    def energy(v):
        standard = (v[..., None, :] - locs) / scales[:, None]
        log_density = -0.5 * (standard**2).sum(-1) - num_dims * (
            jnp.log(scales) + 0.5 * np.log(2 * np.pi)
        )
        return -logsumexp(log_density + log_mass, axis=-1) - 2.0

    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    return ebm.EnergyDistribution(
        energy, flat, start=dist.Normal(0.0, 3.0).expand([num_dims]).to_event(1)
    ), 2.0


def skewed_quartic(num_dims=3):
    """E = Σ ¼ x⁴ + ½ x³ − 2x over N(0, I): far from symmetric."""
    integrand = lambda x: np.exp(-(0.25 * x**4 + 0.5 * x**3 - 2 * x)) * norm.pdf(x)  # noqa: E731
    energy = lambda v: (0.25 * v**4 + 0.5 * v**3 - 2 * v).sum(-1)  # noqa: E731
    one = np.log(quad(integrand, -12, 12, epsabs=1e-13, epsrel=1e-13, limit=400)[0])
    return ebm.EnergyDistribution(energy, normal(num_dims)), num_dims * one


def truncated(num_dims=4):
    """E = 2 Σ xᵢ over positive halves of normals."""
    base = dist.HalfNormal(1.0).expand([num_dims]).to_event(1)
    return ebm.EnergyDistribution(lambda v: 2.0 * v.sum(-1), base), num_dims * (
        np.log(2) + 2.0 + norm.logcdf(-2.0)
    )


def simplex(concentration=(1.0, 2.0, 5.0, 3.0)):
    """E = −Σ aᵢ log xᵢ over a uniform simplex: a Dirichlet."""
    a = np.asarray(concentration)
    energy = lambda v: -(jnp.asarray(a) * jnp.log(v)).sum(-1)  # noqa: E731
    truth = gammaln(a + 1).sum() - gammaln((a + 1).sum()) + gammaln(len(a))
    return ebm.EnergyDistribution(energy, dist.Dirichlet(jnp.ones(len(a)))), truth


TARGETS = {
    "gaussian 1": lambda: shifted_gaussian(1),
    "gaussian 10": lambda: shifted_gaussian(10),
    "gaussian 50": lambda: shifted_gaussian(50),
    "gaussian 200": lambda: shifted_gaussian(200),
    "two modes": two_modes,
    "skewed quartic": skewed_quartic,
    "truncated": truncated,
    "simplex": simplex,
}


# --- Coverage -------------------------------------------------------------------------


def coverage(names, num_seeds):
    print(
        f"{num_seeds} seeds each, 16 islands of 32 walkers, 256 temperatures in either "
        "direction"
    )
    print(
        "target         | interval | bracket | lower: slack (se) | upper: slack (se) "
        "| mean error (se) | width | flagged | s a seed"
    )
    for name in names:
        distribution, truth = TARGETS[name]()
        rows, flagged, began = [], 0, time.perf_counter()
        for seed in range(num_seeds):
            log_z = ebm.log_normalizer(
                random.key(seed),
                distribution,
                num_walkers=32,
                num_temperatures=256,
                progress_bar=False,
            )
            low, high = log_z.interval(0.9)["x"]
            rows.append(
                [log_z.estimate["x"], low, high, log_z.lower["x"], log_z.upper["x"]]
            )
            flagged += not log_z.is_certified
        seconds = (time.perf_counter() - began) / num_seeds
        estimate, low, high, lower, upper = np.asarray(rows, float).T
        interval = np.sum((low <= truth) & (truth <= high))
        bracket = np.sum((lower <= truth) & (truth <= upper))

        def in_errors(values, num=num_seeds):
            return (
                f"{values.mean():7.4f} "
                f"({values.mean() / (values.std(ddof=1) / np.sqrt(num)):5.1f})"
            )

        print(
            f"{name:<14} | {interval:8d} | {bracket:7d} | "
            f"{in_errors(truth - lower):>17} | {in_errors(upper - truth):>17} | "
            f"{in_errors(estimate - truth):>15} | {np.mean(upper - lower):5.3f} | "
            f"{flagged:7d} | {seconds:5.2f}",
            flush=True,
        )


# --- Exact methods --------------------------------------------------------------------


def ising(coupling=0.3):
    """A periodic 4 x 4 lattice; the truth by its transfer matrix."""
    sites = np.arange(16).reshape(4, 4)
    bonds = np.concatenate(
        [
            np.stack([sites, np.roll(sites, 1, axis)], -1).reshape(-1, 2)
            for axis in (0, 1)
        ]
    )

    def energy(v):
        spins = 2.0 * v - 1.0
        return -coupling * (spins[..., bonds[:, 0]] * spins[..., bonds[:, 1]]).sum(-1)

    rows = np.array(list(itertools.product([-1, 1], repeat=4)))
    within = (rows * np.roll(rows, 1, 1)).sum(1)
    transfer = np.exp(
        coupling * (rows @ rows.T + 0.5 * (within[:, None] + within[None]))
    )
    truth = np.log(np.trace(np.linalg.matrix_power(transfer, 4))) - 16 * np.log(2)
    return ebm.EnergyDistribution(
        energy, dist.Bernoulli(0.5).expand([16]).to_event(1)
    ), truth


def exact():
    print("case           | method      | relative error of Z | flags")
    with jax.enable_x64(True):
        cases = {
            "gaussian 1": (shifted_gaussian(1), "quadrature"),
            "gaussian 2": (shifted_gaussian(2), "quadrature"),
            "skewed quartic": (skewed_quartic(1), "quadrature"),
            "truncated": (truncated(1), "quadrature"),
            "simplex": (simplex((1.0, 2.0, 5.0)), "quadrature"),
            "Ising 4 x 4": (ising(), "enumeration"),
        }
        for name, ((distribution, truth), method) in cases.items():
            log_z = ebm.log_normalizer(None, distribution, method=method)
            error = abs(np.expm1(float(log_z.estimate["x"]) - truth))
            print(
                f"{name:<14} | {method:<11} | {error:19.1e} | {len(log_z.flags['x'])}"
            )


# --- Traps ----------------------------------------------------------------------------


def observed(distribution, values):
    """The energy with data at its site."""

    def model():
        with numpyro.plate("rows", len(values)):
            numpyro.sample("x", distribution, obs=values)

    return model


def mixture_over(base, num_dims, locs, scales, masses):
    """An energy over ``base`` whose density is a mixture of Gaussians (log Z = 0), and
    200 draws of it."""
    locs, scales, log_masses = (
        jnp.asarray(locs),
        jnp.asarray(scales),
        jnp.log(jnp.asarray(masses)),
    )

    def energy(v):
        standard = (v[..., None, :] - locs) / scales[:, None]
        log_density = -0.5 * (standard**2).sum(-1) - num_dims * (
            jnp.log(scales) + 0.5 * np.log(2 * np.pi)
        )
        return base.log_prob(v) - logsumexp(log_density + log_masses, axis=-1)

    which = random.categorical(random.key(1), log_masses, shape=(200,))
    draws = locs[which] + scales[which][:, None] * random.normal(
        random.key(2), (200, num_dims)
    )
    return ebm.EnergyDistribution(energy, base), draws


def far_mode(data):
    base = normal(5)
    locs = jnp.zeros((2, 5)).at[1].set(6.0)
    distribution, draws = mixture_over(base, 5, locs, [1.0, 1.0], [0.5, 0.5])
    return (observed(distribution, draws) if data else distribution), 0.0, {}


def spike():
    """Half of the mass in a well of width 0.01 that training rows sit in."""
    base = normal(4)
    locs = jnp.zeros((2, 4)).at[1].set(1.5)
    distribution, draws = mixture_over(base, 4, locs, [1.0, 0.01], [0.5, 0.5])
    return observed(distribution, draws), 0.0, {}


def funnel(num_dims=5, scale=3.0):
    """Neal's funnel, normalised: v ~ N(0, 9), x | v ~ N(0, exp(v))."""

    def energy(x):
        v, rest = x[..., 0], x[..., 1:]
        return -dist.Normal(0.0, scale).log_prob(v) - dist.Normal(
            0.0, jnp.exp(v / 2)[..., None]
        ).log_prob(rest).sum(-1)

    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    return ebm.EnergyDistribution(energy, flat, start=normal(num_dims)), 0.0, {}


def heavy_tails(num_dims=3):
    """(1 + r²)^−2 in three dimensions, from a Gaussian: Z = π²."""
    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    energy = lambda v: 2.0 * jnp.log1p((v**2).sum(-1))  # noqa: E731
    return (
        ebm.EnergyDistribution(energy, flat, start=normal(num_dims)),
        2 * np.log(np.pi),
        {},
    )


def unbounded():
    return (
        ebm.EnergyDistribution(lambda v: -((v**2).sum(-1) ** 2), normal(3)),
        np.inf,
        {},
    )


def improper():
    """E cancels the base exactly: nothing is left to integrate to a finite number."""
    return (
        ebm.EnergyDistribution(lambda v: -0.5 * (v**2).sum(-1), normal(3)),
        np.inf,
        {},
    )


def huge_step():
    distribution, truth = shifted_gaussian(10)
    return distribution, truth, {"kernel": ebm.MALA(20.0, target_acceptance=None)}


def few_temperatures():
    distribution, truth = shifted_gaussian(200)
    return distribution, truth, {"num_temperatures": 4}


def no_moves():
    """Importance sampling of a target four times wider than its proposal: weights
    without a variance."""
    distribution = ebm.EnergyDistribution(lambda v: -0.375 * (v**2).sum(-1), normal(10))
    return (
        distribution,
        10 * np.log(2.0),
        {"kernel": ebm.MALA(1e-8, target_acceptance=None), "num_temperatures": 8},
    )


def wrong_samples():
    """The reverse pass is given draws of the base for draws of the model."""
    distribution, truth = shifted_gaussian(10)
    draws = normal(10).sample(random.key(5), (16, 64))
    return distribution, truth, {"samples": {"x": draws}, "num_temperatures": 64}


def three_dimensions():
    distribution, truth = shifted_gaussian(3)
    return distribution, truth, {"method": "quadrature"}


def hard_edge():
    """A truncation by infinite energies, which a grid cannot place."""
    distribution = ebm.EnergyDistribution(
        lambda v: jnp.where(v > 0.123, v, jnp.inf), dist.Normal(0.0, 1.0)
    )
    return distribution, 0.5 + norm.logcdf(-1.123), {"method": "quadrature"}


def not_a_number():
    return ebm.EnergyDistribution(lambda v: -jnp.log(v.sum(-1)), normal(3)), np.nan, {}


TRAPS = {
    "two far modes, data in both": lambda: far_mode(data=True),
    "a narrow well that holds data": spike,
    "funnel": funnel,
    "heavy tails": heavy_tails,
    "not bounded below": unbounded,
    "base cancelled": improper,
    "step size far too large": huge_step,
    "too few temperatures": few_temperatures,
    "weights without variance": no_moves,
    "samples of another model": wrong_samples,
    "quadrature in 3 dimensions": three_dimensions,
    "quadrature of a hard edge": hard_edge,
    "NaN in the support": not_a_number,
}


def covered_modes():
    base = dist.Normal(0.0, 4.0).expand([5]).to_event(1)
    locs = jnp.zeros((2, 5)).at[1].set(2.0)
    distribution, draws = mixture_over(base, 5, locs, [1.0, 1.0], [0.5, 0.5])
    return observed(distribution, draws), 0.0, {}


def misfitted_data():
    """Data that the model does not describe are no reason to doubt log Z."""
    distribution, truth = shifted_gaussian(10)
    return (
        observed(distribution, 3.0 * random.normal(random.key(6), (100, 10)) + 2.0),
        truth,
        {},
    )


GOOD = {
    name: lambda target=target: (*target(), {}) for name, target in TARGETS.items()
} | {
    "two modes with data": covered_modes,
    "data of another model": misfitted_data,
}


def traps(num_seeds):
    for kind, cases in (("trap", TRAPS), ("good case", GOOD)):
        print(
            f"\n{kind:<31} | truth    | of {num_seeds} seeds: certified, of these "
            "outside the bracket (outside twice its width) | seed 0"
        )
        for name, case in cases.items():
            model, truth, options = case()
            certified, outside, far_outside, first = 0, 0, 0, ""
            for seed in range(num_seeds):
                try:
                    log_z = ebm.log_normalizer(
                        random.key(seed), model, progress_bar=False, **options
                    )
                except ValueError as error:
                    first = first or f"refused: {str(error)[:140]}"
                    continue
                lower, upper = float(log_z.lower["x"]), float(log_z.upper["x"])
                certified += log_z.is_certified
                middle, half = 0.5 * (lower + upper), 0.5 * (upper - lower) + 1e-5
                outside += log_z.is_certified and not abs(middle - truth) <= half
                far_outside += (
                    log_z.is_certified and not abs(middle - truth) <= 2 * half
                )
                flags = "; ".join(flag.split(":")[0] for flag in log_z.flags["x"])
                first = first or f"[{lower:.3f}, {upper:.3f}] {flags or 'certified'}"
            print(
                f"{name:<31} | {truth:8.3f} | {certified:2d}, {outside} "
                f"({far_outside}) | {first}",
                flush=True,
            )


# --- The precision of 40 numbers, by LOO ----------------------------------------------


def loo():
    """The example of precision.py: posterior, LOO and comparison with quadrature inside
    the model."""
    x = np.random.default_rng(0).normal(size=40) * 0.7
    flat = dist.ImproperUniform(constraints.real, (), ())

    def energy_model(energy):
        def model(x):
            lam = numpyro.sample("lam", dist.Gamma(2, 2))
            with numpyro.plate("data", len(x)):
                numpyro.sample(
                    "x", ebm.EnergyDistribution(lambda v: energy(lam, v), flat), obs=x
                )

        return model

    def factor_model(energy):
        def model(x):
            lam = numpyro.sample("lam", dist.Gamma(2, 2))
            with numpyro.plate("data", len(x)):
                numpyro.factor("x", -energy(lam, x))

        return model

    def normal_model(x):
        lam = numpyro.sample("lam", dist.Gamma(2, 2))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(0, lam**-0.5), obs=x)

    def elpd_of(model):
        mcmc = MCMC(
            NUTS(model),
            num_warmup=500,
            num_samples=1000,
            num_chains=4,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(random.key(0), x)
        result = az.loo(
            az.from_numpyro(mcmc, log_likelihood=True), var_name="x", pointwise=True
        )
        return float(mcmc.get_samples()["lam"].mean()), result

    quadratic = lambda lam, v: 0.5 * lam * v**2  # noqa: E731
    laplace = lambda lam, v: lam * jnp.abs(v)  # noqa: E731
    quartic = lambda lam, v: lam * v**4  # noqa: E731
    models = {
        "normal": normal_model,
        "energy λx²/2": ebm.normalized(energy_model(quadratic)),
        # A kink converges slowly under a trapezoid rule.
        "energy λ|x|": ebm.normalized(energy_model(laplace), num_points=32_769),
        "energy λx⁴": ebm.normalized(energy_model(quartic)),
        "factor λx²/2": factor_model(quadratic),
    }
    results = {}
    for name, model in models.items():
        mean, results[name] = elpd_of(model)
        elpd = (
            results[name].elpd
            if hasattr(results[name], "elpd")
            else results[name].elpd_loo
        )
        print(
            f"{name:<14} posterior mean of λ {mean:.3f}, elpd {elpd:.2f}, max k̂ "
            f"{np.max(results[name].pareto_k):.2f}"
        )
    certified = {
        name: result
        for name, result in results.items()
        if not name.startswith("factor")
    }
    print("\naz.compare of the normalised ones:", list(az.compare(certified).index))
    print("with numpyro.factor among them:   ", list(az.compare(results).index))


# --- Fitted digits --------------------------------------------------------------------


def digits(folder, num_steps):
    data = load(folder)
    x_train = jnp.asarray(data["X_train"], jnp.float32)
    base = gaussian(x_train, random.key(1))
    whiten = jnp.linalg.inv(base.scale_tril).T

    def model(x):
        net = flax_module("net", Net(1), input_shape=(64,))
        energy = lambda v: net((v - base.loc) @ whiten)[..., 0]  # noqa: E731
        with numpyro.plate("rows", x.shape[0], subsample_size=256):
            batch = dequantise(numpyro.prng_key(), numpyro.subsample(x, event_dim=1))
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)

    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, num_steps, 0.02), weight_decay=1e-4
    )
    backend = ebm.Jarzynski(
        model, optim, num_chains=16, num_walkers=64, num_kernel_steps=4
    )
    fit = backend.run(random.key(0), num_steps, x_train)
    print(
        f"{num_steps} updates; training walkers claim log Z = "
        f"{fit.history['log_normalizer_training']['x'][-1]:.3f}"
    )
    print(fit.state.log_normalizer())
    for num_temperatures in (None, 4096):
        began = time.perf_counter()
        log_z = ebm.log_normalizer(
            random.key(1),
            model,
            fit.params,
            x_train,
            num_temperatures=num_temperatures,
            progress_bar=False,
        )
        width = float(log_z.upper["x"] - log_z.lower["x"])
        seconds = time.perf_counter() - began
        print(
            f"{log_z}\n  {width:.3f} nats wide, {log_z.num_evaluations:,} energy "
            f"evaluations, {seconds:.0f} s"
        )
    refreshed = backend.refresh(random.key(2), fit.state, x_train)
    print(f"after refresh: {refreshed.log_normalizer()}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("coverage")
    command.add_argument("--seeds", type=int, default=100)
    command.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS)
    )
    commands.add_parser("exact")
    commands.add_parser("traps").add_argument("--seeds", type=int, default=5)
    commands.add_parser("loo")
    command = commands.add_parser("digits")
    command.add_argument("folder")
    command.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    if options.command == "coverage":
        coverage(options.targets, options.seeds)
    elif options.command == "exact":
        exact()
    elif options.command == "traps":
        traps(options.seeds)
    elif options.command == "loo":
        loo()
    else:
        digits(options.folder, options.steps)


if __name__ == "__main__":
    main()
