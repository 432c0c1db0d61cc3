"""Energies between two bounds, of which log Z is known by draws of the base alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from ebm_ppl.programs.snapshot import Snapshot


@dataclass(frozen=True)
class Bounded:
    """``c tanh(E / c)`` of an energy E; see :func:`bounded`."""

    energy: Callable[..., Array]
    bound: float

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The bounded energy of values, of E's shape."""
        return self.bound * jnp.tanh(self.energy(*args, **kwargs) / self.bound)


def bounded(energy: Callable[[Array], Array], bound: float) -> Callable[[Array], Array]:
    r"""An energy that stays between −c and c, ``c tanh(E(x) / c)``.

    Near 0 it is E itself.  Its weights :math:`e^{-E}` lie in :math:`[e^{-c}, e^c]`, so
    that the error of log Z by n draws of the base is known before any is made, at most
    :math:`\sinh(c) / \sqrt n`, and :math:`\sqrt{e^c / (n Z)}` at a given Z; no well can
    hide outside the draws' reach, since none holds more than :math:`e^c` times its
    mass under the base.  ``log_normalizer(..., method="base")`` certifies log Z by that.

    Args:
        energy: A callable as :class:`EnergyDistribution` takes it.  Of several named
            factors each is bounded by itself, and the bounds add up.
        bound: c, in nats, over 0.  The density ratio to the base is at most
            :math:`e^{2c}`; 5 has served data of 10 to 64 dimensions on mixtures.

    Raises:
        TypeError: ``energy`` is not callable, or ``bound`` no number.
        ValueError: ``bound`` is not positive and finite.
    """
    if isinstance(energy, Mapping):
        raise TypeError(
            "energy is a mapping of factors; bound each by itself, "
            "{'pair': ebm_ppl.bounded(pair, 3.0), ...}: the bounds add up."
        )
    if not callable(energy):
        raise TypeError(
            f"energy is a {type(energy).__name__}; expected a callable E(x)."
        )
    try:
        bound = float(bound)
    except TypeError:
        raise TypeError(
            f"bound is a {type(bound).__name__}; expected a number that is known before "
            "the model runs, such as 5.0."
        ) from None
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"bound = {bound}; expected a positive number of nats.")

    # Arrays of a Partial stay leaves.
    if isinstance(energy, Partial):
        return Partial(Bounded(energy.func, bound), *energy.args, **energy.keywords)
    return Bounded(energy, bound)


def bound_of(factors: Mapping[str, Any]) -> float | None:
    """The bound of a sum of factors; None where one has none."""
    total = 0.0
    for factor in factors.values():
        energy = factor.func.fn if isinstance(factor.func, Snapshot) else factor.func
        if not isinstance(energy, Bounded):
            return None
        total += energy.bound
    return total
