"""A base's draws and its log density, each as one program."""

import numpyro
import numpyro.distributions as dist
from jax import Array

from ebm_ppl.programs.one_program import one_program


@one_program(static_argnums=(2,))
def draws_of(base: dist.Distribution, rng_key: Array, num: int) -> Array:
    """``base.sample(rng_key, (num,))``."""
    return base.sample(rng_key, (num,))


@one_program()
def unchecked_log_prob(base: dist.Distribution, value: Array) -> Array:
    """``base.log_prob`` without NumPyro's support checks.

    Every level of a nested distribution would repeat them.
    """
    with numpyro.validation_enabled(False):
        return base.log_prob(value)
