"""Fingerprints of energies: which energy a log Z belongs to.

Values of E and log base at points that matter are kept beside the estimate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.marks import points_of
from ebm_ppl.errors import at_site

# Relative to the energy's distance from its median over the points, and in nats.
TOLERANCE = 3e-4

# Allowed rounding, in units of the float precision at the size of E and of log base.
ROUNDING = 16.0


class Fingerprint(NamedTuple):
    """Energies at points.

    Attributes:
        points: ``(num_points, *batch, *event)``.
        energy: E there, ``(num_points, *batch)``.
        log_base: log base there, same shape.
    """

    points: Array
    energy: Array
    log_base: Array


def fingerprint(distribution: Any, more: Array | None = None) -> Fingerprint:
    """Record E and log base at fixed points and at ``more`` points.

    The fixed points are draws of the base, and points near its centre and far out.

    Args:
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.
        more: Points where the energy's mass or its data are, ``(num, *batch, *event)``.
    """
    points = points_of(distribution)
    if more is not None:
        points = jnp.concatenate([points, more.astype(points.dtype)])

    return _evaluate(distribution, points)


def _evaluate(distribution: Any, points: Array) -> Fingerprint:
    energy = distribution.energy(points)
    log_base = jnp.broadcast_to(
        unchecked_log_prob(distribution.base, points), energy.shape
    )
    return Fingerprint(points, energy, log_base)


def require_same_energy(
    name: str | None, distribution: Any, expected: Fingerprint
) -> Array | np.ndarray:
    """Check that a distribution has the energies of a fingerprint; 0 if it does.

    Energies without traced values are compared immediately, even inside a trace.
    Traced energies give NaN if they differ.

    Raises:
        ValueError: The energies differ.
    """
    batch_shape = distribution.batch_shape
    event_shape = batch_shape + distribution.event_shape
    fits = (
        expected.points.shape[1:] == event_shape
        and expected.energy.shape[1:] == batch_shape
    )

    with jax.ensure_compile_time_eval():
        if fits:
            found = _evaluate(distribution, expected.points)
            excess, difference = _compare(found, expected)
        else:
            excess = difference = jnp.array(jnp.inf)
        same = excess <= 0

    if isinstance(same, jax.core.Tracer):
        return lax.stop_gradient(jnp.where(same, 0.0, jnp.nan))

    if not bool(same):
        what = (
            f"by up to {float(difference):.3g} nats"
            if fits
            else f"in shape ({event_shape} here)"
        )
        raise ValueError(
            f"log_normalizer belongs to another energy than that{at_site(name)}: at "
            f"the points that it was marked with they differ {what}, although the "
            "parameters' names and values agree. Another base, other arguments of the "
            "model, or a changed net: estimate it for this very energy; "
            "log_normalizer.estimate[site] is the bare number. A base computed from the "
            "data that the model is given (x.mean(0)) is another one for other data: "
            "compute it outside of the model."
        )

    # A NumPy number: a JAX array would be traced here.
    return np.zeros(())


@jax.jit
def _compare(found: Fingerprint, expected: Fingerprint) -> tuple[Array, Array]:
    """The largest excess over the tolerance, and the largest difference.

    The tolerance allows for rounding and for another machine's arithmetic.
    """
    precision = float(jnp.finfo(expected.energy.dtype).eps)
    worst, largest = jnp.array(-jnp.inf), jnp.zeros(())

    for here, there in (
        (found.energy, expected.energy),
        (found.log_base, expected.log_base),
    ):
        size = jnp.abs(there)
        # Scale with how E varies, not with its size: an offset must not hide a
        # difference.
        spread = jnp.abs(
            there
            - jnp.nanmedian(jnp.where(jnp.isfinite(there), there, jnp.nan), axis=0)
        )
        allowed = TOLERANCE * (1.0 + spread) + ROUNDING * precision * size

        difference = jnp.where(_identical(here, there), 0.0, jnp.abs(here - there))
        excess = jnp.where(_identical(here, there), -jnp.inf, difference - allowed)
        worst = jnp.maximum(
            worst, jnp.max(jnp.where(jnp.isnan(excess), jnp.inf, excess))
        )
        largest = jnp.maximum(
            largest, jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference))
        )

    return worst, largest


def _identical(one: Array, other: Array) -> Array:
    return (one == other) | (jnp.isnan(one) & jnp.isnan(other))
