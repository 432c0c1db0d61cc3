"""Energies hard by their shape: tails, poles at the origin, funnels, shells, condition,
offsets."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hostile_targets import Target, arrays
from hostile_wells import observe
from jax.nn import logsumexp, softplus
from numpyro.distributions import constraints
from scipy.integrate import quad
from scipy.special import betaln, gammaln
from scipy.stats import norm

import ebm_ppl as ebm

LOG_2PI = np.log(2 * np.pi)


def normal(num_dims, scale=1.0):
    return dist.Normal(0.0, scale).expand([num_dims]).to_event(1)


def over(energy, p, data=None):
    """The energy over N(0, base² I) of ``p['dims']``'s length."""
    observe(ebm.EnergyDistribution(energy, normal(len(p["dims"]), p["base"])), data)


def flat(energy, p, data=None):
    """exp(−E) alone, walkers starting from N(0, base² I)."""
    num_dims = len(p["dims"])
    base = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    observe(
        ebm.EnergyDistribution(energy, base, start=normal(num_dims, p["base"])), data
    )


def shaped(num_dims, base=1.0, **values):
    """Arguments of a model in so many dimensions: their number is a length, which JAX
    does not trace."""
    return arrays(dims=np.zeros(num_dims), base=base, **values)


# --- Scales and tails -----------------------------------------------------------------


def gaussian(p, data=None):
    """E = ½ c |x|² over a Gaussian."""
    over(lambda v: 0.5 * p["rate"] * (v**2).sum(-1), p, data)


def power_tails(p, data=None):
    """(1 + |x|²/c)^−a: Student's t without its constant; a ≤ d/2 diverges."""
    flat(lambda v: p["power"] * jnp.log1p((v**2).sum(-1) / p["width"]), p, data)


def quartic(p, data=None):
    """E = c Σ x⁴ over a Gaussian."""
    over(lambda v: p["rate"] * (v**4).sum(-1), p, data)


def laplace(p, data=None):
    """E = Σ|x|/s."""
    flat(lambda v: jnp.abs(v).sum(-1) / p["width"], p, data)


def logistic(p, data=None):
    """Exponential tails of another rate on either side: e^{a x} (1 + e^x)^{−a−b}."""
    flat(
        lambda v: ((p["left"] + p["right"]) * softplus(v) - p["left"] * v).sum(-1),
        p,
        data,
    )


def log_gamma(p, data=None):
    """An exponential tail on the left, a doubly exponential one on the right: exp(a x −
    e^x)."""
    flat(lambda v: (jnp.exp(v) - p["left"] * v).sum(-1), p, data)


def from_student(p, data=None):
    """A Gaussian from a base of heavier tails: E = log base − log N(0, s²)."""
    base = dist.StudentT(p["df"]).expand([len(p["dims"])]).to_event(1)
    goal = normal(len(p["dims"]), p["width"])
    observe(
        ebm.EnergyDistribution(lambda v: base.log_prob(v) - goal.log_prob(v), base),
        data,
    )


def scale_target(name, num_dims, rate, benign, **options):
    truth = -0.5 * num_dims * np.log1p(rate) if rate > -1 else np.inf
    return Target(
        name, gaussian, shaped(num_dims, rate=rate), float(truth), benign, **options
    )


def power_target(name, num_dims, degrees, base, benign, **options):
    power = 0.5 * (num_dims + degrees)
    width = max(degrees, 1.0)
    # log Γ(ν/2) − log Γ((ν + d)/2) + ½ d log(π c).
    truth = np.inf
    if degrees > 0:
        truth = (
            0.5 * num_dims * np.log(np.pi * width)
            + gammaln(0.5 * degrees)
            - gammaln(power)
        )
    p = shaped(num_dims, base, power=power, width=width)
    return Target(name, power_tails, p, float(truth), benign, **options)


def quartic_integral(rate, base):
    """∫ exp(−c x⁴) N(x; 0, σ²) dx by adaptive quadrature, over ten of its widths."""
    reach = 10 * min(base, rate**-0.25)
    integrand = lambda x: np.exp(-rate * x**4) * norm.pdf(x, scale=base)  # noqa: E731
    return quad(integrand, -reach, reach, epsabs=0.0, epsrel=1e-11, limit=400)[0]


