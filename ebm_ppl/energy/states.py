"""Discrete bases: mass functions, and the states of finite supports.

A bijection of a discrete base (coins to spins −1 and 1) only relabels its states: it
has a mass function, without the Jacobian of ``TransformedDistribution``.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from ebm_ppl.energy.mass_function import Renamed
from ebm_ppl.energy.wrappers import elementwise
from ebm_ppl.errors import at_site

MAX_STATES = 2**22


def states(base: dist.Distribution, name: str | None = None) -> Array:
    """Every state of a finite support, ``(num_states, *batch_shape, *event_shape)``.

    With unequal bounds, some of these states lie outside the support of some batch
    elements or coordinates.

    Raises:
        ValueError: The support is not finite, or has more than 2²² states.
    """
    shape = base.batch_shape + base.event_shape
    return _states(base.support, shape, len(base.batch_shape), name)


def states_in_support(
    base: dist.Distribution, support: Any, name: str | None = None
) -> tuple[Array, Array]:
    """Every state, and whether it has mass, ``(num_states, *batch_shape)``.

    With unequal bounds, one of the support stands in the place of those outside, where
    an energy need not be defined.
    """
    every = states(base, name)
    event_ndims = len(base.event_shape)
    inside = jnp.broadcast_to(support(every), every.shape[: every.ndim - event_ndims])
    return _inside_alone(every, inside), inside


@jax.jit
def _inside_alone(every: Array, inside: Array) -> Array:
    ones = (1,) * (every.ndim - inside.ndim)
    first = jnp.argmax(inside, axis=0)
    valid = jnp.take_along_axis(every, first.reshape(1, *first.shape, *ones), axis=0)
    return jnp.where(inside.reshape(*inside.shape, *ones), every, valid)


def in_blocks(log_value: Array) -> Array:
    """Values of all states in blocks, ``(num_blocks, width, ...)``, −inf in the last.

    About as many as they are long: rounding grows with the terms of one sum.
    """
    count = len(log_value)
    width = 2 ** math.ceil(math.log2(max(count, 1)) / 2)
    missing = ((0, -count % width), *((0, 0),) * (log_value.ndim - 1))
    padded = jnp.pad(log_value, missing, constant_values=-jnp.inf)
    return padded.reshape(-1, width, *log_value.shape[1:])


def _states(
    support: Any, shape: tuple[int, ...], batch_ndims: int, name: str | None
) -> Array:
    inner = elementwise(support)
    if isinstance(inner, Renamed):
        original = _states(
            inner.original, inner.transform.inverse_shape(shape), batch_ndims, name
        )
        return inner.transform(original)

    atoms = _atoms(inner, shape, name)
    event_shape = shape[batch_ndims:]
    num_elements = math.prod(event_shape[: len(event_shape) - (atoms.ndim - 1)])
    size = len(atoms)
    if size**num_elements > MAX_STATES:
        raise ValueError(_too_many(f"{size}^{num_elements}", name))

    return _combinations(jnp.asarray(atoms), num_elements, shape, batch_ndims)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _combinations(
    atoms: Array, num_elements: int, shape: tuple[int, ...], batch_ndims: int
) -> Array:
    """All combinations of the atoms in ``num_elements`` places, ``(num, *shape)``."""
    size = len(atoms)
    places = size ** np.arange(num_elements)
    digits = (jnp.arange(size**num_elements)[:, None] // places) % size
    found = atoms[digits].reshape(-1, *(1,) * batch_ndims, *shape[batch_ndims:])
    return jnp.broadcast_to(found, (len(found), *shape))


def _atoms(support: Any, shape: tuple[int, ...], name: str | None) -> np.ndarray:
    """Values of one element or, for counts with a total, of one count vector."""
    if support is constraints.boolean:
        return np.arange(2)

    bounds: list[Any] = [
        getattr(support, end, None) for end in ("lower_bound", "upper_bound")
    ]
    is_interval = isinstance(support, type(constraints.integer_interval(0, 1)))
    is_counts = isinstance(support, type(constraints.multinomial(1)))
    if not (is_interval or is_counts):
        raise ValueError(not_enumerable(support, name))

    if any(isinstance(bound, jax.core.Tracer) for bound in bounds):
        raise ValueError(
            f"The energy{at_site(name)} has a discrete support whose bounds are "
            f"computed while the model is compiled ({support}), so its states cannot "
            "be listed; expected bounds that are numbers. Give total_count, low and "
            "high as Python or NumPy numbers."
        )

    if is_interval:
        return np.arange(int(np.min(bounds[0])), int(np.max(bounds[1])) + 1)

    totals = np.unique(np.asarray(bounds[1]).astype(int))
    num_states = sum(
        math.comb(total + shape[-1] - 1, shape[-1] - 1) for total in totals.tolist()
    )
    if num_states > MAX_STATES:
        raise ValueError(_too_many(f"{num_states:,}", name))
    return np.concatenate([_counts(total, shape[-1]) for total in totals.tolist()])


def _counts(total: int, size: int) -> np.ndarray:
    """Every vector of ``size`` counts that sum to ``total``."""
    rows, left = np.zeros((1, 0), int), np.array([total])
    for _ in range(size - 1):
        repeats = left + 1
        first = np.repeat(np.cumsum(repeats) - repeats, repeats)
        taken = np.arange(repeats.sum()) - first
        rows = np.concatenate(
            [np.repeat(rows, repeats, axis=0), taken[:, None]], axis=1
        )
        left = np.repeat(left, repeats) - taken

    return np.concatenate([rows, left[:, None]], axis=1)


def _too_many(count: str, name: str | None) -> str:
    return (
        f"The energy{at_site(name)} has {count} states; enumeration serves up to "
        f"{MAX_STATES:,}, and every other method needs a continuous support. What is "
        "left: sum it by hand (transfer matrices, symmetry) and give "
        "EnergyDistribution(..., log_normalizer=...), or a base with fewer states."
    )


def not_enumerable(support: Any, name: str | None) -> str:
    """Message on what to do about a support that is not a finite set."""
    if not support.is_discrete:
        return (
            f"The energy{at_site(name)} has support {support}, which is continuous and "
            "cannot be enumerated; expected a finite discrete one. Use "
            "method='bracket', or 'quadrature' in one or two dimensions."
        )

    return (
        f"The energy{at_site(name)} has a discrete support ({support}) that is not "
        "finite: method='enumeration' sums finite supports, and every other method "
        "needs a continuous one. What is left: truncate it (in place of "
        "dist.Poisson(3.0), "
        "dist.Categorical(logits=dist.Poisson(3.0).log_prob(np.arange(100)))), or sum "
        "it by hand and give EnergyDistribution(..., log_normalizer=...)."
    )


def needs_continuous(base: dist.Distribution, name: str | None, what: str) -> str:
    """Message that ``what`` cannot serve a discrete base, and which method can.

    Enumeration is suggested only where it works.
    """
    try:
        jax.eval_shape(lambda: states(base, name))
    except ValueError as refusal:
        return str(refusal)
    return (
        f"The energy{at_site(name)} has a discrete support ({base.support}); {what} "
        "needs a continuous one. This one is finite, so it can be summed: "
        "method='enumeration', or ebm_ppl.normalized(model)."
    )
