"""Supports that end, close or are finite: half-lines, intervals, circles, simplices,
lattices, hard edges."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hostile_shapes import normal
from hostile_targets import Target, arrays
from hostile_wells import observe
from numpyro.distributions import constraints
from scipy.special import betaln, gammaln, i0e, logsumexp
from scipy.stats import norm

import ebm_ppl as ebm


def site(energy, base, data=None, start=None):
    observe(ebm.EnergyDistribution(energy, base, start=start), data)


# --- Half-lines -----------------------------------------------------------------------


def gamma(p, data=None):
    """E = (1 − a) log x + (r − 1) x over Exponential(1), independent in every
    dimension."""
    base = dist.Gamma(jnp.ones_like(p["shape"]), 1.0).to_event(1)
    site(
        lambda v: ((1.0 - p["shape"]) * jnp.log(v) + (p["rate"] - 1.0) * v).sum(-1),
        base,
        data,
    )


def half_normal(p, data=None):
    """E = c Σ x over positive halves of normals."""
    base = dist.HalfNormal(jnp.ones_like(p["dims"])).to_event(1)
    site(lambda v: p["rate"] * v.sum(-1), base, data)


def positive_power(p, data=None):
    """E = a log x + b/x + c x on x > 0, walkers starting from a log-normal."""
    flat = dist.ImproperUniform(constraints.positive, (), ())
    energy = lambda v: p["power"] * jnp.log(v) + p["inverse"] / v + p["rate"] * v  # noqa: E731
    site(energy, flat, data, start=dist.LogNormal(0.0, p["start"]))


def log_normal(p, data=None):
    """E = log x + ½ log² x/s² on x > 0."""
    flat = dist.ImproperUniform(constraints.positive, (), ())
    energy = lambda v: jnp.log(v) + 0.5 * (jnp.log(v) / p["width"]) ** 2  # noqa: E731
    site(energy, flat, data, start=dist.LogNormal(0.0, 1.0))


def gamma_target(name, shape, rate, benign, **options):
    """Σ log Γ(a) − a log r; a ≤ 0 diverges at 0."""
    p = arrays(shape=shape, rate=rate)
    truth = np.inf
    if np.min(shape) > 0:
        truth = float(
            np.sum(gammaln(p["shape"].astype(float)) - p["shape"] * np.log(float(rate)))
        )
    return Target(name, gamma, p, truth, benign, **options)


def positive():
    yield gamma_target("gamma 5", [5.0], 1.0, True)
    yield gamma_target("gamma 3, rate 10", [3.0, 3.0], 10.0, True)
    yield gamma_target("gamma 30", [30.0], 1.0, True)
    yield gamma_target(
        "gamma 2 by quadrature", [2.0], 1.0, True, method="quadrature", quick=True
    )
    yield gamma_target("gamma 500 d3", [500.0, 500.0, 500.0], 1.0, False)
    yield gamma_target("gamma 2, rate 1e4", [2.0], 1e4, False)
    truth = 4 * (np.log(2) + 2.0 + norm.logcdf(-2.0))
    yield Target(
        "half-normal tilted",
        half_normal,
        arrays(dims=np.zeros(4), rate=2.0),
        float(truth),
        True,
    )
    for shape, start, benign in (
        (3.0, 1.0, False),
        (0.5, 1.0, False),
        (0.1, 3.0, False),
        (0.0, 1.0, False),
    ):
        p = arrays(power=shape + 1.0, inverse=1.0, rate=0.0, start=start)
        truth = float(gammaln(shape)) if shape > 0 else np.inf
        yield Target(f"inverse gamma {shape:g}", positive_power, p, truth, benign)
    for width, benign in ((0.5, True), (1.5, True), (8.0, False), (30.0, False)):
        truth = float(np.log(width) + 0.5 * np.log(2 * np.pi))
        yield Target(
            f"log-normal {width:g}", log_normal, arrays(width=width), truth, benign
        )


def poles():
    """Mass at the end of a support: what single precision cannot see must not be left
    out."""
    yield gamma_target("pole x^-0.5", [0.5], 1.0, True)
    yield gamma_target("pole x^-0.8", [0.2], 1.0, False)
    yield gamma_target("pole x^-0.95", [0.05], 1.0, False)
    yield gamma_target("pole x^-0.98", [0.02], 1.0, False)
    yield gamma_target("pole x^-0.99", [0.01], 1.0, False, quick=True)
    yield gamma_target("pole x^-1", [0.0], 1.0, False)
    yield gamma_target("pole x^-1.05", [-0.05], 1.0, False)
    yield gamma_target("pole x^-1.5", [-0.5], 1.0, False)
    yield gamma_target("pole x^-0.98 in one of 3", [0.02, 2.0, 2.0], 1.0, False)
    yield gamma_target("pole x^-1.05 in one of 3", [-0.05, 2.0, 2.0], 1.0, False)
    for shape in (0.3, 0.01, -0.05):
        name = f"pole x^{shape - 1:g} by quadrature"
        yield gamma_target(
            name, [shape], 1.0, False, method="quadrature", quick=shape < 0
        )
    for start in (1.0, 5.0):
        p = arrays(power=1.0, inverse=0.0, rate=0.0, start=start)
        yield Target(
            f"1/x from a log-normal {start:g}", positive_power, p, np.inf, False
        )
    p = arrays(power=1.0, inverse=0.0, rate=0.0, start=1.0)
    yield Target(
        "1/x by quadrature", positive_power, p, np.inf, False, method="quadrature"
    )
    yield beta_target("pole in an interval, arcsine", 0.5, 0.5, True)
    yield beta_target("pole in an interval 0.1", 0.1, 1.0, False)
    yield beta_target("pole in an interval 0.02", 0.02, 1.0, False)
    yield beta_target("pole at an interval's upper end 0.02", 1.0, 0.02, False)
    yield beta_target("pole at an interval's upper end 0.2", 1.0, 0.2, False)
    yield beta_target("pole in an interval, divergent", 0.0, 1.0, False)
    yield beta_target("pole at an interval's upper end, divergent", 1.0, -0.05, False)
    yield beta_target(
        "pole at an interval's upper end by quadrature",
        1.0,
        0.05,
        False,
        method="quadrature",
    )
    yield dirichlet_target("pole in a simplex 0.5", (0.5, 0.5, 0.5), True)
    yield dirichlet_target("pole in a simplex 0.02", (0.02, 1.0, 1.0), False)
    yield dirichlet_target(
        "pole in a simplex's last part 0.02", (1.0, 1.0, 0.02), False
    )
    yield dirichlet_target("pole at every corner 0.05", (0.05, 0.05, 0.05), False)
    yield dirichlet_target("pole in a simplex, divergent", (1.0, 0.0, 1.0), False)
    yield dirichlet_target(
        "pole in a simplex, divergent -0.05", (-0.05, 1.0, 1.0, 1.0), False
    )
    yield dirichlet_target(
        "pole in a simplex by quadrature", (0.02, 1.0, 1.0), False, method="quadrature"
    )


# --- Intervals ------------------------------------------------------------------------


def beta(p, data=None):
    """E = (1 − a) log x + (1 − b) log(1 − x) over an interval's uniform
    distribution."""
    first, second = p["first"], p["second"]
    site(
        lambda v: (1.0 - first) * jnp.log(v) + (1.0 - second) * jnp.log1p(-v),
        dist.Uniform(0.0, 1.0),
        data,
    )


def tilt(p, data=None):
    """E = −c Σ (x − low) over a box."""
    base = dist.Uniform(p["low"], p["low"] + p["width"]).to_event(1)
    site(lambda v: -p["rate"] * (v - p["low"]).sum(-1), base, data)


def beta_target(name, first, second, benign, **options):
    truth = float(betaln(first, second)) if min(first, second) > 0 else np.inf
    return Target(
        name, beta, arrays(first=first, second=second), truth, benign, **options
    )


def interval():
    yield beta_target("beta 5, 3", 5.0, 3.0, True)
    yield beta_target(
        "beta 5, 3 by quadrature", 5.0, 3.0, True, method="quadrature", quick=True
    )
    yield beta_target("beta 50, 30", 50.0, 30.0, True)
    yield beta_target("beta 5e4, 3e4", 5e4, 3e4, False)
    yield beta_target("beta 1, 1e4", 1.0, 1e4, False)
    for name, num_dims, low, width, rate, benign in (
        ("tilted interval", 1, 0.0, 1.0, 5.0, True),
        ("tilted box d5", 5, -1.0, 2.0, 1.5, True),
        ("steep interval", 1, 0.0, 1.0, 1e3, False),
        ("interval far from zero", 1, 1_000.0, 1.0, 5.0, False),
        ("short interval far from zero", 1, 1e6, 1.0, 5.0, False),
    ):
        # ∫₀^w e^{c t} dt / w.
        truth = (
            num_dims * np.log(-np.expm1(-rate * width) / (rate * width))
            + num_dims * rate * width
        )
        p = arrays(low=np.full(num_dims, low), width=width, rate=rate)
        yield Target(name, tilt, p, float(truth), benign)


# --- Circles --------------------------------------------------------------------------


def angle(p, data=None):
    """E = −κ Σ cos(k (x − μ)), angles uniform on (−π, π)."""
    base = dist.Uniform(-np.pi * jnp.ones_like(p["dims"]), np.pi).to_event(1)
    site(
        lambda v: -p["kappa"] * jnp.cos(p["waves"] * (v - p["centre"])).sum(-1),
        base,
        data,
    )


def circle(p, data=None):
    """E = −κ cos(x − μ) over a von Mises base."""
    base = dist.VonMises(0.0, p["concentration"])
    site(lambda v: -p["kappa"] * jnp.cos(v - p["centre"]), base, data)


def log_i0(kappa):
    return float(np.log(i0e(kappa)) + kappa)


def circles():
    for name, num_dims, kappa, waves, centre, benign, method in (
        ("angle", 1, 2.0, 1.0, 0.0, True, "bracket"),
        ("angle, mode at the cut", 1, 2.0, 1.0, np.pi, True, "bracket"),
        ("angles d3", 3, 2.0, 1.0, 1.0, True, "bracket"),
        ("angle of 3 waves", 1, 2.0, 3.0, 0.0, True, "bracket"),
        ("angle by quadrature", 1, 2.0, 1.0, 0.5, True, "quadrature"),
        ("angles d2 sharp, mode at the cut", 2, 50.0, 1.0, np.pi, False, "bracket"),
        ("angle sharp", 1, 1e4, 1.0, 1.0, False, "bracket"),
        ("angle sharp by quadrature", 1, 1e7, 1.0, 1.0, False, "quadrature"),
        ("angles d5 of 3 waves, deep", 5, 8.0, 3.0, np.pi, False, "bracket"),
    ):
        p = arrays(dims=np.zeros(num_dims), kappa=kappa, waves=waves, centre=centre)
        yield Target(name, angle, p, num_dims * log_i0(kappa), benign, method=method)
    for concentration, kappa, centre, benign in (
        (1.0, 1.0, 1.0, True),
        (1.0, 5.0, np.pi, False),
    ):
        together = abs(concentration + kappa * np.exp(1j * centre))
        p = arrays(concentration=concentration, kappa=kappa, centre=centre)
        truth = log_i0(together) - log_i0(concentration)
        yield Target(
            f"von Mises base, {kappa:g} at {centre:.2g}", circle, p, truth, benign
        )


# --- Simplices ------------------------------------------------------------------------


def dirichlet(p, data=None):
    """E = Σ (1 − a_i) log x_i over the uniform distribution."""
    base = dist.Dirichlet(jnp.ones_like(p["concentration"]))
    site(lambda v: ((1.0 - p["concentration"]) * jnp.log(v)).sum(-1), base, data)


def simplex_tilt(p, data=None):
    """E = c x₀ over the uniform distribution of three parts, whose x₀ is Beta(1, 2)."""
    site(lambda v: p["rate"] * v[..., 0], dist.Dirichlet(jnp.ones(3)), data)


def dirichlet_target(name, concentration, benign, **options):
    a = np.asarray(np.float32(concentration), float)
    truth = np.inf
    if a.min() > 0:
        truth = float(gammaln(a).sum() - gammaln(a.sum()) + gammaln(len(a)))
    return Target(
        name, dirichlet, arrays(concentration=concentration), truth, benign, **options
    )


def simplex():
    yield dirichlet_target("simplex (2, 3, 6, 4)", (2.0, 3.0, 6.0, 4.0), True)
    yield dirichlet_target("simplex of 10 parts", (2.0,) * 10, True)
    yield dirichlet_target(
        "simplex (2, 3, 6) by quadrature", (2.0, 3.0, 6.0), True, method="quadrature"
    )
    yield dirichlet_target("simplex (200, 100, 50)", (200.0, 100.0, 50.0), True)
    yield dirichlet_target("simplex near a corner", (2e4, 2.0, 2.0), False)
    yield dirichlet_target(
        "simplex of 30 parts, sharp", tuple(np.linspace(1.0, 100.0, 30)), False
    )
    for rate, benign in ((3.0, True), (-3.0, True), (1e3, False)):
        truth = float(np.log(2 * (rate + np.expm1(-rate)) / rate**2))
        yield Target(
            f"simplex tilted {rate:g}", simplex_tilt, arrays(rate=rate), truth, benign
        )


# --- Finite supports ------------------------------------------------------------------


def field(p, data=None):
    """E = offset − Σ h_i x_i for bits."""
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["field"])).to_event(1)
    site(lambda v: p["offset"] - (p["field"] * v).sum(-1), base, data)


def curie_weiss(p, data=None):
    """E = −J (Σ s)²/(2n), every spin with every other."""
    num_spins = len(p["dims"])
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["dims"])).to_event(1)
    site(
        lambda v: -0.5 * p["coupling"] / num_spins * (2.0 * v - 1.0).sum(-1) ** 2,
        base,
        data,
    )


def needle(p, data=None):
    """One state of 2^n has weight e^w, the others 1."""
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["dims"])).to_event(1)
    site(
        lambda v: jnp.where(v.sum(-1) == len(p["dims"]), -p["log_weight"], 0.0),
        base,
        data,
    )


def counts(p, data=None):
    """E = a Σ x_i over independent binomials of 5."""
    base = dist.Binomial(5, 0.3 * jnp.ones_like(p["dims"])).to_event(1)
    site(lambda v: p["rate"] * v.sum(-1), base, data)


def colours(p, data=None):
    """E = a · (number of neighbours of unlike colour) on an open chain of 3 colours."""
    base = dist.Categorical(jnp.ones((len(p["dims"]), 3)) / 3.0).to_event(1)
    site(lambda v: p["cost"] * (v[..., 1:] != v[..., :-1]).sum(-1), base, data)


def forbidden(p, data=None):
    """Infinite energy where two neighbouring bits are both 1; ``poison`` where all are
    0."""
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["dims"])).to_event(1)

    def energy(v):
        neighbours = (v[..., 1:] * v[..., :-1]).sum(-1)
        return jnp.where(
            v.sum(-1) == 0, p["poison"], jnp.where(neighbours > 0, jnp.inf, 0.0)
        )

    site(energy, base, data)


def fields(p, data=None):
    """One field per batch element."""
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["field"])).to_event(1)
    site(lambda v: p["offset"] - (p["field"] * v).sum(-1), base, data)


def discrete():
    exact = {"method": "enumeration"}

    def with_field(name, values, offset, benign, **options):
        h = np.asarray(np.float32(values), float)
        truth = float(np.sum(np.logaddexp(0.0, h) - np.log(2))) - offset
        return Target(
            name,
            field,
            arrays(field=values, offset=offset),
            truth,
            benign,
            **exact,
            **options,
        )

    yield with_field("bits in a field", np.linspace(-2, 2, 10), 0.0, True, quick=True)
    yield with_field("bits in a strong field", np.full(10, 40.0), 0.0, True)
    yield with_field("bits, offset 1e4", np.linspace(-2, 2, 10), 1e4, False)
    yield with_field("bits, offset 1e6", np.linspace(-2, 2, 10), 1e6, False, quick=True)
    yield with_field("bits, offset -1e8", np.linspace(-2, 2, 10), -1e8, False)
    for num_spins, coupling in ((10, 0.5), (14, 3.0)):
        up = np.arange(num_spins + 1)
        log_count = (
            gammaln(num_spins + 1) - gammaln(up + 1) - gammaln(num_spins - up + 1)
        )
        truth = logsumexp(
            log_count + 0.5 * coupling / num_spins * (2 * up - num_spins) ** 2
        ) - num_spins * np.log(2)
        p = arrays(dims=np.zeros(num_spins), coupling=coupling)
        yield Target(
            f"Curie-Weiss {num_spins}, {coupling:g}",
            curie_weiss,
            p,
            float(truth),
            True,
            **exact,
        )
    for num_bits, log_weight in ((14, 0.0), (14, 12.0), (16, 60.0)):
        truth = np.logaddexp(
            np.log1p(-(0.5**num_bits)), log_weight - num_bits * np.log(2)
        )
        p = arrays(dims=np.zeros(num_bits), log_weight=log_weight)
        yield Target(
            f"one state of 2^{num_bits}, e^{log_weight:g}",
            needle,
            p,
            float(truth),
            True,
            **exact,
        )
    truth = 4 * 5 * np.log(0.7 + 0.3 * np.exp(-0.8))
    yield Target(
        "counts",
        counts,
        arrays(dims=np.zeros(4), rate=0.8),
        float(truth),
        True,
        **exact,
    )
    truth = 7 * np.log((1 + 2 * np.exp(-1.5)) / 3)
    yield Target(
        "chain of 3 colours",
        colours,
        arrays(dims=np.zeros(8), cost=1.5),
        float(truth),
        True,
        **exact,
    )
    # Strings without two ones in a row are counted by Fibonacci numbers: F(12) = 144 of
    # ten bits.
    truth = math.log(144) - 10 * np.log(2)
    yield Target(
        "forbidden states",
        forbidden,
        arrays(dims=np.zeros(10), poison=0.0),
        truth,
        True,
        **exact,
    )
    yield Target(
        "NaN at one state",
        forbidden,
        arrays(dims=np.zeros(10), poison=np.nan),
        np.nan,
        False,
        **exact,
    )
    yield Target(
        "-inf at one state",
        forbidden,
        arrays(dims=np.zeros(10), poison=-np.inf),
        np.inf,
        False,
        **exact,
    )
    h = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    for name, offset, benign in (
        ("bits, batch of 4", np.zeros(4), True),
        ("bits, batch of 4, one offset 3e6", np.array([0.0, 1.0, 3e6, 2.0]), False),
    ):
        truth = np.logaddexp(0.0, h.astype(float)).sum(-1) - 6 * np.log(2) - offset
        yield Target(
            name, fields, arrays(field=h, offset=offset), truth, benign, **exact
        )


# --- Hard edges and bad numbers -------------------------------------------------------


def edge(p, data=None):
    """E = +inf beyond an edge of x₀ over N(0, I)."""
    base = normal(len(p["dims"]))
    site(
        lambda v: jnp.where(v[..., 0] > p["edge"], p["rate"] * v[..., 0], jnp.inf),
        base,
        data,
    )


def not_a_number(p, data=None):
    """E = −log x₀, NaN on half of the base."""
    site(lambda v: -jnp.log(v[..., 0]), normal(len(p["dims"])), data)


def step(p, data=None):
    """A step down by ``height`` beyond an edge: its gradient tells nothing."""
    site(
        lambda v: jnp.where(v[..., 0] > p["edge"], -p["height"], 0.0),
        normal(len(p["dims"])),
        data,
    )


def edges():
    for name, num_dims, where, rate, benign, method in (
        ("half-space", 3, 0.0, 0.0, False, "bracket"),
        ("half-space tilted", 3, -1.0, 1.0, False, "bracket"),
        ("far half-space", 2, 2.0, 0.0, False, "bracket"),
        ("half-line by quadrature", 1, 0.123, 1.0, False, "quadrature"),
        (
            "half-line by quadrature, edge between points",
            1,
            -1.0,
            0.0,
            False,
            "quadrature",
        ),
    ):
        p = arrays(dims=np.zeros(num_dims), edge=where, rate=rate)
        truth = 0.5 * rate**2 + norm.logcdf(-(float(p["edge"]) + rate))
        yield Target(name, edge, p, float(truth), benign, method=method)
    for num_dims, method in ((3, "bracket"), (1, "quadrature")):
        p = arrays(dims=np.zeros(num_dims))
        yield Target(
            f"NaN on half of the support, {method}",
            not_a_number,
            p,
            np.nan,
            False,
            method=method,
        )
    for name, num_dims, where, height, method in (
        ("step d3", 3, 1.0, 3.0, "bracket"),
        ("step d2, far and deep", 2, 1.8, 8.0, "bracket"),
        ("step by quadrature", 1, 1.0, 3.0, "quadrature"),
        ("far step by quadrature", 1, 3.0, 12.0, "quadrature"),
    ):
        truth = np.logaddexp(norm.logcdf(where), height + norm.logsf(where))
        p = arrays(dims=np.zeros(num_dims), edge=where, height=height)
        yield Target(name, step, p, float(truth), False, method=method)


FAMILIES = {
    "positive": positive,
    "poles": poles,
    "interval": interval,
    "circle": circles,
    "simplex": simplex,
    "discrete": discrete,
    "edges": edges,
}
