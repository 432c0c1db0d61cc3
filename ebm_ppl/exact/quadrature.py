"""log Z without sampling: adaptive quadrature, and sums over finite supports.

Quadrature serves one or two dimensions.  Both are differentiable in the energy's
parameters and can be used inside a model under NUTS or SVI.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import logsumexp
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.states import needs_continuous
from ebm_ppl.exact.cells import (
    Effort,
    has_jump,
    heaviest,
    log_share_beyond,
    look_at_slopes,
    refine,
)
from ebm_ppl.exact.integrand import BaseDraws, Integrand
from ebm_ppl.exact.judge import (
    NUM_CELLS_WITH_SLOPES,
    Cells,
    Rows,
    judge,
    log_overlooked,
)
from ebm_ppl.exact.lattice import lattice, log_weights, nodes_of
from ebm_ppl.exact.rule import NUM_NODES
from ebm_ppl.exact.verdict import (
    MAX_WITHOUT_SLOPE,
    Exact,
    Verdict,
    accuracy,
    read_verdict,
    stated_error,
    verdict_of,
)

DEFAULT_POINTS = {1: 2_049, 2: 513}

EFFORT = {1: Effort(64, 16), 2: Effort(40, 32)}

# Inside a model every leapfrog step of NUTS pays for them.
POINTS_IN_MODELS = {1: 1_025, 2: 257}

CELLS_IN_MODELS = {1: 160, 2: 256}

# Splitting stops when every cell is resolved: only thin ridges and fast oscillations
# use all levels.
EFFORT_IN_MODELS = {1: Effort(24, 8), 2: Effort(24, 16)}

MAX_ROWS_IN_MODELS = 256

# Draws of the base that guide the splitting, and others that judge its result: together
# as many as a lattice has nodes, so that they share its compiled operations.
DRAWS, DRAWS_IN_MODELS = (512, 1_536), (64, 128)


def quadrature(
    distribution: EnergyDistribution,
    name: str | None = None,
    num_points: int | None = None,
    rows: Array | None = None,
) -> tuple[Array, tuple[str, ...]]:
    """Estimate and flags of :func:`integral`."""
    found = integral(distribution, name, num_points, rows)
    return found.estimate, found.flags


def integral(
    distribution: EnergyDistribution,
    name: str | None = None,
    num_points: int | None = None,
    rows: Array | None = None,
) -> Exact:
    """Log Z by adaptive Gauss-Legendre quadrature.

    It converges exponentially for smooth integrands.  The coordinates are those in
    which the base is standard, ``u = sinh(t)``, with cells in t; see
    :mod:`ebm_ppl.exact.cells`.

    Args:
        distribution: An energy over at most two unconstrained dimensions.
        name: The site's name, for messages.
        num_points: Per dimension, odd, before any cell is split.
        rows: Data at the site, ``(num_rows, *batch_shape, *event_shape)``: mass near
            them is not overlooked, nor near draws of the base.

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

    draws = integrand.draws(*DRAWS)
    at_rows = _together(integrand, rows, draws.guides)
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
    overlooked = _look_at_draws(integrand, cells, draws)
    return read_verdict(integrand, cells, log_missed, at_rows, overlooked)


def _together(
    integrand: Integrand, data: Array | None, guides: Rows | None
) -> Rows | None:
    """Data rows and draws that guide the splitting."""
    if data is None:
        return guides
    rows = integrand.rows(data)
    if guides is None:
        return rows
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, guides)


def _look_at_draws(integrand: Integrand, cells: Cells, draws: BaseDraws) -> Array:
    """Log of the mass that draws of the base find between the cells' nodes."""
    if draws.checks is None:
        return jnp.full((integrand.batch,), -jnp.inf)

    # Powers of two: a few compiled lengths serve all energies.
    occupied = int(jnp.max(jnp.sum(cells.log_mass > -jnp.inf, axis=0)))
    num = min(2 ** max(occupied - 1, 1).bit_length(), cells.width.shape[0])
    _, chosen = heaviest(cells, num)
    nodes = nodes_of(chosen.corner, chosen.width)
    log_value = integrand.density(nodes, False).log_value
    return log_overlooked(log_value, chosen, draws.checks, draws.log_start)


