"""Draws of an energy's start, weighted into draws of the energy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.start import starting_distribution
from ebm_ppl.energy.unnormalized import Unnormalized


class WeightedDraws(NamedTuple):
    """Draws of a start, whose weights have the mean Z.

    Attributes:
        values: ``(*shape, *batch, *event)``.
        log_weight: ``(*shape, *batch)``.
    """

    values: Array
    log_weight: Array


def weighted_draws(
    rng_key: Array, name: str, energy: Unnormalized, shape: tuple[int, ...]
) -> WeightedDraws:
    """Fresh draws of the start, with log weights ``−U − log start``.

    The weights' derivative in the parameters is that of −U alone, whatever the start:
    the draws are those of the present one.
    """
    start = starting_distribution(energy, name)
    values = lax.stop_gradient(start.sample(rng_key, shape))
    if energy.start is None:
        # The base cancels, but for its derivative where it has parameters.
        own = _slope_of(unchecked_log_prob(start, values))
        return WeightedDraws(values, own - energy.energy(values))
    density = lax.stop_gradient(unchecked_log_prob(start, values))
    return WeightedDraws(values, -energy.unchecked_potential(values) - density)


@jax.custom_jvp
def _slope_of(value: Array) -> Array:
    """Zeros with the derivative of ``value``, which is then computed only if it has one."""
    return jnp.zeros_like(value)


@_slope_of.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return jnp.zeros_like(primals[0]), tangents[0]
