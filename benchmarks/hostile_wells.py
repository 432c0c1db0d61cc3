"""Mixtures of Gaussians: wells in a broad body, two widths at one centre, far and many
modes.  log Z is Σ of weights.

E = log base − log f for a mixture f, whose integral is the sum of its components'
weights.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hostile_targets import Target, arrays
from jax.nn import logsumexp
from numpyro.distributions import constraints
from scipy.special import logsumexp as exact_logsumexp
from scipy.stats import ncx2

import ebm_ppl as ebm

NUM_ROWS = 200
# What a method that draws about a thousand points of its base can know of.
NUM_DRAWS = 1_000


def observe(distribution, data):
    """The energy at site 'x', with rows of data where there are any."""
    if data is None:
        numpyro.sample("x", distribution)
        return
    with numpyro.plate("rows", len(data), dim=-1 - len(distribution.batch_shape)):
        numpyro.sample("x", distribution, obs=data)


def log_mixture(v, p):
    """Log of Σ_k exp(w_k) N(v; m_k, s_k² I)."""
    num_dims = v.shape[-1]
    standard = (v[..., None, :] - p["locs"]) / p["scales"][:, None]
    log_density = -0.5 * (standard**2).sum(-1) - num_dims * (
        jnp.log(p["scales"]) + 0.5 * np.log(2 * np.pi)
    )
    return logsumexp(log_density + p["log_weights"], axis=-1)


def mixture(p, data=None):
    """f over a Gaussian base."""
    base = dist.Normal(0.0, p["base"]).expand([p["locs"].shape[-1]]).to_event(1)
    observe(
        ebm.EnergyDistribution(lambda v: base.log_prob(v) - log_mixture(v, p), base),
        data,
    )


def flat_mixture(p, data=None):
    """f itself, walkers starting from a Gaussian."""
    num_dims = p["locs"].shape[-1]
    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    start = dist.Normal(0.0, p["base"]).expand([num_dims]).to_event(1)
    observe(
        ebm.EnergyDistribution(lambda v: -log_mixture(v, p), flat, start=start), data
    )


def carton(p, data=None):
    """E = A Σ (1 − cos k x) over a Gaussian: an egg carton."""
    base = dist.Normal(0.0, p["base"]).to_event(1)
    energy = lambda v: p["height"] * (1.0 - jnp.cos(p["wave"] * v)).sum(-1)  # noqa: E731
    observe(ebm.EnergyDistribution(energy, base), data)


def drawn(p, counts, seed=0):
    """Rows from the components of a mixture, so many of each, in random order."""
    rng = np.random.default_rng(seed)
    num_dims = p["locs"].shape[-1]
    rows = [
        loc + scale * rng.normal(size=(count, num_dims))
        for loc, scale, count in zip(p["locs"], p["scales"], counts, strict=True)
    ]
    return rng.permutation(np.concatenate(rows)).astype(np.float32)


def expected_draws_in_well(p):
    """How many of a thousand base draws lie where the second component outweighs the
    first.

    Where s₂ < s₁ that is a ball, and |x|² over it is noncentral χ².
    """
    (first, second), (body, width) = p["locs"].astype(float), p["scales"].astype(float)
    num_dims, rate = len(first), width**-2 - body**-2
    log_ratio = float(p["log_weights"][1] - p["log_weights"][0]) - num_dims * np.log(
        width / body
    )
    centre = (second / width**2 - first / body**2) / rate
    rest = second @ second / width**2 - first @ first / body**2 - rate * centre @ centre
    squared_radius = (2 * log_ratio - rest) / rate
    if squared_radius <= 0:
        return 0.0
    base = float(p["base"])
    return NUM_DRAWS * float(
        ncx2.cdf(
            squared_radius / base**2, num_dims, max(centre @ centre / base**2, 1e-12)
        )
    )


def well(
    name,
    num_dims,
    distance,
    width,
    log_weight,
    *,
    benign=False,
    rows=None,
    body=1.0,
    base=1.0,
    **options,
):
    """A Gaussian body and a well beside it, ``rows`` of the 200 data in it; invisible
    where nothing points there."""
    locs = np.zeros((2, num_dims))
    locs[1] = distance / np.sqrt(num_dims)
    p = arrays(
        locs=locs, scales=[body, width], log_weights=[0.0, log_weight], base=base
    )
    num_rows = options.pop("num_rows", NUM_ROWS)
    data = None if rows is None else drawn(p, (num_rows - rows, rows))
    hits = expected_draws_in_well(p)
    if not rows and 1.0 <= hits < 20.0:
        raise ValueError(
            f"Of a thousand base draws {hits:.2g} see the well of '{name}': neither "
            "visible nor not."
        )
    invisible = (
        ""
        if rows or hits >= 20.0
        else f"of a thousand base draws {hits:.1g} lie in its well, and no data do"
    )
    model = options.pop("model", mixture)
    truth = float(np.logaddexp(0.0, log_weight))
    return Target(
        name, model, p, truth, benign, data=data, invisible=invisible, **options
    )


def wells():
    # Shallow and broad: found by any walker.
    yield well("well d1 broad", 1, 1.5, 0.5, 0.0, benign=True)
    yield well("well d2 broad", 2, 1.5, 0.6, 0.0, benign=True)
    yield well("well d5 broad", 5, 1.0, 0.7, 0.0, benign=True)
    yield well("well d16 broad", 16, 0.8, 0.9, 0.0, benign=True)
    yield well("well d1 deep", 1, 2.0, 0.3, 3.0, benign=True)
    yield well("well d2 deep", 2, 2.0, 0.5, 3.0, benign=True)
    yield well("well d2 with rows", 2, 1.5, 0.6, 0.0, benign=True, rows=100, quick=True)
    yield well("well d5 with rows", 5, 1.0, 0.7, 0.0, benign=True, rows=100)
    # Narrow, yet base draws see them.
    yield well("well d1 narrow", 1, 1.0, 0.03, 0.0)
    yield well("well d1 needle seen", 1, 0.5, 0.01, 1.0)
    yield well("well d2 narrow", 2, 1.5, 0.2, 0.0)
    yield well("well d2 narrow deep", 2, 2.0, 0.2, 5.0)
    yield well("well d5 deep", 5, 1.5, 0.5, 5.0)
    yield well("well d1 light narrow", 1, 1.0, 0.03, -2.0)
    # Narrow or far, and some data sit in them.
    yield well("well d1 far, half the rows", 1, 8.0, 0.3, 0.0, rows=100)
    yield well("well d1 needle, half the rows", 1, 3.0, 0.001, 0.0, rows=100)
    yield well("well d2 far heavy, 1 row", 2, 11.3, 0.3, 3.0, rows=1, quick=True)
    yield well("well d2 far heavy, 4 rows", 2, 11.3, 0.3, 3.0, rows=4)
    yield well("well d2 far heavy, half the rows", 2, 11.3, 0.3, 3.0, rows=100)
    yield well(
        "well d2 far heavy, 20 of 2000 rows", 2, 11.3, 0.3, 3.0, rows=20, num_rows=2000
    )
    yield well(
        "well d2 far, body narrower than base, 4 rows",
        2,
        8.0,
        0.3,
        2.0,
        rows=4,
        body=0.7,
    )
    yield well(
        "well d2 far, body wider than base, 4 rows", 2, 8.0, 0.3, 2.0, rows=4, body=1.5
    )
    yield well("well d2 narrow, half the rows", 2, 2.0, 0.02, 0.0, rows=100)
    yield well("well d5 narrow, half the rows", 5, 2.0, 0.1, 0.0, rows=100)
    yield well("well d5 narrow, 4 rows", 5, 2.0, 0.1, 0.0, rows=4)
    yield well("well d5 far, 4 rows", 5, 8.0, 0.5, 2.0, rows=4, body=0.8)
    yield well("well d16 narrow, half the rows", 16, 3.0, 0.3, 0.0, rows=100)
    yield well("well d16 far, 4 rows", 16, 8.0, 0.5, 2.0, rows=4, body=0.9)
    yield well("well d16 light, 4 rows", 16, 6.0, 0.5, -1.0, rows=4)
    # Nothing points there.
    yield well("well d1 needle", 1, 4.5, 0.001, 0.0)
    yield well("well d2 far heavy", 2, 11.3, 0.3, 3.0)
    yield well("well d5 narrow", 5, 2.0, 0.1, 0.0)
    yield well("well d16 narrow", 16, 3.0, 0.3, 0.0)


def two_widths():
    """A narrow and a broad Gaussian at one centre: at no temperature do walkers see
    both in high dimensions."""
    yield well("two widths d1 0.3", 1, 0.0, 0.3, 0.0, benign=True)
    yield well("two widths d2 0.5", 2, 0.0, 0.5, 0.0, benign=True)
    yield well(
        "two widths d2 0.5 with rows",
        2,
        0.0,
        0.5,
        0.0,
        benign=True,
        rows=100,
        quick=True,
    )
    yield well("two widths d5 0.7", 5, 0.0, 0.7, 0.0, benign=True)
    yield well("two widths d1 0.01", 1, 0.0, 0.01, 0.0)
    yield well("two widths d2 0.1", 2, 0.0, 0.1, 0.0)
    yield well("two widths d2 0.1 heavy", 2, 0.0, 0.1, 4.0)
    yield well("two widths d5 0.4", 5, 0.0, 0.4, 0.0)
    yield well("two widths d5 0.1, half the rows", 5, 0.0, 0.1, 0.0, rows=100)
    yield well("two widths d5 0.1, 4 rows", 5, 0.0, 0.1, 0.0, rows=4)
    yield well("two widths d16 0.3, half the rows", 16, 0.0, 0.3, 0.0, rows=100)
    yield well("two widths d16 0.3, 4 rows", 16, 0.0, 0.3, 0.0, rows=4)
    yield well(
        "two widths d5 0.1 under a wide base, half the rows",
        5,
        0.0,
        0.1,
        0.0,
        rows=100,
        base=3.0,
    )
    yield well("two widths d16 0.2", 16, 0.0, 0.2, 0.0)


def modes():
    def target(
        name,
        locs,
        scales,
        log_weights,
        base,
        benign,
        counts=None,
        model=flat_mixture,
        **options,
    ):
        p = arrays(locs=locs, scales=scales, log_weights=log_weights, base=base)
        data = None if counts is None else drawn(p, counts)
        return Target(
            name,
            model,
            p,
            float(exact_logsumexp(log_weights)),
            benign,
            data=data,
            **options,
        )

    def pair(num_dims, distance):
        locs = np.zeros((2, num_dims))
        locs[:, 0] = [-distance, distance]
        return locs

    unequal = np.log([0.3, 0.7]) + 2.0
    angles = 2 * np.pi * np.arange(8) / 8
    ring = 4.0 * np.stack([np.cos(angles), np.sin(angles)], -1)
    grid = np.stack(np.meshgrid(*[3.0 * np.arange(-2, 3)] * 2), -1).reshape(-1, 2)

    yield target("two modes d5", pair(5, 3.0), [1.0, 0.6], unequal, 3.0, True)
    yield target("two modes d2", pair(2, 3.0), [1.0, 0.6], unequal, 3.0, True)
    yield target("two modes d10", pair(10, 3.0), [1.0, 0.8], unequal, 3.0, True)
    yield target(
        "two modes d5 with rows",
        pair(5, 3.0),
        [1.0, 0.6],
        unequal,
        3.0,
        True,
        counts=(60, 140),
    )
    yield target(
        "two modes d2, widths 1 and 0.1", pair(2, 3.0), [1.0, 0.1], unequal, 3.0, False
    )
    yield target(
        "two modes d10, widths 1 and 0.4",
        pair(10, 3.0),
        [1.0, 0.4],
        unequal,
        3.0,
        False,
        counts=(60, 140),
    )
    yield target(
        "two modes d2 from between", pair(2, 5.0), [0.5, 0.5], [0.0, 0.0], 1.0, False
    )
    yield target(
        "two modes d5 from between, rows",
        pair(5, 8.0),
        [0.5, 0.5],
        [0.0, 3.0],
        1.0,
        False,
        counts=(100, 100),
    )
    yield target(
        "two modes d2 far, masses 1 to 1e4",
        pair(2, 6.0),
        [0.5, 0.5],
        [0.0, 9.2],
        4.0,
        False,
    )
    yield target("8 modes on a ring", ring, [0.5] * 8, np.zeros(8), 4.0, True)
    yield target("8 modes on a ring, sharp", ring, [0.05] * 8, np.zeros(8), 4.0, False)
    yield target(
        "8 modes on a ring, one heavy",
        ring,
        [0.5] * 8,
        np.where(np.arange(8) == 3, 4.0, 0.0),
        4.0,
        False,
    )
    yield target("25 modes on a grid", grid, [0.4] * 25, np.zeros(25), 6.0, True)
    yield target(
        "25 modes on a grid from its middle",
        grid,
        [0.4] * 25,
        np.zeros(25),
        1.0,
        False,
        counts=[8] * 25,
    )
    yield target(
        "mode beside the start d2",
        [[0, 0], [12, 0]],
        [1.0, 0.5],
        [0.0, 0.0],
        1.0,
        False,
        counts=(196, 4),
    )
    yield target(
        "mode beside the start d2, no rows",
        [[0, 0], [12, 0]],
        [1.0, 0.5],
        [0.0, 0.0],
        1.0,
        False,
        invisible="its mode is 24 widths from the other and from every draw of the start",
    )
    for num_dims, height, base, benign in (
        (1, 2.0, 1.0, True),
        (2, 3.0, 1.0, True),
        (10, 1.0, 1.0, True),
        (2, 20.0, 2.0, False),
        (10, 10.0, 1.0, False),
    ):
        name = f"egg carton d{num_dims}, height {height:g}"
        yield carton_target(name, num_dims, height, 2 * np.pi / base, base, benign)


def carton_target(name, num_dims, height, wave, base, benign, **options):
    """The one-dimensional integral: Σ_n I_n(A) exp(−n² k² σ²/2 − A) by the Jacobi–Anger
    series, to the power of d."""
    from scipy.special import ive

    order = np.arange(-200, 201)
    one = np.log(np.sum(ive(order, height) * np.exp(-0.5 * (order * wave * base) ** 2)))
    p = arrays(base=np.full(num_dims, base), height=height, wave=wave)
    return Target(name, carton, p, num_dims * float(one), benign, **options)


def grid():
    """Quadrature where it may look between its points."""
    exact = {"method": "quadrature"}
    yield well(
        "grid d1 broad", 1, 1.5, 0.5, 0.0, benign=True, rows=100, quick=True, **exact
    )
    yield well("grid d2 broad", 2, 1.5, 0.6, 0.0, benign=True, **exact)
    yield well("grid d1 0.1", 1, 2.0, 0.1, 0.0, benign=True, **exact)
    yield well(
        "grid d1 spike between points",
        1,
        3.02,
        1e-3,
        0.0,
        rows=100,
        quick=True,
        **exact,
    )
    yield well("grid d1 spike, 2 rows", 1, 3.02, 3e-4, 0.0, rows=2, **exact)
    yield well("grid d1 sharper spike", 1, 2.0, 1e-5, 2.0, rows=100, **exact)
    yield well("grid d1 far spike", 1, 60.0, 1e-2, 0.0, rows=20, **exact)
    yield well("grid d2 spike between points", 2, 4.243, 1e-2, 0.0, rows=100, **exact)
    yield well("grid d2 spike, 2 rows", 2, 2.9, 5e-3, 0.0, rows=2, quick=True, **exact)
    yield well("grid d2 spike 0.02", 2, 2.83, 0.02, 0.0, rows=100, **exact)
    yield well("grid d2 two widths", 2, 0.0, 1e-3, 0.0, rows=100, **exact)
    yield well("grid d1 spike, no rows", 1, 4.5, 1e-4, 0.0, **exact)
    yield carton_target("grid carton", 1, 5.0, 2 * np.pi, 1.0, True, **exact)
    yield carton_target(
        "grid carton, 60 waves a width", 1, 5.0, 60 * 2 * np.pi, 1.0, False, **exact
    )
    yield carton_target(
        "grid carton d2, 40 waves a width", 2, 3.0, 40 * 2 * np.pi, 1.0, False, **exact
    )


FAMILIES = {"wells": wells, "two widths": two_widths, "modes": modes, "grid": grid}
