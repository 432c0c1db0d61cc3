"""Energies whose likelihood is known in closed form or by a fine grid, for VERA."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.flatten_util import ravel_pytree
from jax.nn import logsumexp
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from scipy.optimize import minimize

import ebm_ppl as ebm

NUM_ROWS = 2000


class Target(NamedTuple):
    """A model of one energy, its data and its likelihood.

    Attributes:
        model: ``model(x)`` with the energy at site "x".
        generator: A generator for it.
        x: ``(num_rows, *event)``; of a joint model the label is the last column.
        log_p: ``log_p(params, x)``, of every row, log Z left out.
        log_z: log Z at constrained parameters.
        start: Constrained parameters at which the search for the maximum begins.
        draw: ``draw(rng, num_rows)`` from the model itself at ``start``; None where
            nobody wants it.
    """

    model: Callable[..., Any]
    generator: Callable[[], Any]
    x: np.ndarray
    log_p: Callable[[Any, Any], Any]
    log_z: Callable[[Any], Any]
    start: dict[str, Any]
    draw: Callable[[Any, int], Any] | None = None


def nats_a_row(target, params):
    params = jax.tree.map(jnp.asarray, params)
    return float(jnp.mean(target.log_p(params, target.x)) - target.log_z(params))


def drawn(target, seed, num_rows):
    """The target with rows drawn from the model itself at ``target.start``."""
    x = target.draw(np.random.default_rng(seed), num_rows)
    return target._replace(x=np.asarray(x, np.float32))


def by_inversion(log_p, params, support=constraints.real):
    """Draws of a density on the line, or on its positive half, by inversion."""

    def draw(rng, num_rows):
        is_positive = support is constraints.positive
        u = np.linspace(-7, 4, 40_001) if is_positive else np.linspace(-14, 14, 40_001)
        x = np.exp(u) if is_positive else u
        levels = np.asarray(log_p(params, x))
        density = np.exp(levels - levels.max()) * (x if is_positive else 1.0)
        below = np.cumsum(density) / density.sum()
        return np.interp(rng.uniform(size=num_rows), below, x)

    return draw


def maximum_of(target):
    """Parameters at the maximum of the likelihood, and their standard errors."""
    with jax.enable_x64():
        wide = target._replace(x=np.asarray(target.x, float))
        flat, unravel = ravel_pytree(jax.tree.map(np.asarray, target.start))

        def loss(flat):
            params = unravel(flat)
            return wide.log_z(params) - jnp.mean(wide.log_p(params, wide.x))

        slope = jax.jit(jax.value_and_grad(loss))
        found = minimize(slope, flat, jac=True, method="BFGS", options={"gtol": 1e-7})
        information = len(wide.x) * jax.hessian(loss)(found.x)
        errors = np.sqrt(np.diag(np.linalg.inv(information)))
        return (
            jax.tree.map(np.asarray, unravel(found.x)),
            jax.tree.map(np.asarray, unravel(errors)),
        )


def distance(params, best, errors):
    """Largest distance from the maximum over all parameters, in standard errors."""
    gaps = jax.tree.map(lambda a, b, e: np.max(np.abs(a - b) / e), params, best, errors)
    return max(jax.tree.leaves(gaps))


def monte_carlo_error(polished, errors):
    """Largest of all parameters, in standard errors."""
    zeros = jax.tree.map(np.zeros_like, polished.params)
    return distance(polished.monte_carlo_errors, zeros, errors)


def run_and_warnings(backend, seed, num_steps, *args):
    """The fit, and what the run warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = backend.run(random.key(seed), num_steps, *args, progress_bar=False)
    return fit, [str(w.message) for w in told if issubclass(w.category, UserWarning)]


def on_grid(energy, base, lower, upper, size=20_001):
    """log Z by a fine grid, of a one-dimensional energy."""
    grid = np.linspace(lower, upper, size)

    def log_z(params):
        log_p = base.log_prob(grid) - energy(params, grid)
        return logsumexp(log_p) + np.log(grid[1] - grid[0])

    return log_z


def model_of(energy, base, sites):
    """The model whose parameters are ``sites``: initial values and constraints."""

    def model(x):
        params = {
            name: numpyro.param(name, value, constraint=constraint)
            for name, (value, constraint) in sites.items()
        }
        with numpyro.plate("rows", len(x)):
            numpyro.sample(
                "x", ebm.EnergyDistribution(lambda v: energy(params, v), base), obs=x
            )

    return model


def net_generator(base, size):
    """A net of two hidden layers, normal given its latents."""
    layers = [nn.Dense(32), nn.swish, nn.Dense(32), nn.swish, nn.Dense(max(size, 1))]

    def generator():
        net = flax_module(
            "generator", nn.Sequential(layers), input_shape=(max(size, 2),)
        )
        interval = constraints.interval(0.01, 1.0)
        scale = numpyro.param("scale", 0.5, constraint=interval)
        z = numpyro.sample("z", dist.Normal(0, 1).expand([max(size, 2)]).to_event(1))
        mean = net(z) if size else net(z)[0]
        numpyro.sample("x", ebm.standardized_normal(base, mean, scale))

    return generator


