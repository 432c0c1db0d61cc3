"""Tables of log Z."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.typing import ArrayLike
from numpyro.distributions.transforms import Transform

from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.data import trace_at
from ebm_ppl.model.parameters import transform_of
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.chebyshev import smooth
from ebm_ppl.normalizer.coverage import flags_of_coverage
from ebm_ppl.normalizer.density import counts_of
from ebm_ppl.normalizer.estimate import log_normalizer
from ebm_ppl.normalizer.rows import observed_rows
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.programs.arguments import Arguments

MIN_VALUES = 4
# Nats under the highest joint density where an error changes no posterior.
MAX_UNLIKELY = 8.0


def tabulate_log_normalizer(
    rng_key: Array | None,
    model: Model,
    grid: Mapping[str, ArrayLike],
    *args: Any,
    params: Estimate | Params | None = None,
    method: str = "bracket",
    tolerance: float = 0.1,
    num_chains: int = 16,
    num_walkers: int | None = None,
    num_temperatures: int | None = None,
    num_points: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> TabulatedNormalizer:
    """Tabulate log Z over one or two parameters of an energy of any dimension.

    The table is a smooth function, so that :func:`normalized` makes of it a model whose
    parameters NUTS and SVI can move: the posterior of an energy's parameters, where
    log Z cannot be computed inside of the model.

    log Z is certified at every point of the grid and at points between.  Polynomials of
    the parameters' unconstrained values are fitted to the grid; their degree is the one
    that does well at the points between, which it has not seen.  The table's error is how
    the difference of two such functions varies, of either half of the points, and how far
    log Z stands off them by more than its noise: with data, where their joint density
    with the parameters is within 8 nats of its highest.  (A constant changes no
    posterior; that of log Z itself is told by its standard errors.)

    Args:
        rng_key: A JAX PRNG key; may be None for exact methods.
        model: A NumPyro model with energy sites.
        grid: By the names of one or two scalar parameters or latents, at least 4
            ascending values each.  Outside of them log Z is NaN, so let them cover the
            posterior; values evenly spaced in the unconstrained parameter serve best.
        args: The model's positional arguments, with the data, if the errors are to be
            judged by how often log Z enters the likelihood.
        params: The model's other parameters, which stay fixed.
        method: As in :func:`log_normalizer`: ``"bracket"``, ``"quadrature"`` or
            ``"enumeration"``.
        tolerance: Largest error of the likelihood of the data, in nats, that is
            certified: that of log Z between the grid's points, times how often log Z
            enters.
        num_chains: Islands.
        num_walkers: Walkers per island; the noise of log Z falls as their root.
        num_temperatures: As in :func:`log_normalizer`.
        num_points: As in :func:`log_normalizer`.
        progress_bar: Show the number of temperatures done, after the first second.
        kwargs: The model's keyword arguments.

    One body: the stages of the call, in order.

    Raises:
        ValueError: A grid that cannot work, or what :func:`log_normalizer` refuses, such
            as an energy that depends on a latent that is not in the grid.

    Source: Geyer and Thompson (1992) for likelihoods with a Monte Carlo log Z; the
    interpolation by least squares: Trefethen, Approximation Theory and Approximation
    Practice (2013).
    """
    values = _checked(grid)
    arguments = Arguments(args, kwargs)
    fixed = params_of(params)
    transforms = _transforms(model, values, fixed, arguments)

    # Points of the grid, and those between
    nodes, between = _points(values, transforms)
    points = np.concatenate([nodes, between])
    draws = {
        name: _constrained(transforms[name], points[:, k], values[name])
        for k, name in enumerate(values)
    }
    draws |= jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(points), *jnp.shape(leaf))), fixed
    )

    # log Z
    options: dict[str, Any] = {
        "method": method,
        "num_chains": num_chains,
        "num_walkers": num_walkers,
        "num_temperatures": num_temperatures,
        "num_points": num_points,
        "progress_bar": progress_bar,
    }
    log_z = log_normalizer(
        rng_key, model, draws, *args, batch_ndims=1, **options, **kwargs
    )

    # Where the parameters may be, by the data if there are any
    first = jax.tree.map(lambda leaf: leaf[0], draws)
    bound = BoundModel(with_full_plates(model), {}, random.key(0), arguments)
    counts = dict.fromkeys(log_z.estimate, 1.0)
    uncovered: tuple[str, ...] = ()
    log_joint = np.zeros(len(points))
    if set(log_z.estimate) <= set(observed_rows(bound, first)):
        counts = counts_of(bound, first, {n: e[0] for n, e in log_z.estimate.items()})
        log_joint = _log_joint(bound, draws, log_z.estimate)
        shape = tuple(len(v) for v in values.values())
        on_grid = log_joint[: len(nodes)].reshape(shape)
        uncovered = flags_of_coverage(values, transforms, on_grid)
    is_likely = log_joint >= np.max(log_joint) - MAX_UNLIKELY

    # Interpolation
    def halves(of: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(of)[: len(nodes)], np.asarray(of)[len(nodes) :]

    unit = halves(_to_unit(points, nodes))
    found = {
        name: smooth(
            unit,
            halves(np.asarray(estimate, float)),
            halves(np.asarray(log_z.stderr[name], float)),
            halves(is_likely),
        )
        for name, estimate in log_z.estimate.items()
    }
    flags = {
        name: log_z.flags[name]
        + _flags_of_error(site.error * counts[name], tolerance, method)
        + uncovered
        for name, site in found.items()
    }

    return TabulatedNormalizer(
        grid=values,
        log_normalizer=log_z,
        error={name: site.error for name, site in found.items()},
        counts=counts,
        flags=flags,
        params=fixed,
        transforms=transforms,
        polynomials={name: site.polynomial for name, site in found.items()},
    )


def _log_joint(
    bound: BoundModel, draws: Params, estimates: dict[str, Array]
) -> np.ndarray:
    """Log joint density at every point, of the constrained parameters."""

    @jax.jit
    def at_all(bound: BoundModel, draws: Params, estimates: dict[str, Array]) -> Array:
        def at(point: tuple[Params, dict[str, Array]]) -> Array:
            params, known = point
            return -bound.negative_log_joint(
                params, lambda name, energy: energy.with_log_normalizer(known[name])
            )

        return lax.map(at, (draws, estimates))

    return np.asarray(at_all(bound, draws, estimates), float)


def _checked(grid: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Ascending values of one or two parameters."""
    values = {name: np.asarray(given, float) for name, given in grid.items()}
    if len(values) not in (1, 2):
        raise ValueError(
            f"grid has {len(values)} parameters, {sorted(values)}; expected one or two, "
            "such as {'rate': np.linspace(0.5, 3.0, 17)}."
        )
    for name, given in values.items():
        is_good = given.ndim == 1 and np.all(np.isfinite(given))
        if not (is_good and len(given) >= MIN_VALUES and np.all(np.diff(given) > 0)):
            raise ValueError(
                f"grid['{name}'] has shape {given.shape}; expected at least {MIN_VALUES} "
                "finite values that ascend."
            )
    return values