def tails():
    # Base too wide or too narrow, tails alike.
    yield scale_target("narrow d1, 1/10", 1, 99.0, True, quick=True)
    yield scale_target("narrow d10, 1/10", 10, 99.0, True)
    yield scale_target("narrow d20, 1/100", 20, 9_999.0, True)
    yield scale_target("narrow d5, 1/1e4", 5, 1e8, False)
    yield scale_target("wide d1, 2", 1, -0.75, True)
    yield scale_target("wide d5, 2", 5, -0.75, True)
    yield scale_target("wide d2, 7", 2, -0.98, False)
    yield scale_target("wide d5, 30", 5, -0.999, False)
    yield scale_target("wide d1, base cancelled", 1, -1.0, False, quick=True)
    yield scale_target("wide d3, base cancelled", 3, -1.0, False)
    yield scale_target("wide d3, not bounded below", 3, -1.1, False)
    # Heavier than the base.
    yield power_target("t30 d1", 1, 30.0, 1.0, True)
    yield power_target("t30 d5", 5, 30.0, 1.0, True)
    yield power_target("t5 d1", 1, 5.0, 1.0, False)
    yield power_target("t3 d2 from a wide start", 2, 3.0, 5.0, False)
    yield power_target("t3 d5", 5, 3.0, 1.0, False)
    yield power_target("t1 d1", 1, 1.0, 1.0, False)
    yield power_target("t1 d1 from a wide start", 1, 1.0, 20.0, False)
    yield power_target("t1 d3", 3, 1.0, 1.0, False)
    yield power_target("t0.3 d1", 1, 0.3, 1.0, False)
    yield power_target("t0.1 d2", 2, 0.1, 3.0, False)
    yield power_target("divergent tail d1", 1, 0.0, 1.0, False)
    yield power_target("divergent tail d1 from a wide start", 1, 0.0, 30.0, False)
    yield power_target("divergent tail d3", 3, -0.2, 1.0, False)
    yield power_target("t1 by quadrature", 1, 1.0, 1.0, False, method="quadrature")
    yield power_target(
        "divergent tail by quadrature",
        1,
        0.0,
        1.0,
        False,
        method="quadrature",
        quick=True,
    )
    for name, num_dims, width, base, benign in (
        ("Laplace d1", 1, 1.0, 1.0, True),
        ("Laplace d5", 5, 1.0, 1.5, True),
        ("Laplace d2 wide", 2, 30.0, 1.0, False),
        ("Laplace d5 narrow", 5, 1e-3, 1.0, False),
    ):
        truth = num_dims * np.log(2 * width)
        yield Target(
            name, laplace, shaped(num_dims, base, width=width), float(truth), benign
        )
    for name, left, right, base, benign in (
        ("logistic", 1.0, 1.0, 1.5, True),
        ("logistic, heavy left", 0.1, 5.0, 1.0, False),
        ("logistic, heavy right", 5.0, 0.02, 1.0, False),
    ):
        yield Target(
            name,
            logistic,
            shaped(1, base, left=left, right=right),
            float(betaln(left, right)),
            benign,
        )
    for name, left, base, benign in (
        ("log gamma 2", 2.0, 1.0, True),
        ("log gamma 0.2", 0.2, 1.0, False),
        ("log gamma 0.02", 0.02, 3.0, False),
        ("log gamma 0", 0.0, 1.0, False),
    ):
        truth = gammaln(left) if left > 0 else np.inf
        yield Target(name, log_gamma, shaped(1, base, left=left), float(truth), benign)
    # Lighter than the base.
    for name, num_dims, rate, base, benign in (
        ("quartic d3", 3, 1.0, 1.0, True),
        ("quartic d3 under a wide base", 3, 1.0, 10.0, True),
        ("quartic d5 narrow", 5, 1e6, 1.0, False),
    ):
        truth = num_dims * np.log(quartic_integral(rate, base))
        yield Target(
            name, quartic, shaped(num_dims, base, rate=rate), float(truth), benign
        )
    for name, num_dims, df, width, benign in (
        ("Gaussian from t3 d1", 1, 3.0, 1.0, True),
        ("Gaussian from t3 d5", 5, 3.0, 1.0, True),
        ("Gaussian from Cauchy d2", 2, 1.0, 1.0, False),
        ("Gaussian from Cauchy d5, narrow", 5, 1.0, 0.05, False),
    ):
        yield Target(
            name, from_student, shaped(num_dims, df=df, width=width), 0.0, benign
        )


# --- A pole inside the support --------------------------------------------------------


def origin_pole(p, data=None):
    """|x|^−a over N(0, I): finite for a < d."""
    over(lambda v: 0.5 * p["power"] * jnp.log((v**2).sum(-1)), p, data)