def target_of(energy, base, sites, x, log_z, start, size=0, draw=None):
    def log_p(params, v):
        return base.log_prob(v) - energy(params, v)

    if size == 0:
        draw = by_inversion(log_p, start, base.support)
    return Target(
        model_of(energy, base, sites),
        net_generator(base, size),
        np.asarray(x, np.float32),
        log_p,
        log_z,
        start,
        draw,
    )


def precision(scale):
    """N(0, 1/λ) by its precision, over a standard normal."""
    base, x = dist.Normal(0.0, 1.0), np.random.default_rng(0).normal(0, scale, NUM_ROWS)
    return target_of(
        lambda p, v: 0.5 * (p["lam"] - 1) * v**2,
        base,
        {"lam": (1.0, constraints.positive)},
        x,
        lambda p: -0.5 * jnp.log(p["lam"]),
        {"lam": scale**-2.0},
    )


def precisions(size):
    """The same in several dimensions, a precision each."""
    base = dist.Normal(0.0, 1.0).expand([size]).to_event(1)
    x = np.random.default_rng(1).normal(0, 3.0**-0.5, (NUM_ROWS, size))
    return target_of(
        lambda p, v: 0.5 * jnp.sum((p["lam"] - 1) * v**2, -1),
        base,
        {"lam": (jnp.ones(size), constraints.positive)},
        x,
        lambda p: -0.5 * jnp.sum(jnp.log(p["lam"])),
        {"lam": np.full(size, 3.0)},
        size,
        lambda rng, num_rows: rng.normal(0, 3.0**-0.5, (num_rows, size)),
    )


def skewed_quartic():
    """a x + b x² + c x⁴ over N(0, 1.5²): two unequal wells."""
    rng, base = np.random.default_rng(2), dist.Normal(0.0, 1.5)
    left = rng.uniform(size=NUM_ROWS) < 0.7
    x = np.where(left, -1.5, 1.3) + 0.5 * rng.normal(size=NUM_ROWS)

    def energy(p, v):
        return p["a"] * v + p["b"] * v**2 + p["c"] * v**4

    sites = {
        "a": (0.0, constraints.real),
        "b": (0.0, constraints.real),
        "c": (0.05, constraints.positive),
    }
    start = {"a": 0.4, "b": -2.0, "c": 0.4}
    return target_of(energy, base, sites, x, on_grid(energy, base, -9, 9), start)


def laplace():
    """exp(−a |x|) over N(0, 2²)."""
    base, x = dist.Normal(0.0, 2.0), np.random.default_rng(3).laplace(0, 1, NUM_ROWS)

    def energy(p, v):
        return p["a"] * jnp.abs(v)

    sites = {"a": (0.1, constraints.positive)}
    log_z = on_grid(energy, base, -16, 16)
    return target_of(energy, base, sites, x, log_z, {"a": 0.8})


def gamma():
    """b x − a log x over a log-normal, on the positive half-line."""
    base = dist.LogNormal(0.5, 0.7)
    x = np.random.default_rng(4).gamma(3.0, 0.5, NUM_ROWS)

    def energy(p, v):
        return p["b"] * v - p["a"] * jnp.log(v)

    def log_z(p):
        # On the scale of log x, where base and energy are smooth.
        grid = np.linspace(-6, 4, 20_001)
        log_p = base.log_prob(jnp.exp(grid)) + grid - energy(p, jnp.exp(grid))
        return logsumexp(log_p) + np.log(grid[1] - grid[0])

    sites = {"a": (0.0, constraints.real), "b": (0.0, constraints.real)}
    return target_of(energy, base, sites, x, log_z, {"a": 1.0, "b": 1.5})


def two_modes(size):
    """Normals at ±3 in the first coordinate; only their odds are learned, 0.3."""
    rng, sd = np.random.default_rng(1), 0.5
    base = dist.Normal(0.0, 3.0).expand([size]).to_event(1)
    centre = np.zeros(size)
    centre[0] = 3.0
    up = np.arange(NUM_ROWS) < 0.3 * NUM_ROWS
    x = np.where(up[:, None], centre, -centre) + sd * rng.normal(size=(NUM_ROWS, size))

    def energy(p, v):
        above = p["h"] - 0.5 * jnp.sum((v - centre) ** 2, -1) / sd**2
        below = -0.5 * jnp.sum((v + centre) ** 2, -1) / sd**2
        return -jnp.logaddexp(above, below) - 0.5 * jnp.sum(v**2, -1) / 9.0

    def log_z(p):
        return jnp.logaddexp(p["h"], 0.0) + size * np.log(sd / 3.0)

    sites = {"h": (0.0, constraints.real)}
    start = {"h": np.log(3 / 7)}
    return target_of(energy, base, sites, x, log_z, start, size)