def _transforms(
    model: Model, values: Mapping[str, Any], fixed: Params, arguments: Arguments
) -> dict[str, Transform]:
    """The parameters' maps from the real line."""
    middle = {name: jnp.asarray(v[len(v) // 2]) for name, v in values.items()}
    trace = trace_at(random.key(0), model, fixed | middle, arguments)
    found = {}
    for name in values:
        site = trace.get(name)
        if site is None or site["type"] not in ("param", "sample"):
            raise ValueError(
                f"grid names '{name}', which is no parameter or latent of the model; it "
                f"has {sorted(n for n, s in trace.items() if s['type'] == 'param')} and "
                f"{sorted(n for n, s in trace.items() if s['type'] == 'sample')}."
            )
        found[name] = transform_of(name, site)
    return found


def _points(
    values: Mapping[str, np.ndarray], transforms: Mapping[str, Transform]
) -> tuple[np.ndarray, np.ndarray]:
    """Unconstrained points of the grid and the middles of its cells."""
    lines = [
        np.asarray(transforms[n].inv(jnp.asarray(v)), float) for n, v in values.items()
    ]
    middles = [(line[1:] + line[:-1]) / 2 for line in lines]
    grids = [np.meshgrid(*axes, indexing="ij") for axes in (lines, middles)]
    nodes, between = (np.stack([g.ravel() for g in grid], -1) for grid in grids)
    return nodes, between


def _constrained(transform: Transform, line: np.ndarray, values: np.ndarray) -> Array:
    """Constrained values, the given ones to the last bit where they are given."""
    found = np.array(transform(jnp.asarray(line, float)))
    nearest = values[np.abs(found[:, None] - values).argmin(1)]
    is_given = np.isclose(found, nearest, rtol=1e-6, atol=0.0)
    return jnp.asarray(np.where(is_given, nearest, found), float)


def _to_unit(points: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    low, high = nodes.min(0), nodes.max(0)
    return 2.0 * (points - low) / (high - low) - 1.0


def _flags_of_error(off: float, tolerance: float, method: str) -> tuple[str, ...]:
    if off <= tolerance:
        return ()
    more = "more walkers (num_walkers) against noise, " if method == "bracket" else ""
    return (
        f"between the grid's points the likelihood is off by up to {off:.2g} nats, over "
        f"the tolerance of {tolerance:g}: take {more}more values, or a narrower range.",
    )
