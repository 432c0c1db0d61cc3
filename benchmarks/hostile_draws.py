"""Many values of log Z at once: a base with a batch shape, one Z per element; draws of
parameters, one Z per draw."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hostile_shapes import normal
from hostile_targets import Target, arrays
from hostile_wells import log_mixture, observe
from jax.nn import logsumexp
from numpyro.distributions import constraints
from scipy.special import gammaln
from scipy.special import logsumexp as exact_logsumexp

import ebm_ppl as ebm

# --- One Z per batch element ----------------------------------------------------------


def rates(p, data=None):
    """E = offset_k + ½ c_k |x|² over N(μ_k, I), k the batch element."""
    num_dims = len(p["dims"])
    base = dist.Normal(p["locs"][:, None] * jnp.ones(num_dims), 1.0).to_event(1)
    energy = lambda v: p["offset"] + 0.5 * p["rate"] * (v**2).sum(-1)  # noqa: E731
    observe(ebm.EnergyDistribution(energy, base), data)


def mixtures(p, data=None):
    """A mixture per element over one Gaussian: ``locs`` (components, batch, dims),
    ``scales`` (components, batch)."""
    _, batch, num_dims = p["locs"].shape
    base = dist.Normal(0.0, 1.0).expand([batch, num_dims]).to_event(1)

    def energy(v):
        standard = (v[..., None, :, :] - p["locs"]) / p["scales"][..., None]
        log_density = -0.5 * (standard**2).sum(-1) - num_dims * (
            jnp.log(p["scales"]) + 0.5 * np.log(2 * np.pi)
        )
        return base.log_prob(v) - logsumexp(log_density + p["log_weights"], axis=-2)

    observe(ebm.EnergyDistribution(energy, base), data)


def gammas(p, data=None):
    """A pole per element: E = (1 − a_k) log x over Exponential(1)."""
    base = dist.Gamma(jnp.ones_like(p["shape"]), 1.0)
    observe(
        ebm.EnergyDistribution(lambda v: (1.0 - p["shape"]) * jnp.log(v), base), data
    )


def batched():
    def rates_target(
        name,
        num_dims,
        rate,
        benign,
        locs=(0.0, 0.5, -0.5, 1.0),
        offset=(0.0,) * 4,
        **options,
    ):
        p = arrays(dims=np.zeros(num_dims), locs=locs, rate=rate, offset=offset)
        c, mu = (p[key].astype(float) for key in ("rate", "locs"))
        with np.errstate(divide="ignore", invalid="ignore"):
            truth = -0.5 * num_dims * (np.log1p(c) + c * mu**2 / (1 + c))
        truth = np.where(c > -1, truth, np.inf) - p["offset"]
        return Target(name, rates, p, truth, benign, **options)

    yield rates_target("batch of Gaussians d2", 2, [0.5, 1.0, 2.0, 4.0], True)
    yield rates_target("batch of Gaussians d10", 10, [0.5, 1.0, 2.0, 4.0], True)
    yield rates_target(
        "batch of Gaussians by quadrature",
        1,
        [0.5, 1.0, 2.0, 4.0],
        True,
        method="quadrature",
        quick=True,
    )
    yield rates_target("batch, rates over 6 decades", 2, [1e-2, 1.0, 100.0, 1e4], False)
    yield rates_target("batch, one wide", 2, [0.5, 1.0, -0.99, 4.0], False)
    yield rates_target(
        "batch, one divergent", 2, [0.5, 1.0, -1.0, 4.0], False, locs=(0.0,) * 4
    )
    yield rates_target(
        "batch, offsets to 1000",
        2,
        [0.5, 1.0, 2.0, 4.0],
        True,
        offset=(0.0, 10.0, -100.0, 1000.0),
    )
    yield rates_target(
        "batch, offsets to 1e6",
        2,
        [0.5, 1.0, 2.0, 4.0],
        False,
        offset=(0.0, 10.0, -1e4, 1e6),
    )
    yield rates_target(
        "batch by quadrature, offsets to 2e6",
        1,
        [0.5, 1.0, 2.0, 4.0],
        False,
        offset=(0, 10, -1e4, 2e6),
        method="quadrature",
    )

    def mixtures_target(name, second, width, log_weight, benign, rows=None, **options):
        """Elements have a Gaussian body and a second component of their own."""
        locs = np.zeros((2, 4, 2))
        locs[1] = np.asarray(second, float)[:, None]
        scales = np.stack([np.ones(4), np.asarray(width, float)])
        log_weights = np.stack([np.zeros(4), np.asarray(log_weight, float)])
        data = None
        if rows is not None:
            rng = np.random.default_rng(0)
            there = rng.permutation(200) < rows
            where = np.where(there[:, None, None], locs[1], locs[0])
            data = where + np.where(
                there[:, None, None], scales[1][:, None], 1.0
            ) * rng.normal(size=(200, 4, 2))
            data = data.astype(np.float32)
        p = arrays(locs=locs, scales=scales, log_weights=log_weights)
        return Target(
            name,
            mixtures,
            p,
            exact_logsumexp(log_weights, axis=0),
            benign,
            data=data,
            **options,
        )

    near, broad, light = (
        [1.0, 0.5, 1.2, 0.8],
        [0.6, 0.7, 0.8, 0.6],
        [0.0, 1.0, -1.0, 0.5],
    )
    one_far, one_sharp = [1.0, 0.5, 8.0, 0.8], [0.6, 0.7, 0.3, 0.6]
    yield mixtures_target("batch of mixtures", near, broad, light, True)
    yield mixtures_target("batch of mixtures, rows", near, broad, light, True, rows=100)
    yield mixtures_target(
        "batch, one far mode, 4 rows", one_far, one_sharp, light, False, rows=4
    )
    yield mixtures_target(
        "batch, one far mode, half the rows", one_far, one_sharp, light, False, rows=100
    )
    yield mixtures_target(
        "batch, one narrow well, rows",
        [1.0, 0.5, 2.0, 0.8],
        [0.6, 0.7, 0.02, 0.6],
        light,
        False,
        rows=100,
    )
    yield mixtures_target(
        "batch, one narrow well seen",
        [1.0, 0.5, 1.0, 0.8],
        [0.6, 0.7, 0.2, 0.6],
        light,
        False,
    )
    yield mixtures_target(
        "batch, one far mode",
        one_far,
        one_sharp,
        light,
        False,
        invisible="one element's mode is at 8 in either coordinate, eleven scales of the base away",
    )
    for name, shape, benign in (
        ("batch of gammas", [1.5, 3.0, 0.7, 2.0], True),
        ("batch, one strong pole", [1.5, 3.0, 0.02, 2.0], False),
        ("batch, one divergent pole", [1.5, 3.0, -0.05, 2.0], False),
    ):
        a = np.asarray(np.float32(shape), float)
        truth = np.where(a > 0, gammaln(a), np.inf)
        yield Target(name, gammas, arrays(shape=shape), truth, benign)


# --- One Z per draw of the parameters -------------------------------------------------


def weighted_modes(p, data=None):
    """Two modes; ``a`` is the log weight of the second."""
    a = numpyro.param("a", 0.0)
    num_dims = p["locs"].shape[-1]
    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    known = p | {"log_weights": jnp.stack([jnp.zeros_like(a), a])}
    start = normal(num_dims, p["base"])
    observe(
        ebm.EnergyDistribution(lambda v: -log_mixture(v, known), flat, start=start),
        data,
    )


def moving_mode(p, data=None):
    """A Gaussian at a (1, …, 1) beside one at the origin, of equal weights."""
    a = numpyro.param("a", 0.0)
    num_dims = p["locs"].shape[-1]
    flat = dist.ImproperUniform(constraints.real_vector, (), (num_dims,))
    known = p | {"locs": p["locs"] * jnp.stack([jnp.zeros_like(a), a])[:, None]}
    start = normal(num_dims, p["base"])
    observe(
        ebm.EnergyDistribution(lambda v: -log_mixture(v, known), flat, start=start),
        data,
    )


def scaled(p, data=None):
    """E = offset + ½ a |x|² over N(0, I)."""
    a = numpyro.param("a", 1.0)
    base = normal(len(p["dims"]))
    observe(
        ebm.EnergyDistribution(lambda v: p["offset"] + 0.5 * a * (v**2).sum(-1), base),
        data,
    )


def tilted(p, data=None):
    """E = −a Σ x over N(0, I)."""
    a = numpyro.param("a", 0.0)
    observe(
        ebm.EnergyDistribution(lambda v: -a * v.sum(-1), normal(len(p["dims"]))), data
    )


def shifted(p, data=None):
    """E = a + ½ |x|² over N(0, I)."""
    a = numpyro.param("a", 0.0)
    observe(
        ebm.EnergyDistribution(
            lambda v: a + 0.5 * (v**2).sum(-1), normal(len(p["dims"]))
        ),
        data,
    )


def shaped_gamma(p, data=None):
    """E = (1 − a) log x over Exponential(1)."""
    a = numpyro.param("a", 1.0)
    base = dist.Gamma(jnp.ones_like(p["dims"]), 1.0).to_event(1)
    observe(
        ebm.EnergyDistribution(lambda v: (1.0 - a) * jnp.log(v).sum(-1), base), data
    )


def tailed(p, data=None):
    """(1 + x²)^−a: diverges for a ≤ ½."""
    a = numpyro.param("a", 1.0)
    flat = dist.ImproperUniform(constraints.real_vector, (), (1,))
    observe(
        ebm.EnergyDistribution(
            lambda v: a * jnp.log1p((v**2).sum(-1)), flat, start=normal(1)
        ),
        data,
    )


def log_z_of_tails(a):
    """log of ∫ (1 + x²)^−a, which diverges from a = ½ down."""
    return np.where(
        a > 0.5, 0.5 * np.log(np.pi) + gammaln(a - 0.5) - gammaln(a), np.inf
    )


def magnets(p, data=None):
    """E = −a Σ x for bits."""
    a = numpyro.param("a", 0.0)
    base = dist.Bernoulli(0.5 * jnp.ones_like(p["dims"])).to_event(1)
    observe(ebm.EnergyDistribution(lambda v: -a * v.sum(-1), base), data)


def at_draws(name, model, p, a, truth, benign, *, data=None, **options):
    """Draws ``a`` of the model's one parameter."""
    a = np.asarray(a, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.asarray(truth(a.astype(float)), float)
    more = {"batch_ndims": a.ndim} | options.pop("options", {})
    return Target(
        name,
        model,
        p,
        exact,
        benign,
        data=data,
        params={"a": a},
        options=more,
        **options,
    )


def spread(centre, width, seed=0):
    """Eight draws around a centre."""
    return centre + width * np.random.default_rng(seed).normal(size=8)


def one_apart(centre, width, outlier):
    a = spread(centre, width)
    a[5] = outlier
    return a


def draws():
    def dims(num_dims, **values):
        return arrays(dims=np.zeros(num_dims), **values)

    def gaussian_truth(num_dims, offset=0.0):
        return lambda a: (
            np.where(a > -1, -0.5 * num_dims * np.log1p(a), np.inf) - offset
        )

    for name, num_dims, a, benign in (
        ("draws of a rate d2", 2, spread(2.0, 0.2), True),
        ("draws of a rate d10", 10, spread(2.0, 0.2), True),
        ("draws of a rate, 2 chains", 2, spread(2.0, 0.3).reshape(2, 4), True),
        ("draws of a rate over 4 decades", 5, np.geomspace(0.1, 1000.0, 8), False),
        ("draws, one nearly divergent", 2, one_apart(2.0, 0.2, -0.98), False),
        ("draws, one divergent", 2, one_apart(2.0, 0.2, -1.0), False),
        ("draws, one not bounded below", 2, one_apart(2.0, 0.2, -1.2), False),
    ):
        yield at_draws(
            name,
            scaled,
            dims(num_dims, offset=0.0),
            a,
            gaussian_truth(num_dims),
            benign,
        )
    for offset, benign in ((100.0, True), (1e5, False), (-1e7, False)):
        p = dims(3, offset=offset)
        name = f"draws of a rate, offset {offset:g}"
        yield at_draws(
            name, scaled, p, spread(2.0, 0.2), gaussian_truth(3, offset), benign
        )
    for name, a, benign, quick in (
        ("draws of a rate by quadrature", spread(2.0, 0.2), True, True),
        ("draws by quadrature, one divergent", one_apart(2.0, 0.2, -1.0), False, False),
    ):
        p = dims(1, offset=0.0)
        yield at_draws(
            name,
            scaled,
            p,
            a,
            gaussian_truth(1),
            benign,
            method="quadrature",
            quick=quick,
        )
    yield at_draws(
        "draws by quadrature, offset 3e6",
        scaled,
        dims(1, offset=3e6),
        spread(2.0, 0.2),
        gaussian_truth(1, 3e6),
        False,
        method="quadrature",
    )
    for name, a, benign in (
        ("draws of a tilt d5", spread(0.3, 0.2), True),
        ("draws of a tilt, one far d5", one_apart(0.3, 0.2, 5.0), False),
    ):
        yield at_draws(name, tilted, dims(5), a, lambda a: 2.5 * a**2, benign)
    for name, a, benign in (
        ("draws of a constant", spread(0.0, 1.0), True),
        (
            "draws of a constant to 1e6",
            np.array([0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6]),
            False,
        ),
    ):
        yield at_draws(
            name, shifted, dims(5), a, lambda a: -a - 2.5 * np.log(2), benign
        )
    for name, a, benign in (
        ("draws of a gamma's shape", spread(2.0, 0.2), True),
        ("draws of a gamma's shape, one pole", one_apart(1.0, 0.1, 0.02), False),
        ("draws of a gamma's shape, one divergent", one_apart(0.8, 0.1, -0.05), False),
    ):
        truth = lambda a: np.where(a > 0, gammaln(a), np.inf)  # noqa: E731
        yield at_draws(name, shaped_gamma, dims(1), a, truth, benign)
    for name, a in (
        ("draws of a tail, one heavy", one_apart(3.0, 0.2, 0.7)),
        ("draws of a tail, one divergent", one_apart(3.0, 0.2, 0.5)),
        ("draws of a tail, all divergent", spread(0.45, 0.01)),
    ):
        yield at_draws(name, tailed, dims(1), a, log_z_of_tails, False)
    for name, a, benign in (
        ("draws of a magnet", spread(0.0, 1.0), True),
        ("draws of a magnet, one infinite", one_apart(0.0, 1.0, np.inf), False),
    ):
        truth = lambda a: 8 * np.log((1 + np.exp(a)) / 2)  # noqa: E731
        yield at_draws(
            name, magnets, dims(8), a, truth, benign, method="enumeration", quick=benign
        )
    yield from draws_with_modes()


def draws_with_modes():
    """Modes that hardly exist at the draw from which all others are reached."""
    locs = np.array([[-4.0, -4.0], [4.0, 4.0]])
    p = arrays(locs=locs, scales=[0.5, 0.5], base=4.0)
    rng = np.random.default_rng(9)
    rows = locs[(np.arange(100) % 3 == 0).astype(int)] + 0.5 * rng.normal(size=(100, 2))
    few = locs[(np.arange(100) % 50 == 0).astype(int)] + 0.5 * rng.normal(size=(100, 2))
    truth = lambda a: np.logaddexp(0.0, a)  # noqa: E731
    for name, a, data, benign, invisible in (
        ("draws of two modes", spread(0.0, 0.3), None, True, ""),
        ("draws of two modes, rows", spread(0.0, 0.3), rows, True, ""),
        ("draws, one has a mode, rows", one_apart(-11.0, 0.3, 0.5), rows, False, ""),
        ("draws, one has a mode, 2 rows", one_apart(-11.0, 0.3, 0.5), few, False, ""),
        (
            "draws, one has a heavy mode, rows",
            one_apart(-15.0, 0.3, 4.0),
            rows,
            False,
            "",
        ),
        (
            "draws, one has a mode in part, rows",
            one_apart(-8.0, 0.3, -2.0),
            rows,
            False,
            "",
        ),
        (
            "draws, half have a mode, rows",
            np.where(np.arange(8) % 2, 0.5, -12.0),
            rows,
            False,
            "",
        ),
        # The start covers the mode: fresh annealing to that draw would find it.
        ("draws, one has a mode", one_apart(-11.0, 0.3, 0.5), None, False, ""),
    ):
        data = None if data is None else data.astype(np.float32)
        yield at_draws(
            name, weighted_modes, p, a, truth, benign, data=data, invisible=invisible
        )
    near = arrays(locs=np.ones((2, 2)), scales=[1.0, 0.5], base=1.5)
    far = np.array([0.0, 0.1, 0.2, 0.1, 0.0, 0.3, 0.2, 9.0])
    equal = near | arrays(log_weights=[0.0, 0.0])
    both = lambda a: np.full_like(a, np.log(2.0))  # noqa: E731
    there = np.concatenate(
        [rng.normal(size=(96, 2)), 9.0 + 0.5 * rng.normal(size=(4, 2))]
    ).astype(np.float32)
    yield at_draws(
        "draws of a moving mode", moving_mode, equal, spread(1.0, 0.1), both, True
    )
    yield at_draws(
        "draws, one moves far off, 4 rows",
        moving_mode,
        equal,
        far,
        both,
        False,
        data=there,
    )
    yield at_draws(
        "draws, one moves far off",
        moving_mode,
        equal,
        far,
        both,
        False,
        invisible="in the one draw the mode is 25 of its widths, and eight scales of "
        "the start, from the other",
    )


FAMILIES = {"batched": batched, "draws": draws}
