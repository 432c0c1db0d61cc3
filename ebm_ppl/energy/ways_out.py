"""What to do where an energy's normaliser is unknown, the easiest first."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.energy.guard import depends_on_traced
from ebm_ppl.energy.states import states

POINT = "A point estimate needs no log Z: ebm_ppl.Jarzynski(model, ...)."
KNOWN = (
    "One that is known goes in: EnergyDistribution(energy, base, log_normalizer=...)."
)
CONSTANT = (
    "Where its parameters are fixed and the site is a latent, any constant serves: "
    "EnergyDistribution(energy, base, log_normalizer=0.0)."
)


def ways_out(distribution: Any, name: str | None) -> str:
    """Sentences on how this energy's normaliser becomes known.

    Args:
        distribution: An :class:`~ebm_ppl.EnergyDistribution`.
        name: Its site's name, where that is known.
    """
    last = KNOWN if _has_traced_parameters(distribution) else CONSTANT
    return f"{_by_size(distribution, name)} {last}"


def _by_size(distribution: Any, name: str | None) -> str:
    num_dims = math.prod(distribution.event_shape)
    if distribution.support.is_discrete:
        if _is_enumerable(distribution, name):
            return (
                "Its states are few: ebm_ppl.normalized(model) sums them inside the "
                "model, for NUTS, SVI and log_likelihood."
            )
        return (
            "Sum it by hand and give EnergyDistribution(..., log_normalizer=...), or "
            "take a base with fewer states."
        )

    if num_dims <= 2:
        return (
            f"It has {num_dims} dimension{'s' * (num_dims > 1)}: ebm_ppl.normalized(model) "
            f"integrates it inside the model, for NUTS, SVI and log_likelihood. {POINT}"
        )
    return (
        "Fit its parameters with ebm_ppl.Jarzynski(model, ...); then log_z = "
        "ebm_ppl.log_normalizer(rng_key, model, fit, ...) and "
        "ebm_ppl.normalized(model, log_z)."
    )


def _is_enumerable(distribution: Any, name: str | None) -> bool:
    try:
        jax.eval_shape(lambda: states(distribution.base, name))
    except ValueError:
        return False
    return True


def _has_traced_parameters(distribution: Any) -> bool:
    """Whether parameters of the energy or its base are being learned or sampled."""
    number = int if distribution.support.is_discrete else float
    shape = distribution.batch_shape + distribution.event_shape
    value = jax.ShapeDtypeStruct(shape, jnp.result_type(number))
    try:
        return depends_on_traced(distribution.unchecked_potential, value)
    except Exception:  # an energy that fails has an error of its own
        return True