def origin_poles():
    for num_dims, power, benign, method in (
        (1, 0.2, True, "bracket"),
        (3, 1.0, True, "bracket"),
        (5, 2.0, True, "bracket"),
        (1, 0.6, False, "bracket"),
        (1, 0.95, False, "bracket"),
        (1, 1.0, False, "bracket"),
        (2, 1.9, False, "bracket"),
        (3, 2.8, False, "bracket"),
        (3, 3.0, False, "bracket"),
        (5, 5.5, False, "bracket"),
        (1, 0.5, False, "quadrature"),
        (1, 1.0, False, "quadrature"),
        (2, 1.0, False, "quadrature"),
    ):
        truth = np.inf
        if power < num_dims:
            truth = (
                -0.5 * power * np.log(2)
                + gammaln(0.5 * (num_dims - power))
                - gammaln(0.5 * num_dims)
            )
        name = f"pole at the origin d{num_dims}, {power:g}" + (
            ", quadrature" if method == "quadrature" else ""
        )
        yield Target(
            name,
            origin_pole,
            shaped(num_dims, power=power),
            float(truth),
            benign,
            method=method,
        )


# --- Funnels, shells, condition -------------------------------------------------------


def log_funnel(x, scale):
    v, rest = x[..., 0], x[..., 1:]
    return dist.Normal(0.0, scale).log_prob(v) + dist.Normal(
        0.0, jnp.exp(v / 2)[..., None]
    ).log_prob(rest).sum(-1)


def funnel(p, data=None):
    """Neal's funnel over a Gaussian base; log Z = 0."""
    base = normal(len(p["dims"]), p["base"])
    observe(
        ebm.EnergyDistribution(
            lambda v: base.log_prob(v) - log_funnel(v, p["scale"]), base
        ),
        data,
    )


def flat_funnel(p, data=None):
    """Neal's funnel itself."""
    flat(lambda v: -log_funnel(v, p["scale"]), p, data)


def banana(p, data=None):
    """x₀ ~ N(0, s²), x₁ | x₀ ~ N(b (x₀² − s²), 1); log Z = 0."""

    def energy(v):
        first = dist.Normal(0.0, p["scale"]).log_prob(v[..., 0])
        return -first - dist.Normal(
            p["bend"] * (v[..., 0] ** 2 - p["scale"] ** 2), 1.0
        ).log_prob(v[..., 1])

    flat(energy, p, data)


def funnel_rows(num_dims, scale):
    rng = np.random.default_rng(0)
    v = scale * rng.normal(size=(200, 1))
    rest = np.exp(0.5 * v) * rng.normal(size=(200, num_dims - 1))
    return np.concatenate([v, rest], axis=1).astype(np.float32)


def funnels():
    for num_dims, scale, base, benign, model, rows in (
        (2, 0.5, 1.0, True, funnel, False),
        (2, 1.0, 1.0, True, flat_funnel, False),
        (5, 0.5, 1.0, True, funnel, False),
        (2, 2.0, 1.0, False, funnel, False),
        (2, 3.0, 1.0, False, funnel, False),
        (2, 3.0, 1.0, False, funnel, True),
        (2, 3.0, 3.0, False, funnel, False),
        (3, 3.0, 1.0, False, funnel, False),
        (5, 2.0, 1.0, False, funnel, False),
        (5, 3.0, 1.0, False, funnel, False),
        (10, 3.0, 1.0, False, funnel, True),
        (2, 3.0, 1.0, False, flat_funnel, False),
        (2, 3.0, 3.0, False, flat_funnel, False),
        (5, 3.0, 1.0, False, flat_funnel, False),
        (5, 3.0, 3.0, False, flat_funnel, False),
    ):
        over_what = (
            ("base" if model is funnel else "start")
            + f" {base:g}"
            + (", rows" if rows else "")
        )
        data = funnel_rows(num_dims, scale) if rows else None
        p = shaped(num_dims, base, scale=scale)
        yield Target(
            f"funnel d{num_dims}, {scale:g}, {over_what}",
            model,
            p,
            0.0,
            benign,
            data=data,
        )
    for scale, bend, base, benign in (
        (1.0, 0.3, 1.5, True),
        (2.0, 0.2, 2.0, True),
        (3.0, 1.0, 1.0, False),
        (5.0, 3.0, 1.0, False),
        (10.0, 1.0, 5.0, False),
    ):
        p = shaped(2, base, scale=scale, bend=bend)
        yield Target(f"banana {scale:g}, bend {bend:g}", banana, p, 0.0, benign)


