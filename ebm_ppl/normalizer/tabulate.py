"""Tables of log Z."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array, lax, random
from jax.typing import ArrayLike

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.data import trace_at
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.chebyshev import MAX_NOISE, Polynomial, smooth, values_of
from ebm_ppl.normalizer.coverage import flags_of_coverage
from ebm_ppl.normalizer.density import counts_of
from ebm_ppl.normalizer.estimate import log_normalizer
from ebm_ppl.normalizer.grid import Grid, make_grid
from ebm_ppl.normalizer.posterior_points import points_by_mass
from ebm_ppl.normalizer.rows import observed_rows
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.programs.arguments import Arguments

# Points of the table's own posterior where there are two parameters.  Of one there are as
# many as in the table itself, for which programs are compiled.
NUM_OWN_POINTS = 16
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
    with the parameters is within 8 nats of its highest, and at as many quantiles (16
    points of two parameters) of the posterior that the table gives.  What is narrower than the
    distances of those points is not seen.  (A constant changes no posterior; that of
    log Z itself is told by its standard errors.)

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
    arguments = Arguments(args, kwargs)
    points = make_grid(model, grid, params_of(params), arguments)
    key_grid, key_own = (None, None) if rng_key is None else random.split(rng_key)
    options: dict[str, Any] = {
        "method": method,
        "num_chains": num_chains,
        "num_walkers": num_walkers,
        "num_temperatures": num_temperatures,
        "num_points": num_points,
        "progress_bar": progress_bar,
    }

    def log_z_at(key: Array | None, draws: Params) -> LogNormalizer:
        return log_normalizer(
            key, model, draws, *args, batch_ndims=1, **options, **kwargs
        )

    # log Z at points of the grid, and at those between
    num_nodes = len(points.nodes)
    everywhere = np.concatenate([points.nodes, points.between])
    draws = points.draws_at(everywhere)
    log_z = log_z_at(key_grid, draws)
    _require_finite(log_z, draws, points)

    # Where the parameters may be, by the data if there are any
    first = jax.tree.map(lambda leaf: leaf[0], draws)
    bound = BoundModel(with_full_plates(model), {}, random.key(0), arguments)
    counts = dict.fromkeys(log_z.estimate, 1.0)
    uncovered: tuple[str, ...] = ()
    log_joint = np.zeros(len(everywhere))
    observed = set(log_z.estimate) & set(observed_rows(bound, first))
    unknown = _without_values(bound, first) if observed else []
    is_judged = observed == set(log_z.estimate) and not unknown
    if unknown:
        uncovered = (
            f"sites {unknown} have neither data nor values here, so that it could not be "
            "told where the posterior lies, and whether inside of the grid: see that its "
            "draws keep away from the grid's ends, and give allow_uncertified=True.",
        )

    if is_judged:
        counts = counts_of(bound, first, {n: e[0] for n, e in log_z.estimate.items()})
        log_joint = np.asarray(_log_joint(bound, draws, log_z.estimate), float)
        on_grid = log_joint[:num_nodes].reshape(points.shape)
        uncovered = flags_of_coverage(points.values, points.transforms, on_grid)
    is_likely = log_joint >= np.max(log_joint) - MAX_UNLIKELY

    # Interpolation
    def halves(of: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(of)[:num_nodes], np.asarray(of)[num_nodes:]

    found = {
        name: smooth(
            halves(points.to_unit(everywhere)),
            halves(np.asarray(estimate, float)),
            halves(np.asarray(log_z.stderr[name], float)),
            halves(is_likely),
        )
        for name, estimate in log_z.estimate.items()
    }
    polynomials = {name: site.polynomial for name, site in found.items()}
    errors = {name: site.error for name, site in found.items()}
    doubts = {name: log_z.flags[name] for name in found}

    # log Z where the posterior is, by this very table
    if is_judged and np.isfinite(np.max(log_joint)):
        own = _own_points(bound, points, polynomials)
        there = log_z_at(key_own, points.draws_at(own))
        for name, polynomial in polynomials.items():
            off = there.estimate[name] - values_of(polynomial, points.to_unit(own))
            beyond = np.abs(off - np.mean(off, 0)) - MAX_NOISE * there.stderr[name]
            among = found[name].error_among(points.to_unit(own))
            errors[name] = float(np.max([errors[name], np.max(beyond), among]))
            doubts[name] += there.flags[name]

    flags = {
        name: doubts[name]
        + _flags_of_error(error * counts[name], tolerance, method)
        + uncovered
        for name, error in errors.items()
    }

    return TabulatedNormalizer(
        grid=points.values,
        log_normalizer=log_z,
        error=errors,
        counts=counts,
        flags=flags,
        params=points.fixed,
        transforms=points.transforms,
        polynomials=polynomials,
        tolerance=tolerance,
    )


def _require_finite(log_z: LogNormalizer, draws: Params, grid: Grid) -> None:
    """Refuse points at which there is no log Z.

    Raises:
        ValueError: The message names the first.
    """
    for name, estimate in log_z.estimate.items():
        is_finite = np.isfinite(np.asarray(estimate)).reshape(len(estimate), -1).all(1)
        if not is_finite.all():
            first = int(np.argmin(is_finite))
            place = {n: f"{float(draws[n][first]):.4g}" for n in grid.values}
            raise ValueError(
                f"log Z of energy site '{name}' is not finite at "
                f"{int((~is_finite).sum())} of {len(is_finite)} points, the first of them "
                f"{place}: the energy is infinite or NaN there. Leave such values out of "
                "the grid."
            )


def _without_values(bound: BoundModel, params: Params) -> list[str]:
    """Latents and energy sites that are neither observed nor among the parameters."""
    args = bound.arguments
    trace = trace_at(bound.rng_key, bound.model, params, args, full_plates=False)
    return sorted(
        name
        for name, site in trace.items()
        if site["type"] == "sample"
        and not (site["is_observed"] or name in params)
        and not site["infer"].get("is_auxiliary", False)
    )


@jax.jit
def _log_joint(bound: BoundModel, draws: Params, estimates: dict[str, Array]) -> Array:
    """Log joint density at every point, of the constrained parameters."""

    def at(point: tuple[Params, dict[str, Array]]) -> Array:
        params, known = point
        return -bound.negative_log_joint(
            params, lambda name, energy: energy.with_log_normalizer(known[name])
        )

    return lax.map(at, (draws, estimates))


def _own_points(
    bound: BoundModel, grid: Grid, polynomials: dict[str, Polynomial]
) -> np.ndarray:
    """Points of the posterior by the table."""

    def log_posterior(points: np.ndarray) -> np.ndarray:
        unit = grid.to_unit(points)
        estimates = {name: values_of(p, unit) for name, p in polynomials.items()}
        joint = _log_joint(bound, grid.draws_at(points), estimates)
        return np.asarray(joint + grid.log_slopes(points), float)

    ends = grid.nodes.min(0), grid.nodes.max(0)
    num = NUM_OWN_POINTS
    if len(grid.values) == 1:
        num = len(grid.nodes) + len(grid.between)
    return points_by_mass(log_posterior, *ends, num)


def _flags_of_error(off: float, tolerance: float, method: str) -> tuple[str, ...]:
    if off <= tolerance:
        return ()
    more = "more walkers (num_walkers) against noise, " if method == "bracket" else ""
    return (
        f"between the grid's points the likelihood is off by up to {off:.2g} nats, over "
        f"the tolerance of {tolerance:g}: take {more}more values, or a narrower range.",
    )
