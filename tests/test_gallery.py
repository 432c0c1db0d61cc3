"""The gallery's pages run, and are right where the truth is known."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer.util import log_density
from pages import scope_of
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score


def is_mean(draws, axes, log_posterior):
    """The mean of NUTS draws is that of a density on a grid; half of a thousand draws,
    or more, would have to be worth nothing for it not to show."""
    weights = np.exp(log_posterior - log_posterior.max())
    weights /= weights.sum()
    for values, grid in zip(draws, np.meshgrid(*axes, indexing="ij"), strict=True):
        mean = np.sum(weights * grid)
        deviation = np.sqrt(np.sum(weights * (grid - mean) ** 2))
        assert abs(np.mean(values) - mean) < 4 * deviation / np.sqrt(250)
        assert np.std(values) == pytest.approx(deviation, rel=4 / np.sqrt(2 * 250))


def ising_is_right(scope):
    """Against all 512 states, by hand."""
    states = (np.arange(512)[:, None] >> np.arange(9) & 1).reshape(-1, 3, 3)

    def statistics(bits):
        s = 2.0 * np.asarray(bits) - 1.0
        pairs = (s[:, 1:] * s[:, :-1]).sum((1, 2)) + (s[..., 1:] * s[..., :-1]).sum(
            (1, 2)
        )
        return pairs, s.sum((1, 2))

    axes = np.linspace(-0.3, 0.9, 60), np.linspace(-0.6, 0.8, 61)
    pairs, spins = statistics(states)
    seen = [value.sum() for value in statistics(scope["lattices"])]
    coupling, field = np.meshgrid(*axes, indexing="ij")
    exponents = coupling[..., None] * pairs + field[..., None] * spins
    log_posterior = coupling * seen[0] + field * seen[1] - 60 * logsumexp(exponents, -1)
    log_posterior -= 0.5 * (coupling**2 + field**2)
    posterior = scope["posterior"]
    is_mean((posterior["coupling"], posterior["field"]), axes, log_posterior)


def hierarchical_is_right(scope):
    """The normalised model's density, against one with log Z by the trapezoidal rule."""
    values = {
        "centre": jnp.array(0.3),
        "spread": jnp.array(0.8),
        "steepness": jnp.array(1.2),
        "offset": jnp.linspace(-1, 1, 6),
    }
    model, x = scope["ebm"].normalized(scope["model"]), np.asarray(scope["x"])
    found = log_density(model, (x,), {}, values)[0]
    slope = 0.3 + 0.8 * np.linspace(-1, 1, 6)

    def log_unnormalised(v):
        base = -0.125 * v**2 - np.log(2 * np.sqrt(2 * np.pi))
        return base - 0.3 * v**4 + slope * v

    line = np.linspace(-8, 8, 4_001)
    log_z = logsumexp(log_unnormalised(line[:, None]), 0) + np.log(line[1] - line[0])
    priors = (
        dist.Normal(0, 2).log_prob(0.3)
        + dist.HalfNormal(1).log_prob(0.8)
        + dist.Gamma(4, 4).log_prob(1.2)
        + dist.Normal(0, 1).log_prob(values["offset"]).sum()
    )
    expected = priors + (log_unnormalised(x) - log_z).sum()
    assert float(found) == pytest.approx(float(expected), abs=2e-3)

    # Twelve rows tell a slope to about half a unit; no one is far from its own.
    draws = np.asarray(scope["posterior"]["slope"])
    assert np.max(np.abs(draws.mean(0) - scope["slopes"]) / draws.std(0)) < 3.5