def rows_at(distribution: EnergyDistribution, value: ArrayLike) -> Array | None:
    """Rows of an observed value at which to check quadrature, or None.

    Their shape is ``(num_rows, *batch_shape, *event_shape)``.
    """
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


def _cells_per_axis(num_points: int) -> int:
    return max(4, num_points // NUM_NODES)


def _integral_in_model(
    integrand: Integrand, num_points: int | None, rows: Array | None
) -> Exact:
    """:func:`integral` under a trace.

    One body: the custom derivative closes over the cells.

    Cells are found at fixed parameters; their nodes then carry the derivatives.
    """
    dims, batch = integrand.dims, integrand.batch
    per_axis = _cells_per_axis(num_points or POINTS_IN_MODELS[dims])

    # More points are asked for where the mass lies in more cells.
    num_cells = (
        CELLS_IN_MODELS[dims]
        if num_points is None
        else max(CELLS_IN_MODELS[dims], per_axis**dims)
    )
    corner, width, at_lattice = lattice(
        integrand.half_width, per_axis, batch, dims, integrand.dtype
    )

    draws = integrand.draws(*DRAWS_IN_MODELS)

    def search(position: Array) -> tuple[Cells, Verdict, Array, Array]:
        """The heaviest cells, their verdict, log mass of the others, and jumps."""
        density = integrand.density(position, False)
        at_rows = _together(integrand, rows, draws.guides)
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
        log_z, verdict = verdict_of(cells, log_missed, at_rows, integrand.half_width)

        index, chosen = heaviest(cells, num_cells)
        rest = cells.log_mass.at[index, jnp.arange(batch)].set(-jnp.inf)
        log_rest = logsumexp(rest, axis=0)
        without_slope = jnp.exp(log_rest - log_z)
        missed = verdict.missed + jnp.where(
            without_slope > MAX_WITHOUT_SLOPE, without_slope, 0.0
        )

        return chosen, verdict._replace(missed=missed), log_rest, has_jump(cells, width)

    # The choice of cells is not differentiated: parameters inside the energy are
    # constants here.
    converted, constants = jax.closure_convert(search, at_lattice)
    cells, verdict, log_rest, jumps = converted(
        at_lattice, *map(lax.stop_gradient, constants)
    )

    # Nodes without mass must not enter the derivative: the energy's may be infinite
    # there, and 0 · inf is NaN.
    position = nodes_of(cells.corner, cells.width)
    log_value, constants = jax.closure_convert(
        lambda t: integrand.density(t, False).log_value, position
    )
    found = lax.stop_gradient(log_value(position, *map(lax.stop_gradient, constants)))

    # Draws of the base that did not guide the choice
    if draws.checks is not None:
        over = log_overlooked(found, cells, draws.checks, draws.log_start)
        share = jnp.exp(lax.stop_gradient(over) - logsumexp(cells.log_mass, axis=0))
        verdict = verdict._replace(overlooked=share)

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
    return Exact(log_z, stated_error(verdict).reshape(integrand.batch_shape), ())


@jax.custom_jvp
def _without_slope(log_z: Array, jumps: Array, constants: list[Array]) -> Array:
    """``log_z``, with NaN derivatives in the energy's parameters beside jumps.

    Nodes do not see an edge that moves with the parameters: the derivative by autodiff
    lacks that term, or is zero.
    """
    return log_z


@_without_slope.defjvp
def _without_slope_jvp(primals: tuple, tangents: tuple) -> tuple:
    log_z, jumps, _ = primals
    along = sum(
        (jnp.sum(tangent) for tangent in tangents[2]), jnp.zeros((), log_z.dtype)
    )
    return log_z, tangents[0] + jnp.where(jumps, jnp.nan, 0.0) * along
