"""Checks that an energy is a pure function of one point.

``E(x_i)`` may depend neither on the other values of a batch (batch statistics) nor on
its index (a closed-over array with one entry per row): walkers, quadrature points and
data rows come in batches of other sizes and orders.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from ebm_ppl.energy.base_programs import draws_of, unchecked_log_prob
from ebm_ppl.energy.supports import is_improper, points_in_support

# Points at which energies are compared, and how many are evaluated in another batch.
NUM_POINTS, NUM_OTHERS = 8, 5

# Relative to the points' spread in energy, and to rounding in units of the precision.
TOLERANCE, ROUNDING = 1e-3, 64.0


class Company(NamedTuple):
    """E of the same points in different batches, ``(num, *batch)`` each.

    Attributes:
        together: All points in one batch.
        others: The first few points, evaluated in reverse order without the rest;
            stored in the points' order.
        alone: The first point on its own.
        size: The scale of rounding errors, for every point.
    """

    together: Array
    others: Array
    alone: Array
    size: Array


def in_company(distribution: Any) -> Company:
    """Evaluate an energy at the same points in different batches; jittable."""
    points = _typical_points(distribution)
    together = distribution.energy(points)
    others = distribution.energy(points[:NUM_OTHERS][::-1])[::-1]
    alone = distribution.energy(points[:1])

    # An energy may contain log base and cancel it: rounding scales with it too.
    log_base = jnp.abs(unchecked_log_prob(distribution.base, points))
    return Company(together, others, alone, 1.0 + jnp.abs(together) + log_base)


def require_pointwise(name: str, distribution: Any) -> Array | np.ndarray:
    """Check that an energy depends on one point at a time; 0 if it does.

    A traced energy that does not gives NaN; others are refused immediately.

    Args:
        name: The site's name.
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.

    Raises:
        ValueError: Rows depend on each other, or the energy has one entry per row; the
            message says which.
    """
    require_no_rows(name, distribution)
    with jax.ensure_compile_time_eval():
        company = jax.jit(lambda: in_company(distribution))()
    return doubt_of(name, distribution, company)


def doubt_of(name: str, distribution: Any, company: Company) -> Array | np.ndarray:
    """The result of :func:`require_pointwise` for energies evaluated beforehand."""
    company = jax.lax.stop_gradient(company)
    if not any(isinstance(value, jax.core.Tracer) for value in company):
        require_equal(name, distribution, company)
        return np.zeros(())  # a JAX array would be traced here

    precision = float(jnp.finfo(jnp.result_type(float)).eps)
    differ = [
        jnp.any(_differ(company, found, precision))
        for found in (company.others, company.alone)
    ]
    return jnp.where(differ[0] | differ[1], jnp.nan, 0.0)


def require_no_rows(name: str, distribution: Any, *, traced: bool = True) -> None:
    """Refuse an energy that returns one number per row for a single value.

    Args:
        name: The site's name.
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.
        traced: Find shapes by tracing; False evaluates the energy.

    Raises:
        ValueError: The energy has one entry per row; the message says how many.
    """
    distribution.require_built_shapes()
    event_shape = distribution.batch_shape + distribution.event_shape
    value = jax.ShapeDtypeStruct((1, *event_shape), _dtype(distribution))

    for factor, energy in distribution.factors.items():
        if traced:
            # A fresh function: JAX would reuse the shape that an energy object returned
            # before it changed.
            shape = jnp.shape(jax.eval_shape(lambda v, energy=energy: energy(v), value))
        else:
            shape = jnp.shape(energy(_typical_points(distribution)[:1]))

        if shape[:1] != (1,) and shape[1:] == distribution.batch_shape and shape:
            raise ValueError(
                f"Energy factor '{factor}' at site '{name}' returned {shape[0]} "
                "numbers for one value: it depends on the row, through an array with "
                f"{shape[0]} entries that it closes over (covariates?). Every row then "
                "has a normaliser of its own: give the base the rows' batch shape, "
                f"base.expand([{shape[0]}]), and return (..., {shape[0]})."
            )


def require_equal(name: str, distribution: Any, company: Company) -> None:
    """Raise if the same point has two energies."""
    for found, what in (
        (company.others, "among fewer in another order"),
        (company.alone, "alone"),
    ):
        wrong = np.argwhere(
            _differ(company, found, float(jnp.finfo(jnp.result_type(float)).eps))
        )
        if len(wrong):
            # Half precision rounds more coarsely; only the energy's jaxpr shows it.
            wrong = np.argwhere(_differ(company, found, _precision(distribution)))
        if not len(wrong):
            continue

        first = tuple(wrong[0])
        raise ValueError(
            f"The energy at site '{name}' is no function of one value: of the same "
            f"value it is {company.together[first]:.6g} among {len(company.together)} "
            f"values and {found[first]:.6g} {what}. Either rows see each other (a "
            "mean, a standard deviation or a maximum over the leading axis, batch "
            "norm): reduce over event axes alone, or use layer norm. Or the energy "
            "depends on the row (an array with one entry per row): give the base the "
            "rows' batch shape, base.expand([n])."
        )


@partial(jax.jit, static_argnames="precision")
def _differ(company: Company, found: Any, precision: float) -> Array:
    there, size = company.together[: len(found)], company.size[: len(found)]
    spread = jnp.abs(company.together - jnp.median(company.together, axis=0))
    spread = jnp.where(jnp.isfinite(spread), spread, 0.0)
    allowed = (
        TOLERANCE * (spread[: len(found)] + jnp.median(spread, axis=0))
        + ROUNDING * precision * size
    )

    same = (found == there) | (jnp.isnan(found) & jnp.isnan(there))
    return ~same & ~(jnp.abs(found - there) <= allowed)


def _precision(distribution: Any) -> float:
    """The relative precision of the coarsest floats that an energy computes in."""
    value = jax.ShapeDtypeStruct(
        (1, *distribution.batch_shape, *distribution.event_shape), _dtype(distribution)
    )
    program = str(jax.make_jaxpr(lambda v: distribution.energy(v))(value))
    for dtype, printed in ((jnp.bfloat16, "bf16"), (jnp.float16, "f16")):
        if re.search(rf"\b{printed}\[", program):
            return float(jnp.finfo(dtype).eps)
    return float(jnp.finfo(jnp.result_type(float)).eps)


def _dtype(distribution: Any) -> Any:
    return (
        jnp.result_type(int)
        if distribution.support.is_discrete
        else jnp.result_type(float)
    )


def _typical_points(distribution: Any) -> Array:
    """Points near the centre of the base or start, where energies are moderate."""
    base, start, key = distribution.base, distribution.start, random.key(0)
    for proper in (base, start):
        if proper is not None and not is_improper(proper):
            return draws_of(proper, key, NUM_POINTS)
    return points_in_support(base, key, NUM_POINTS)
