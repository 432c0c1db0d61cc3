"""log Z without sampling: adaptive quadrature in one or two dimensions, and sums over
finite supports.

Both are differentiable in the energy's parameters, so that they can stand inside a
model under NUTS or SVI.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import logsumexp
from jax.typing import ArrayLike

from ebm_ppl.cubature import (
    NUM_CELLS_WITH_SLOPES,
    NUM_NODES,
    Cells,
    Effort,
    Rows,
    has_jump,
    heaviest,
    judge,
    lattice,
    log_share_beyond,
    log_weights,
    look_at_slopes,
    nodes_of,
    refine,
    relative_error,
)
from ebm_ppl.discrete import needs_continuous, states
from ebm_ppl.distribution import EnergyDistribution, unchecked_log_prob
from ebm_ppl.integrand import Integrand

DEFAULT_POINTS = {1: 2_049, 2: 513}
EFFORT = {1: Effort(64, 16), 2: Effort(40, 32)}
# Inside a model every leap of NUTS pays for them.
POINTS_IN_MODELS = {1: 1_025, 2: 257}
CELLS_IN_MODELS = {1: 160, 2: 256}
# Splitting ends as soon as nothing is left to resolve: only thin ridges and fast waves
# take all of it.
EFFORT_IN_MODELS = {1: Effort(24, 8), 2: Effort(24, 16)}
MAX_ROWS_IN_MODELS = 256
MAX_MISSED = 1e-6
# The share of the mass that counts in log Z inside a model, but not in its derivative.
MAX_WITHOUT_SLOPE = 1e-3
# In nats: what the number format may take from log Z, and with it from every row's log
# density.
MAX_ROUNDING = 1e-3


class Exact(NamedTuple):
    """log Z, what it may be off by, and the reasons to doubt it.

    Attributes:
        estimate: ``batch_shape``.
        error: In nats, like ``estimate``; 0 where it is under the accuracy that is
            asked of every exact method.
        flags: Reasons for doubt.  Under a trace, where none can be read, the estimate
            is NaN instead.
    """

    estimate: Array
    error: Array
    flags: tuple[str, ...]


def quadrature(
    distribution: EnergyDistribution,
    name: str | None = None,
    num_points: int | None = None,
    rows: Array | None = None,
) -> tuple[Array, tuple[str, ...]]:
    """Estimate and flags of :func:`integral`."""
    found = integral(distribution, name, num_points, rows)
    return found.estimate, found.flags


def enumeration(
    distribution: EnergyDistribution, name: str | None = None
) -> tuple[Array, tuple[str, ...]]:
    """Estimate and flags of :func:`total`."""
    found = total(distribution, name)
    return found.estimate, found.flags


def integral(
    distribution: EnergyDistribution,
    name: str | None = None,
    num_points: int | None = None,
    rows: Array | None = None,
) -> Exact:
    """Log Z by adaptive Gauss-Legendre quadrature, which converges exponentially for
    smooth integrands.

    In coordinates in which the base is standard, ``u = sinh(t)`` on cells in t; see
    :mod:`ebm_ppl.cubature`.

    Args:
        distribution: An energy over at most two unconstrained dimensions.
        name: The site's, for messages.
        num_points: Per dimension, odd, before any cell is split.
        rows: Data at the site, ``(num_rows, *batch_shape, *event_shape)``: mass beside
            them is not overlooked.

    Raises:
        ValueError: More than two dimensions, or a discrete support.
    """
    if distribution.support.is_discrete:
        raise ValueError(needs_continuous(distribution.base, name, "quadrature"))
    integrand = Integrand(distribution, name)
    if num_points is not None and (num_points < 9 or num_points % 2 == 0):
        raise ValueError(
            f"num_points = {num_points}; expected an odd number of at least 9."
        )

    per_axis = _cells_per_axis(num_points or DEFAULT_POINTS[integrand.dims])
    corner, width, nodes = lattice(
        integrand.half_width, per_axis, integrand.batch, integrand.dims, integrand.dtype
    )
    has_slopes = len(corner) <= NUM_CELLS_WITH_SLOPES
    density = integrand.density(nodes, has_slopes)
    if isinstance(density.log_value, jax.core.Tracer):
        return _integral_in_model(integrand, num_points, rows)

    at_rows = None if rows is None else integrand.rows(rows)
    cells = judge(density, corner, width, at_rows)
    if not has_slopes:
        cells = look_at_slopes(integrand.density, cells, at_rows)
    cells = refine(
        integrand.density,
        cells,
        at_rows,
        accuracy(),
        EFFORT[integrand.dims],
        is_traced=False,
    )
    log_missed = log_share_beyond(
        density.log_value, per_axis, integrand.dims, width[0, 0], integrand.steepening
    )
    return _read(integrand, cells, log_missed, at_rows)


def rows_at(distribution: EnergyDistribution, value: ArrayLike) -> Array | None:
    """Rows of an observed value to check quadrature at, ``(num_rows, *batch_shape, *event_shape)``, or None."""
    own = distribution.batch_shape + distribution.event_shape
    value = jnp.asarray(value)
    if (
        value.shape[max(value.ndim - len(own), 0) :] != own
        or not value.size
        or distribution.support.is_discrete
    ):
        return None
    rows = value.reshape(-1, *own)
    return rows[
        np.unique(np.linspace(0, len(rows) - 1, MAX_ROWS_IN_MODELS).astype(int))
    ]


def accuracy() -> float:
    """The relative accuracy of Z that is asked of an exact method."""
    return max(1e-6, 100 * float(jnp.finfo(jnp.result_type(float)).eps))


def _cells_per_axis(num_points: int) -> int:
    return max(4, num_points // NUM_NODES)


class _Verdict(NamedTuple):
    """What an integral may lack, relative to what it holds; each ``(batch,)``."""

    missed: Array
    beside_rows: Array
    unresolved: Array
    rounding: Array

    def is_good(self) -> Array:
        return (
            (self.missed < MAX_MISSED)
            & (self.beside_rows < MAX_MISSED)
            & (self.unresolved <= accuracy())
            & (self.rounding <= MAX_ROUNDING)
        )


@jax.jit
def _verdict(
    cells: Cells, log_missed: Array, rows: Rows | None, half_width: Array
) -> tuple[Array, _Verdict]:
    log_z = logsumexp(cells.log_mass, axis=0)
    eps = jnp.finfo(log_z.dtype).eps
    rounding = jnp.exp(logsumexp(cells.log_rounding, axis=0) - log_z) + eps * jnp.abs(
        log_z
    )
    beside_rows = jnp.zeros_like(log_z)
    if rows is not None:
        # Rows that no cell holds: what one unit of t would add there.
        is_beyond = rows.is_valid & jnp.any(
            jnp.abs(rows.position) > half_width, axis=-1
        )
        beside_rows = jnp.max(
            jnp.where(is_beyond, jnp.exp(rows.density.log_value - log_z), 0.0), axis=0
        )
    return log_z, _Verdict(
        jnp.exp(log_missed - log_z), beside_rows, relative_error(cells), rounding
    )


def _stated(verdict: _Verdict) -> Array:
    """What a log Z that is not flagged may be off by, where that is worth saying."""
    error = verdict.rounding + verdict.unresolved
    return jnp.where(error > accuracy(), error, 0.0)


def _read(
    integrand: Integrand, cells: Cells, log_missed: Array, rows: Rows | None
) -> Exact:
    """Numbers and flags, where numbers are at hand."""
    log_z, verdict = _verdict(cells, log_missed, rows, integrand.half_width)
    missed, beside_rows, unresolved, rounding = (
        float(np.max(column)) for column in verdict
    )
    flags = []
    if not np.all(np.isfinite(log_z)):
        flags.append(
            "the integral is not finite: check that the energy is finite on its "
            "support."
        )
    elif not (missed < MAX_MISSED and beside_rows < MAX_MISSED):
        share = max(missed, beside_rows)
        flags.append(
            f"{share:.1e} of the integral lies beyond the ends of the grid: the energy "
            "may not be bounded below, its "
            "tails (or its base's) may fall too slowly, or its scale is far from the "
            "base's. Take method='bracket', or "
            "a base nearer to the energy."
        )
    elif not rounding <= MAX_ROUNDING:
        flags.append(rounding_flag(rounding, log_z.dtype))
    elif not unresolved <= accuracy():
        flags.append(
            f"after all refinement half the points give log Z {unresolved:.1e} away: "
            "take more num_points, a base "
            "nearer to the energy, or a smooth energy (truncate by the base's support, "
            "not by infinite energies)."
        )
    shape = integrand.batch_shape
    return Exact(log_z.reshape(shape), _stated(verdict).reshape(shape), tuple(flags))


def rounding_flag(rounding: float, dtype: jnp.dtype) -> str:
    """What to do about numbers that are too large for their format."""
    return (
        f"{dtype} rounds the energy by about {rounding:.1e} nats where the mass lies, "
        "and every log density with it: "
        "subtract a constant inside the energy, shift x so that its numbers are small, "
        "or enable double precision "
        "(jax.config.update('jax_enable_x64', True))."
    )


def _integral_in_model(
    integrand: Integrand, num_points: int | None, rows: Array | None
) -> Exact:
    """The same under a trace: cells are found at fixed parameters, and their nodes then carry the derivatives."""
    dims, batch = integrand.dims, integrand.batch
    per_axis = _cells_per_axis(num_points or POINTS_IN_MODELS[dims])
    # Who asks for more points has mass in more cells.
    num_cells = (
        CELLS_IN_MODELS[dims]
        if num_points is None
        else max(CELLS_IN_MODELS[dims], per_axis**dims)
    )
    corner, width, at_lattice = lattice(
        integrand.half_width, per_axis, batch, dims, integrand.dtype
    )

    def search(position: Array) -> tuple[Cells, _Verdict, Array, Array]:
        """The cells with nearly all mass, what speaks against them, log of what the others hold, and jumps."""
        density = integrand.density(position, False)
        at_rows = None if rows is None else integrand.rows(rows)
        cells = judge(density, corner, width, at_rows)
        cells = refine(
            integrand.density,
            cells,
            at_rows,
            accuracy(),
            EFFORT_IN_MODELS[dims],
            is_traced=True,
        )
        log_missed = log_share_beyond(
            density.log_value, per_axis, dims, width[0, 0], integrand.steepening
        )
        log_z, verdict = _verdict(cells, log_missed, at_rows, integrand.half_width)
        index, chosen = heaviest(cells, num_cells)
        rest = cells.log_mass.at[index, jnp.arange(batch)].set(-jnp.inf)
        log_rest = logsumexp(rest, axis=0)
        without_slope = jnp.exp(log_rest - log_z)
        missed = verdict.missed + jnp.where(
            without_slope > MAX_WITHOUT_SLOPE, without_slope, 0.0
        )
        return chosen, verdict._replace(missed=missed), log_rest, has_jump(cells, width)

    # Which cells are split is no function to differentiate: parameters inside the
    # energy are constants here.
    converted, constants = jax.closure_convert(search, at_lattice)
    cells, verdict, log_rest, jumps = converted(
        at_lattice, *map(lax.stop_gradient, constants)
    )

    # Nodes without mass must not meet the energy's derivative, which may be infinite
    # there: 0 · inf is NaN.
    position = nodes_of(cells.corner, cells.width)
    log_value, constants = jax.closure_convert(
        lambda t: integrand.density(t, False).log_value, position
    )
    found = lax.stop_gradient(log_value(position, *map(lax.stop_gradient, constants)))
    is_used = (found > -jnp.inf) & jnp.repeat(
        cells.log_mass > -jnp.inf, NUM_NODES**dims, axis=0
    )
    somewhere = position[jnp.argmax(found, axis=0), jnp.arange(batch)]
    safe = jnp.where(is_used[..., None], position, somewhere)
    summed = integrand.density(safe, False).log_value + log_weights(cells.width, dims)
    log_z = jnp.logaddexp(
        logsumexp(jnp.where(is_used, summed, -jnp.inf), axis=0), log_rest
    )

    log_z = _without_slope(
        jnp.where(verdict.is_good(), log_z, jnp.nan), jumps, constants
    )
    log_z = log_z.reshape(integrand.batch_shape)
    return Exact(log_z, _stated(verdict).reshape(integrand.batch_shape), ())


@jax.custom_jvp
def _without_slope(log_z: Array, jumps: Array, constants: list[Array]) -> Array:
    """``log_z``, whose derivative by what the energy holds is NaN beside jumps.

    Nodes do not see an edge that moves with the parameters: autodiff's derivative lacks
    it, or is zero.
    """
    return log_z


@_without_slope.defjvp
def _without_slope_jvp(primals: tuple, tangents: tuple) -> tuple:
    log_z, jumps, _ = primals
    along = sum(
        (jnp.sum(tangent) for tangent in tangents[2]), jnp.zeros((), log_z.dtype)
    )
    return log_z, tangents[0] + jnp.where(jumps, jnp.nan, 0.0) * along


def total(distribution: EnergyDistribution, name: str | None = None) -> Exact:
    """Log Z as a sum over every state of a finite support.

    Args:
        distribution: An energy over a finite discrete support, such as
            ``dist.Bernoulli(0.5).expand([16]).to_event(1)``, ``dist.Multinomial(3,
            probs)``, or a bijection of one.
        name: The site's, for messages.

    Raises:
        ValueError: A support that is not finite, or has more than 2²² states.
    """
    every = states(distribution.base, name)
    # Unequal bounds leave some elements' states outside: these count nothing, and are
    # never evaluated.
    event_dims = tuple(range(every.ndim - len(distribution.event_shape), every.ndim))
    inside = jnp.broadcast_to(
        distribution.support(every), every.shape[: every.ndim - len(event_dims)]
    )
    first = jnp.argmax(inside, axis=0)
    valid = jnp.take_along_axis(
        every, first.reshape(1, *first.shape, *(1,) * len(event_dims)), axis=0
    )
    every = jnp.where(
        inside.reshape(*inside.shape, *(1,) * len(event_dims)), every, valid
    )

    energies = distribution.factor_energies(every).values()
    log_base = unchecked_log_prob(distribution.base, every)
    log_value = jnp.where(inside, log_base - sum(energies), -jnp.inf)
    log_z = _log_sum(log_value)
    weight = jnp.exp(log_value - log_z)
    magnitude = sum(jnp.abs(energy) for energy in energies) + jnp.abs(log_base)
    eps = float(jnp.finfo(log_z.dtype).eps)
    rounding = eps * (
        jnp.sum(jnp.where(weight > 0, weight * magnitude, 0.0), axis=0) + jnp.abs(log_z)
    )
    rounding = lax.stop_gradient(rounding)
    error = jnp.where(rounding > accuracy(), rounding, 0.0)

    if isinstance(log_z, jax.core.Tracer):
        is_good = jnp.isfinite(log_z) & (rounding <= MAX_ROUNDING)
        return Exact(jnp.where(is_good, log_z, jnp.nan), error, ())
    if not bool(jnp.all(jnp.isfinite(log_z))):
        return Exact(
            log_z,
            error,
            ("the sum is not finite: check that the energy is finite on its support.",),
        )
    worst = float(jnp.max(rounding))
    return Exact(
        log_z,
        error,
        () if worst <= MAX_ROUNDING else (rounding_flag(worst, log_z.dtype),),
    )


def _log_sum(log_value: Array) -> Array:
    """``logsumexp`` over the first axis, in two stages: rounding grows with the terms of one sum."""
    count = log_value.shape[0]
    width = 2 ** math.ceil(math.log2(max(count, 1)) / 2)
    missing = -count % width
    padded = jnp.pad(
        log_value,
        ((0, missing), *((0, 0),) * (log_value.ndim - 1)),
        constant_values=-jnp.inf,
    )
    return logsumexp(
        logsumexp(padded.reshape(-1, width, *log_value.shape[1:]), axis=1), axis=0
    )
