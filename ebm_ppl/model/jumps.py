"""Check that no parameter moves a jump of an energy.

Where the energy jumps at a point that a parameter moves, the derivative in that
parameter lacks the jump: autodiff never sees it, and a fit would stand still, or go
astray, with every diagnostic in order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import is_improper, points_in_support
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.model.repeatable import moved_along, random_direction

# Steps relative to the parameters, the second a fifth of the first: what is left beside
# a linear change falls to 4% where the energy is smooth, to 20% at a kink, and stays
# where it jumps.
LONG, SHORT = 0.1, 0.02
MAX_LEFT = 0.5
# A third step, a twentieth of the second: what is left falls to 1/400 where the
# derivative is right, and to 1/20 where it is not.
TINY = 0.001
MAX_LEFT_TINY = 1 / 40
# In nats: smaller jumps do not matter.
SMALLEST = 0.02
# Slopes that explain a change over the short step, times this, are no jump.
STEEP = 3.0
# JAX's operations that jump, or whose derivative is not theirs.
STEPS = frozenset(
    "lt gt le ge eq ne select_n floor ceil round sign argmax argmin rem stop_gradient "
    "cond while is_finite pure_callback custom_vjp_call nextafter".split()
)
MAX_POINTS, MIN_POINTS, MAX_ELEMENTS = 4_096, 8, 2**18


def check_no_moving_jump(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    found: dict[str, EnergyDistribution],
) -> None:
    """Refuse an energy whose jumps, or infinite regions, move with a parameter.

    ``found`` holds the energies at ``params``.

    Raises:
        ValueError: The message names the site and the parameters.
    """
    if not _may_jump(bound, params, found):
        return
    jumps = _jumps(bound, params, rng_key, None)
    for name in found:
        if not bool(jumps[name]):
            continue
        movers = [
            site for site in params if bool(_jumps(bound, params, rng_key, site)[name])
        ]
        named = ", ".join(f"'{site}'" for site in movers) or "the parameters"
        raise ValueError(
            f"The energy at site '{name}' jumps at points that {named} moves (a "
            "comparison, rounding, argmax or stop_gradient of a parameter, or a region "
            "of infinite energy): its derivative lacks the jump, so that no gradient "
            "finds the maximum. Make the step smooth, such as jax.nn.sigmoid((x - c) / "
            "width), or fix that parameter."
        )


def _may_jump(
    bound: BoundModel, params: Params, found: dict[str, EnergyDistribution]
) -> bool:
    """Whether the energies contain any operation that could jump.

    Tracing them takes a fiftieth of the time of compiling them.
    """
    points = {
        name: jax.ShapeDtypeStruct(
            (2, *energy.batch_shape, *energy.event_shape),
            jnp.result_type(int if energy.support.is_discrete else float),
        )
        for name, energy in found.items()
    }

    program = jax.make_jaxpr(_potentials)(bound, params, points)
    return _has_steps(program.jaxpr)


def _potentials(
    bound: BoundModel, params: Params, points: dict[str, Array]
) -> dict[str, Array]:
    energies = bound.energies(params)
    return {name: energies[name].unchecked_potential(x) for name, x in points.items()}


def _has_steps(jaxpr: Any) -> bool:
    """Whether a program, or one inside it, has operations with steps."""
    for equation in jaxpr.eqns:
        name, new = equation.primitive.name, equation.params.get("new_dtype")
        is_rounded = new is not None and not jnp.issubdtype(new, jnp.floating)
        if name in STEPS or is_rounded:
            return True
        inner = [
            getattr(part, "jaxpr", part)
            for value in equation.params.values()
            for part in (value if isinstance(value, list | tuple) else [value])
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ]
        if any(_has_steps(body) for body in inner):
            return True
    return False


def _jumps(
    bound: BoundModel, params: Params, rng_key: Array, only: str | None
) -> dict[str, Array]:
    """Whether each site's energy jumps as parameters move, or one site's alone."""
    direction = random_direction(rng_key, params)
    if only is not None:
        direction = {
            name: tree if name == only else jax.tree.map(jnp.zeros_like, tree)
            for name, tree in direction.items()
        }
    return _jumps_along(bound, params, direction, rng_key)


@jax.jit
def _jumps_along(
    bound: BoundModel, params: Params, direction: Params, rng_key: Array
) -> dict[str, Array]:
    points = {
        name: _points(energy, rng_key)
        for name, energy in bound.energies(params).items()
    }

    def potentials(length: Array) -> dict[str, Array]:
        return _potentials(bound, moved_along(params, direction, length), points)

    def along(length: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        return jax.jvp(potentials, (length,), (jnp.ones_like(length),))

    # One compiled body for all lengths
    lengths = (0.0, LONG, SHORT, TINY)
    found, slopes = lax.map(along, jnp.array(lengths))
    return {
        name: _is_wrong(slopes[name][0], dict(zip(lengths, found[name], strict=True)))
        for name in points
    }


def _is_wrong(slope: Array, there: dict[float, Array]) -> Array:
    """Whether the energy jumps along the way, or its slope is not its derivative.

    ``there`` holds the energies after steps of each length, 0 among them.
    """
    here = there[0.0]
    eps = jnp.finfo(here.dtype).eps
    slope = jnp.where(jnp.isfinite(slope), slope, 0.0)

    def left(length: float) -> Array:
        """The changes beside the linear ones, without rounding."""
        after = there[length]
        rest = jnp.abs(after - here - length * slope)
        rest = rest - 64 * eps * (jnp.abs(here) + jnp.abs(after))
        return jnp.where(jnp.isfinite(rest), jnp.maximum(rest, 0.0), 0.0)

    # Jumps, at a few points
    largest = {length: jnp.max(left(length), initial=0.0) for length in there}
    steepest = jnp.max(jnp.abs(slope), initial=0.0)
    is_jump = (
        (largest[SHORT] > SMALLEST)
        & (largest[SHORT] > MAX_LEFT * largest[LONG])
        & (largest[SHORT] > STEEP * SHORT * steepest)
    )
    is_wall = jnp.any(jnp.isfinite(here) != jnp.isfinite(there[SHORT]))

    # A slope that is wrong, at most points where the energy changes
    changes = left(SHORT) > SHORT * SMALLEST
    is_off = changes & (left(TINY) > MAX_LEFT_TINY * left(SHORT))
    return is_jump | is_wall | (jnp.sum(is_off) > 0.5 * jnp.sum(changes))


def _points(energy: EnergyDistribution, rng_key: Array) -> Array:
    size = math.prod(energy.batch_shape + energy.event_shape)
    num = min(max(MAX_ELEMENTS // max(size, 1), MIN_POINTS), MAX_POINTS)
    start = energy.base if energy.start is None else energy.start
    if is_improper(start):
        return points_in_support(energy.base, rng_key, num)
    return start.sample(rng_key, (num,))