def shells_model(p, data=None):
    """Σ_k exp(w_k − ½ (|x| − R_k)²/s_k²)."""

    def energy(v):
        radius = jnp.sqrt((v**2).sum(-1) + 1e-12)[..., None]
        return -logsumexp(
            p["log_weights"] - 0.5 * ((radius - p["radii"]) / p["widths"]) ** 2, axis=-1
        )

    flat(energy, p, data)


def shell_integral(num_dims, radius, width):
    """Log of S_{d−1} ∫ r^{d−1} exp(−½ (r − R)²/s²) dr by adaptive quadrature, scaled by
    R^{d−1}."""
    size = max(radius, width)

    def integrand(r):
        return (r / size) ** (num_dims - 1) * np.exp(-0.5 * ((r - radius) / width) ** 2)

    low, high = max(0.0, radius - 40 * width), radius + 40 * width
    one = quad(
        integrand, low, high, points=[radius], epsabs=0.0, epsrel=1e-10, limit=400
    )[0]
    sphere = np.log(2) + 0.5 * num_dims * np.log(np.pi) - gammaln(0.5 * num_dims)
    return float(sphere + (num_dims - 1) * np.log(size) + np.log(one))


def shells():
    def target(
        name, num_dims, radii, widths, log_weights, base, benign, rows=(), **options
    ):
        p = shaped(num_dims, base, radii=radii, widths=widths, log_weights=log_weights)
        parts = [
            w + shell_integral(num_dims, r, s)
            for r, s, w in zip(radii, widths, log_weights, strict=True)
        ]
        data = None
        if rows:
            rng = np.random.default_rng(0)
            radius = np.concatenate(
                [
                    r + s * rng.normal(size=n)
                    for r, s, n in zip(radii, widths, rows, strict=True)
                ]
            )
            direction = rng.normal(size=(len(radius), num_dims))
            data = (
                radius[:, None]
                * direction
                / np.linalg.norm(direction, axis=1, keepdims=True)
            )
            data = rng.permutation(data).astype(np.float32)
        return Target(
            name,
            shells_model,
            p,
            float(np.logaddexp.reduce(parts)),
            benign,
            data=data,
            **options,
        )

    yield target("ring d2", 2, [2.0], [0.3], [0.0], 2.0, True)
    yield target("ring d2 from a narrow start", 2, [3.0], [0.3], [0.0], 1.0, True)
    yield target("shell d3", 3, [2.0], [0.3], [0.0], 2.0, True)
    yield target("shell d10", 10, [3.0], [0.3], [0.0], 1.0, True)
    yield target("ring d2 with rows", 2, [2.0], [0.3], [0.0], 2.0, True, rows=(200,))
    yield target("ring d2 thin", 2, [3.0], [0.01], [0.0], 2.0, False)
    yield target("shell d3 very thin", 3, [3.0], [0.001], [0.0], 2.0, False)
    yield target("shell d10 far", 10, [30.0], [0.3], [0.0], 1.0, False)
    yield target("ring d2 from far outside", 2, [1.0], [0.05], [0.0], 30.0, False)
    yield target("two rings d2", 2, [1.0, 3.0], [0.3, 0.3], [0.0, 0.0], 2.0, True)
    yield target(
        "two rings d2, outer thin", 2, [1.0, 5.0], [0.3, 0.02], [0.0, 2.0], 2.0, False
    )
    yield target(
        "two shells d5, outer out of reach, rows",
        5,
        [1.0, 12.0],
        [0.3, 0.2],
        [0.0, 0.0],
        1.0,
        False,
        rows=(100, 100),
    )
    yield target(
        "two rings d2, outer out of reach, 4 rows",
        2,
        [1.0, 15.0],
        [0.3, 0.2],
        [0.0, 0.0],
        1.0,
        False,
        rows=(196, 4),
    )
    yield target(
        "two rings d2, outer out of reach",
        2,
        [1.0, 15.0],
        [0.3, 0.2],
        [0.0, 0.0],
        1.0,
        False,
        invisible="its outer ring is 70 widths and 13 scales of the start away",
    )


def quadratic(p, data=None):
    """E = ½ xᵀ A x over a Gaussian."""
    over(lambda v: 0.5 * jnp.einsum("...i,ij,...j", v, p["precision"], v), p, data)


