"""The gradient penalty."""

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution


def with_penalty(
    distribution: EnergyDistribution, transform: Transform, weight: float
) -> EnergyDistribution:
    """The energy plus ``½ weight ‖∇E‖²``, the gradient in base-standard coordinates."""

    def penalized(values: Array) -> Array:
        energy, pull = jax.vjp(distribution.energy, values)
        _, pull_transform = jax.vjp(transform, transform.inv(values))
        (grad,) = pull_transform(*pull(jnp.ones_like(energy)))
        return energy + 0.5 * weight * jnp.sum(
            grad.reshape(len(energy), -1) ** 2, axis=1
        )

    return EnergyDistribution(
        penalized,
        distribution.base,
        start=distribution.start,
        validate_args=distribution._validate_args,
    )