def directions_are_right(scope):
    """Maxima of the likelihood, with normalisers on a fine grid."""
    angles = np.linspace(-np.pi, np.pi, 4_000, endpoint=False)
    features = [np.asarray(scope["harmonics"](v)) for v in (angles, scope["wind"])]
    step = 2 * np.pi / len(angles)

    def of_wind(pull):
        return (
            logsumexp(features[0] @ pull) + np.log(step) - np.mean(features[1] @ pull)
        )

    found = minimize(of_wind, np.zeros(4), method="BFGS")
    best = scope["best"]
    off = np.abs(best.params["pull"] - found.x) / best.standard_errors["pull"]
    assert off.max() < 1.0
    assert best.flags == ()

    # Midpoints of a grid on the triangle
    side = (np.arange(500) + 0.5) / 500
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    grid = grid[grid.sum(1) < 1]
    grid = np.column_stack([grid, 1 - grid.sum(1)])

    def statistics(v):
        return np.column_stack([np.log(v), -v[:, 0] * v[:, 1]])

    inside, mean = statistics(grid), statistics(scope["parts"].astype(float)).mean(0)

    def of_parts(theta):
        return logsumexp(inside @ theta) - theta @ mean

    found = minimize(of_parts, np.zeros(4), method="BFGS").x
    simplex = scope["simplex"]
    off = (simplex.params["shape"] - 1 - found[:3]) / simplex.standard_errors["shape"]
    assert np.abs(off).max() < 1.0
    off = simplex.params["meeting"] - found[3]
    assert abs(off) < simplex.standard_errors["meeting"]


def strauss_is_right(scope):
    """log Z(β) by patterns drawn uniformly, weighted by exp(−β pairs)."""
    draw = scope["jax"].jit(
        lambda key: scope["close_pairs"](random.uniform(key, (5_000, 15, 2)))
    )
    pairs = np.concatenate([draw(key) for key in random.split(random.key(9), 40)])
    axis = np.linspace(0.02, 4.0, 400)
    log_z = logsumexp(-axis[:, None] * pairs, axis=1) - np.log(len(pairs))
    seen = float(scope["close_pairs"](scope["patterns"]).sum())
    log_posterior = np.log(axis) - axis - axis * seen - 10 * log_z

    best, mode = scope["best"], axis[np.argmax(log_posterior)]
    assert best.flags == ()
    assert abs(best.params["beta"] - mode) < 4 * best.monte_carlo_errors["beta"] + 0.01

    # On the log scale: ten patterns' variance of β pairs, and β from the prior, by 512
    # walkers, whose variances have a standard error of a sixteenth
    beta = float(best.params["beta"])
    weights = np.exp(-beta * pairs)
    spread = np.cov(pairs, aweights=weights)
    stderr = beta / np.sqrt(10 * beta**2 * spread + beta)
    assert float(best.standard_errors["beta"]) == pytest.approx(stderr, rel=4 / 32)

    found = scope["log_z"]
    expected = np.interp(best.params["beta"], axis, log_z)
    assert abs(found.estimate["points"] - expected) < 4 * found.stderr["points"] + 0.01


def networks_are_right(scope):
    base, test = scope["base"], scope["test"]
    assert scope["scores"].mean() > float(base.log_prob(test).mean()) + 0.5
    assert scope["energy"].energy(test[:3]).shape == (3,)


def inpainting_is_right(scope):
    """log Z of every half, by draws of its base."""
    below, energy = scope["below"], scope["energy"]
    draws = below.sample(random.key(5), (20_000,))
    weights = np.exp(-np.asarray(energy(draws), float))
    log_z, found = np.log(weights.mean(0)), scope["log_z"]
    error = weights.std(0) / weights.mean(0) / np.sqrt(len(weights))
    off = np.abs(log_z - np.asarray(found.estimate["x"]))
    assert np.all(off < 4.5 * np.hypot(error, np.asarray(found.stderr["x"])))
    assert found.is_certified


def anomaly_is_right(scope):
    aurocs = {
        name: roc_auc_score(scope["is_seen"], values)
        for name, values in scope["scores"].items()
    }
    assert aurocs["mixture"] > aurocs["Gaussian"] + 0.05
    assert aurocs["energy on it"] == pytest.approx(aurocs["mixture"], abs=0.02)


# The longest first.
PAGES = {
    "inpainting": inpainting_is_right,
    "directions": directions_are_right,
    "strauss": strauss_is_right,
    "hierarchical": hierarchical_is_right,
    "networks": networks_are_right,
    "anomaly": anomaly_is_right,
    "ising": ising_is_right,
}


# Those that run for longer than they compile.
LONG = {"anomaly", "hierarchical", "inpainting"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.runs_long] if page in LONG else [])
        for page in PAGES
    ],
)
def test_programs_of_the_gallery(page):
    PAGES[page](scope_of(f"docs/gallery/{page}.md"))