def flat_quadratic(p, data=None):
    """E = ½ xᵀ A x."""
    flat(lambda v: 0.5 * jnp.einsum("...i,ij,...j", v, p["precision"], v), p, data)


def condition():
    for num_dims, number, model, benign in (
        (2, 10.0, quadratic, True),
        (10, 100.0, quadratic, True),
        (50, 10.0, quadratic, True),
        (2, 100.0, flat_quadratic, True),
        (10, 10.0, flat_quadratic, True),
        (50, 100.0, quadratic, False),
        (2, 1e4, quadratic, False),
        (10, 1e4, quadratic, False),
        (2, 1e6, flat_quadratic, False),
        (5, 1e4, flat_quadratic, False),
        (10, 1e6, quadratic, False),
    ):
        rates = np.geomspace(number**-0.5, number**0.5, num_dims)
        turn = np.linalg.qr(np.random.default_rng(1).normal(size=(num_dims, num_dims)))[
            0
        ]
        precision = (turn * rates) @ turn.T
        p = shaped(num_dims, precision=0.5 * (precision + precision.T))
        # Of the matrix in single precision, which is what the energy has.
        rates = np.linalg.eigvalsh(p["precision"].astype(float))
        if model is quadratic:
            truth = -0.5 * np.log1p(rates).sum()
        else:
            truth = 0.5 * num_dims * LOG_2PI - 0.5 * np.log(rates).sum()
        name = f"condition {number:g} d{num_dims}, " + (
            "base" if model is quadratic else "flat"
        )
        yield Target(name, model, p, float(truth), benign)


# --- Constants in the energy ----------------------------------------------------------


def offset_gaussian(p, data=None):
    """E = offset + ½ c |x|²: a total energy."""
    over(lambda v: p["offset"] + 0.5 * p["rate"] * (v**2).sum(-1), p, data)


def offsets():
    def target(name, num_dims, offset, benign, **options):
        p = shaped(num_dims, offset=offset, rate=8.0)
        truth = -float(p["offset"]) - 0.5 * num_dims * np.log(9.0)
        return Target(name, offset_gaussian, p, truth, benign, **options)

    many = {"options": {"num_walkers": 512}}
    yield target("offset 100", 5, 100.0, True)
    yield target("offset 2e4", 5, 2e4, False)
    yield target("offset -1000", 5, -1e3, True)
    yield target("offset 2e4, many walkers", 5, 2e4, False, **many)
    yield target("offset -2e4", 5, -2e4, False)
    yield target("offset 1e5, many walkers", 5, 1e5, False, **many)
    yield target("offset -1e5, many walkers", 5, -1e5, False, **many)
    yield target("offset 1e6", 5, 1e6, False)
    yield target("offset -1e7", 5, -1e7, False)
    yield target("offset 1e30", 5, 1e30, False)
    yield target(
        "offset 1000 by quadrature", 1, 1e3, True, method="quadrature", quick=True
    )
    for offset in (3e4, 3e5, -1e6, 2e6, 3e6, 1e7, -1e9):
        yield target(
            f"offset {offset:g} by quadrature",
            1,
            offset,
            False,
            method="quadrature",
            quick=offset == 3e6,
        )
    yield target("offset 1e5 by quadrature d2", 2, 1e5, False, method="quadrature")


# --- One direction alone --------------------------------------------------------------


def one_sided():
    """Nobody asks that one direction certify anything."""
    forward, reverse = {"method": "forward"}, {"method": "reverse"}
    yield scale_target("forward, narrow d5", 5, 9.0, False, **forward)
    yield scale_target("forward, wide d5", 5, -0.9, False, **forward)
    yield scale_target("forward, base cancelled", 3, -1.0, False, **forward)
    yield power_target(
        "forward, divergent tail", 1, 0.0, 1.0, False, quick=True, **forward
    )
    yield power_target("forward, t1", 1, 1.0, 1.0, False, **forward)
    yield Target(
        "forward, funnel", funnel, shaped(2, 1.0, scale=3.0), 0.0, False, **forward
    )
    yield scale_target("reverse, narrow d5", 5, 9.0, False, **reverse)
    yield power_target("reverse, divergent tail", 1, 0.0, 1.0, False, **reverse)
    yield Target(
        "reverse, funnel", funnel, shaped(2, 1.0, scale=3.0), 0.0, False, **reverse
    )


FAMILIES = {
    "tails": tails,
    "poles inside": origin_poles,
    "funnels": funnels,
    "shells": shells,
    "condition": condition,
    "offsets": offsets,
    "one direction": one_sided,
}
