"""The mean log density of a model's rows, and how many rows that are."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ebm_ppl.energy.distribution import unwrap
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.masks import unmasked_rows
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.rows import observed_rows


def mean_log_density(
    bound: BoundModel, params: Params, log_z: LogNormalizer
) -> tuple[float, float]:
    """Mean log density of a row, and its standard error from that of log Z.

    Args:
        bound: The model, of constrained parameters.
        params: The parameters.
        log_z: By site.
    """
    value, counts = _value_and_counts(bound, params, log_z.estimate)
    size = num_rows(bound, params, counts)
    error = sum(
        float(jnp.sum(count * log_z.stderr[name])) for name, count in counts.items()
    )
    return -float(value) / size, error / size


def num_rows(bound: BoundModel, params: Params, counts: Mapping[str, Any]) -> float:
    """Rows of the site that has most: of energies as scales and masks count them.

    Args:
        bound: The model, of constrained parameters.
        params: The parameters.
        counts: How often every log Z enters, by energy site.
    """
    sizes = []
    for name, found in observed_rows(bound, params).items():
        wrapped = found.distribution
        energy = unwrap(wrapped)
        if energy is None or name not in counts:
            sizes.append(float(np.sum(unmasked_rows(wrapped))))
            continue
        # A row has several log Z's where an event holds elements of their own.
        of_row = math.prod(wrapped.event_shape) / math.prod(energy.event_shape)
        sizes.append(float(np.sum(counts[name])) / of_row)
    return max(sizes)


def counts_of(
    bound: BoundModel, params: Params, estimates: dict[str, Array]
) -> dict[str, float]:
    """How often log Z enters the likelihood of the data, which every site has.

    Args:
        bound: The model, of constrained parameters.
        params: The parameters.
        estimates: Log Z by energy site.
    """
    counts = _counts(bound, params, estimates)
    return {name: float(jnp.sum(count)) for name, count in counts.items()}


def _negative_log_joint(
    estimates: dict[str, Array], bound: BoundModel, params: Params
) -> Array:
    return bound.negative_log_joint(
        params, lambda name, energy: energy.with_log_normalizer(estimates[name])
    )


@jax.jit
def _value_and_counts(
    bound: BoundModel, params: Params, estimates: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """The negative log joint, and how often every log Z enters it."""
    return jax.value_and_grad(_negative_log_joint)(estimates, bound, params)


@jax.jit
def _counts(
    bound: BoundModel, params: Params, estimates: dict[str, Array]
) -> dict[str, Array]:
    """The counts alone: no energy is computed for them."""
    return jax.grad(_negative_log_joint)(estimates, bound, params)
