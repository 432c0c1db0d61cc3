"""An energy is a pure function of one point: the checks, and the types that it computes
in.

``E(x_i)`` may depend neither on the values beside ``x_i`` (statistics of a batch) nor
on its place among them (an array with one entry per row, closed over): walkers,
quadrature points and data rows meet the same energy in other numbers and other orders.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike

from ebm_ppl.errors import at_site
from ebm_ppl.supports import is_improper, points_in_support, unchecked_log_prob

# Points that energies are compared at, and how many of them are seen again in other
# company.
NUM_POINTS, NUM_OTHERS = 8, 5
# Of the points' spread in energy, and of rounding in units of the energy's precision.
TOLERANCE, ROUNDING = 1e-3, 64.0


def as_points(value: ArrayLike, is_discrete: bool) -> Array:
    """Values as an energy sees them: floats of at least 32 bits on continuous supports,
    whole ints on discrete ones.

    An energy computed in the data's own small type wraps around (int8), or does not
    differentiate.
    """
    value = jnp.asarray(value)
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"Values are {dtype}; expected real numbers.")

    if jnp.issubdtype(dtype, jnp.floating):
        return value.astype(jnp.promote_types(dtype, jnp.float32))
    if not is_discrete:
        return value.astype(jnp.result_type(float))
    return value.astype(jnp.promote_types(dtype, jnp.int32))


def as_energy(energy: Any, name: str, site: str | None) -> Array:
    """What an energy returned, as floats of at least 32 bits, whatever it computed in."""
    dtype = jnp.result_type(energy)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(energy).astype(jnp.promote_types(dtype, jnp.float32))
    if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
        return jnp.asarray(energy).astype(jnp.result_type(float))
    raise TypeError(
        f"Energy factor '{name}'{at_site(site)} returned {dtype}; expected real "
        "numbers, one per event."
    )


class Company(NamedTuple):
    """E of the same points in different company, ``(num, *batch)`` each.

    Attributes:
        together: Of all points at once.
        others: Of the first few, evaluated in reverse order without the rest; in the
            points' order.
        alone: Of the first one alone.
        size: What rounding errors are relative to, for every point.
    """

    together: Array
    others: Array
    alone: Array
    size: Array


def in_company(distribution: Any) -> Company:
    """Evaluate an energy at the same points in different company, one jittable computation."""
    points = _typical_points(distribution)
    together = distribution.energy(points)
    others = distribution.energy(points[:NUM_OTHERS][::-1])[::-1]
    alone = distribution.energy(points[:1])

    # Energies that contain their base cancel its density.
    log_base = jnp.abs(unchecked_log_prob(distribution.base, points))
    return Company(together, others, alone, 1.0 + jnp.abs(together) + log_base)


def require_pointwise(name: str, distribution: Any) -> Array | np.ndarray:
    """0 for an energy that depends on one point at a time.

    An energy that depends on something traced gives NaN where it does not; others are
    refused at once.

    Args:
        name: The site's.
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.

    Raises:
        ValueError: The message says which: rows that see each other, or an energy with
            an entry per row.
    """
    require_no_rows(name, distribution)
    with jax.ensure_compile_time_eval():
        company = jax.jit(lambda: in_company(distribution))()
    return doubt_of(name, distribution, company)


def doubt_of(name: str, distribution: Any, company: Company) -> Array | np.ndarray:
    """What :func:`require_pointwise` says of energies that were evaluated in company."""
    company = jax.lax.stop_gradient(company)
    if not any(isinstance(value, jax.core.Tracer) for value in company):
        require_equal(name, distribution, company)
        return np.zeros(())  # NumPy's number: JAX's would be traced here

    precision = float(jnp.finfo(jnp.result_type(float)).eps)
    differ = [
        jnp.any(_differ(company, found, precision))
        for found in (company.others, company.alone)
    ]
    return jnp.where(differ[0] | differ[1], jnp.nan, 0.0)


def require_no_rows(name: str, distribution: Any, *, traced: bool = True) -> None:
    """Refuse an energy that has an entry per row: of one value it returns as many
    numbers as there are rows.

    Args:
        name: The site's.
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.
        traced: Find shapes by tracing; False evaluates the energy.

    Raises:
        ValueError: The message says how many.
    """
    distribution.require_built_shapes()
    event_shape = distribution.batch_shape + distribution.event_shape
    value = jax.ShapeDtypeStruct((1, *event_shape), _dtype(distribution))
    for factor, energy in distribution.factors.items():
        if traced:
            # A fresh function: JAX would remember what an energy object returned before
            # it changed.
            shape = jnp.shape(jax.eval_shape(lambda v, energy=energy: energy(v), value))
        else:
            shape = jnp.shape(energy(_typical_points(distribution)[:1]))
        if shape[:1] != (1,) and shape[1:] == distribution.batch_shape and shape:
            raise ValueError(
                f"Energy factor '{factor}' at site '{name}' returned {shape[0]} "
                "numbers for one value: it depends on "
                f"the row, through an array with {shape[0]} entries that it closes "
                "over (covariates?). Every row then "
                "has a normaliser of its own: give the base the rows' batch shape, "
                f"base.expand([{shape[0]}]), and "
                f"return (..., {shape[0]})."
            )


def require_equal(name: str, distribution: Any, company: Company) -> None:
    """Raise where the same point has two energies."""
    for found, what in (
        (company.others, "among fewer in another order"),
        (company.alone, "alone"),
    ):
        wrong = np.argwhere(
            _differ(company, found, float(jnp.finfo(jnp.result_type(float)).eps))
        )
        if len(wrong):
            # Halves round more coarsely, which only the energy's program tells.
            wrong = np.argwhere(_differ(company, found, _precision(distribution)))
        if not len(wrong):
            continue
        first = tuple(wrong[0])
        raise ValueError(
            f"The energy at site '{name}' is no function of one value: of the same "
            "value it is "
            f"{company.together[first]:.6g} among {len(company.together)} values and "
            f"{found[first]:.6g} {what}. "
            "Either rows see each other (a mean, a standard deviation or a maximum "
            "over the leading axis, batch "
            "norm): reduce over event axes alone, or use layer norm. Or the energy "
            "depends on the row (an array with "
            "one entry per row): give the base the rows' batch shape, base.expand([n])."
        )


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
    """Points near the middle of the base (or start), where energies differ but are not huge."""
    base, start, key = distribution.base, distribution.start, random.key(0)
    for proper in (base, start):
        if proper is not None and not is_improper(proper):
            return proper.sample(key, (NUM_POINTS,))
    return points_in_support(base, key, NUM_POINTS)
