"""log Z of one site by weighted draws of its start."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ebm_ppl.smc.weights import ess_fraction, log_mean_exp


class Normalizer(NamedTuple):
    """log Z of one site by weighted draws; arrays of the batch shape.

    Attributes:
        estimate: log of the mean weight.
        stderr: Its standard error, from the weights' spread.
        ess: ESS fraction.
    """

    estimate: Array
    stderr: Array
    ess: Array


def normalizer_of(log_weight: Array) -> Normalizer:
    """From log weights of shape ``(num_draws, *batch)``."""
    ess = ess_fraction(log_weight, axis=0)
    stderr = jnp.sqrt(jnp.maximum(1.0 / ess - 1.0, 0.0) / log_weight.shape[0])
    return Normalizer(log_mean_exp(log_weight, axis=0), stderr, ess)
