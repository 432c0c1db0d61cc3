"""What an exact log Z states, and what speaks against it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import logsumexp

from ebm_ppl.energy.rounding import (
    MAX_ERROR,
    normalization_error,
    not_normalized,
)
from ebm_ppl.exact.cells import relative_error
from ebm_ppl.exact.integrand import Integrand
from ebm_ppl.exact.judge import Cells, Rows

MAX_MISSED = 1e-6

# Inside a model, the share of the mass that log Z may count but its derivative not.
MAX_WITHOUT_SLOPE = 1e-3

# In nats: how far rounding may shift log Z, and with it every row's log density.
MAX_ROUNDING = 1e-3

# The share of the mass that draws of the base may find between the points.
MAX_OVERLOOKED = 1e-3


class Exact(NamedTuple):
    """log Z, its error, and the reasons to doubt it.

    Attributes:
        estimate: ``batch_shape``.
        error: In nats, like ``estimate``; 0 where it is below :func:`accuracy`.
        flags: Reasons for doubt.  Empty under a trace, where the estimate is NaN
            instead.
    """

    estimate: Array
    error: Array
    flags: tuple[str, ...]


def accuracy() -> float:
    """The relative accuracy of Z required of an exact method."""
    return max(1e-6, 100 * float(jnp.finfo(jnp.result_type(float)).eps))


class Verdict(NamedTuple):
    """Possible errors of an integral, relative to its value; each ``(batch,)``."""

    missed: Array
    beside_rows: Array
    unresolved: Array
    rounding: Array
    overlooked: Array

    def is_good(self) -> Array:
        """Whether nothing speaks against the integral."""
        return (
            (self.missed < MAX_MISSED)
            & (self.beside_rows < MAX_MISSED)
            & (self.unresolved <= accuracy())
            & (self.rounding <= MAX_ROUNDING)
            & (self.overlooked <= MAX_OVERLOOKED)
        )


@jax.jit
def verdict_of(
    cells: Cells, log_missed: Array, rows: Rows | None, half_width: Array
) -> tuple[Array, Verdict]:
    """Log Z of the cells, and what speaks against it."""
    log_z = logsumexp(cells.log_mass, axis=0)
    eps = jnp.finfo(log_z.dtype).eps
    rounding = jnp.exp(logsumexp(cells.log_rounding, axis=0) - log_z) + eps * jnp.abs(
        log_z
    )

    beside_rows = jnp.zeros_like(log_z)
    if rows is not None:
        # Rows outside the box: the mass that one unit of t would add there.
        is_beyond = rows.is_valid & jnp.any(
            jnp.abs(rows.position) > half_width, axis=-1
        )
        beside_rows = jnp.max(
            jnp.where(is_beyond, jnp.exp(rows.density.log_value - log_z), 0.0), axis=0
        )

    return log_z, Verdict(
        jnp.exp(log_missed - log_z),
        beside_rows,
        relative_error(cells),
        rounding,
        jnp.zeros_like(log_z),
    )


def stated_error(verdict: Verdict) -> Array:
    """The error of a log Z without flags; 0 where it is negligible."""
    error = verdict.rounding + verdict.unresolved
    return jnp.where(error > accuracy(), error, 0.0)


def read_verdict(
    integrand: Integrand,
    cells: Cells,
    log_missed: Array,
    rows: Rows | None,
    log_overlooked: Array,
) -> Exact:
    """Estimate, error and flags from concrete values."""
    log_z, verdict = verdict_of(cells, log_missed, rows, integrand.half_width)
    verdict = verdict._replace(overlooked=jnp.exp(log_overlooked - log_z))
    missed, beside_rows, unresolved, rounding, overlooked = (
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
            "may not be bounded below, its tails (or its base's) may fall too slowly, "
            "or its scale is far from the base's. Take method='bracket', or a base "
            "nearer to the energy."
        )
    elif not rounding <= MAX_ROUNDING:
        flags.append(rounding_flag(rounding, log_z.dtype))
    elif not unresolved <= accuracy():
        flags.append(
            f"after all refinement half the points give log Z {unresolved:.1e} away: "
            "take more num_points, a base nearer to the energy, or a smooth energy "
            "(truncate by the base's support, not by infinite energies)."
        )

    elif not overlooked <= MAX_OVERLOOKED:
        flags.append(
            f"draws of the base find about {overlooked:.1e} of the integral between "
            "the points: the energy varies faster than the grid. Take more num_points, "
            "or method='bracket'."
        )

    if (off := float(np.max(np.abs(normalization_error(integrand.start))))) > MAX_ERROR:
        flags.append(not_normalized(off).format(where=""))

    shape = integrand.batch_shape
    return Exact(
        log_z.reshape(shape), stated_error(verdict).reshape(shape), tuple(flags)
    )


def rounding_flag(rounding: float, dtype: jnp.dtype) -> str:
    """Flag for an energy whose values are too large for their float precision."""
    return (
        f"{dtype} rounds the energy by about {rounding:.1e} nats where the mass lies, "
        "and every log density with it: subtract a constant inside the energy, shift "
        "x so that its numbers are small, or enable double precision "
        "(jax.config.update('jax_enable_x64', True))."
    )