def double_well(size):
    """A double well in the first coordinate, independent normals in the others."""
    rng = np.random.default_rng(1)
    up = np.arange(NUM_ROWS) < 0.3 * NUM_ROWS
    first = np.where(up, 2.0, -2.0) + 0.3 * rng.normal(size=NUM_ROWS)
    x = np.column_stack([first, 0.5 * rng.normal(size=(NUM_ROWS, size - 1))])
    base = dist.Normal(0.0, 2.0).expand([size]).to_event(1)

    def well(p, v):
        return p["a"] * v + p["b"] * v**2 + p["c"] * v**4

    def energy(p, v):
        return well(p, v[..., 0]) + 0.5 * jnp.sum(p["l"] * v[..., 1:] ** 2, -1)

    of_well = on_grid(well, dist.Normal(0.0, 2.0), -8, 8)

    def log_z(p):
        return of_well(p) - 0.5 * jnp.sum(jnp.log1p(4.0 * p["l"]))

    sites = {
        "a": (0.0, constraints.real),
        "b": (0.0, constraints.real),
        "l": (jnp.zeros(size - 1), constraints.real),
        "c": (0.05, constraints.positive),
    }
    start = {"a": 0.2, "b": -4.0, "c": 0.5, "l": np.full(size - 1, 3.75)}
    return target_of(energy, base, sites, x, log_z, start, size)


CLASS_SHARES = np.array([0.7, 0.21, 0.09])
CLASS_CENTRES = np.array([[2.5, 0.0], [-1.5, 2.0], [0.0, -2.5]])


def joint_classes():
    """A joint model of x in the plane and three classes, linear logits.

    p(x, y) is the base, a standard normal, times exp(w_y x + h_y): normals around w_y.
    """
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    log_shares = np.log(CLASS_SHARES / CLASS_SHARES[0])
    tilts = 0.5 * np.sum(CLASS_CENTRES**2, 1)
    start = {"w": CLASS_CENTRES, "h": (log_shares - tilts + tilts[0])[1:]}

    def logits(p, v):
        return v @ p["w"].T + jnp.append(0.0, p["h"])

    def log_p(p, x):
        labels = x[:, 2:].astype(int)
        chosen = jnp.take_along_axis(logits(p, x[:, :2]), labels, -1)[:, 0]
        return base.log_prob(x[:, :2]) + chosen

    def log_z(p):
        return logsumexp(jnp.append(0.0, p["h"]) + 0.5 * jnp.sum(p["w"] ** 2, -1))

    def model(x):
        params = {
            "w": numpyro.param("w", jnp.zeros((3, 2)).at[:, 0].set(0.1)),
            "h": numpyro.param("h", jnp.zeros(2)),
        }
        labels = x[:, 2].astype(int)

        def energy(v):
            return -logsumexp(logits(params, v), axis=-1)

        with numpyro.plate("rows", len(x)):
            points = numpyro.sample(
                "x", ebm.EnergyDistribution(energy, base), obs=x[:, :2]
            )
            numpyro.sample(
                "y", dist.Categorical(logits=logits(params, points)), obs=labels
            )

    def draw(rng, num_rows):
        labels = rng.choice(3, num_rows, p=CLASS_SHARES)
        x = CLASS_CENTRES[labels] + rng.normal(size=(num_rows, 2))
        return np.column_stack([x, labels])

    x = draw(np.random.default_rng(5), NUM_ROWS).astype(np.float32)
    return Target(model, net_generator(base, 2), x, log_p, log_z, start, draw)


TARGETS = {
    "joint model": joint_classes,
    "precision 4": lambda: precision(0.5),
    "precision 26": lambda: precision(0.2),
    "precisions 3-d": lambda: precisions(3),
    "precisions 8-d": lambda: precisions(8),
    "skewed quartic": skewed_quartic,
    "exp(-a abs(x))": laplace,
    "gamma": gamma,
    "two modes 1-d": lambda: two_modes(1),
    "two modes 2-d": lambda: two_modes(2),
    "double well 2-d": lambda: double_well(2),
    "double well 10-d": lambda: double_well(10),
}

PLAIN: dict[str, Any] = {}
WEIGHTED = {"importance_weights": True}
DEFENSIVE = {"defensive": True}
RATES = (1e-2, 1e-2)

# Name, then the backend's options and the rates of energy and generator.
SETTINGS = [
    *((name, (PLAIN, RATES)) for name in TARGETS),
    *((name, (WEIGHTED, RATES)) for name in TARGETS),
    *((name, (DEFENSIVE, RATES)) for name in TARGETS),
    ("precision 4", ({"gradient_penalty": 1.0}, RATES)),
    ("precision 26", ({"gradient_penalty": 1.0}, RATES)),
    ("skewed quartic", ({"gradient_penalty": 1.0}, RATES)),
    ("precision 4", ({"entropy_weight": 0.1}, RATES)),
    ("precision 4", ({"entropy_weight": 10.0}, RATES)),
    ("precision 4", (PLAIN, (0.1, 1e-4))),
]
