"""The switch of walkers from one set of parameters to the next."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.energy.start import potential_at
from ebm_ppl.kernels.base import Kernel, KernelState
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.smc.weights import conditional_ess_fraction
from ebm_ppl.walkers.state import Walkers


def merge_islands(value: Array) -> Array:
    """Merge the axes ``(num_chains, num_walkers)`` of an array into one."""
    return value.reshape(-1, *value.shape[2:])


def switch(
    kernel: Kernel, bound: BoundModel, name: str, params: Params, walkers: Walkers
) -> tuple[Walkers, KernelState, Array]:
    """Reweight walkers at new parameters: ``A += U_θ(X) − U_θ'(X)`` at fixed X.

    One forward pass gives the weights, ∇ₓ for the move and ∇θ log Z.

    Returns:
        The reweighted walkers, their kernel state under θ' (islands merged) and the
        training islands' conditional ESS.
    """
    ensemble, split = walkers.ensemble, walkers.num_training_chains

    def potential_of(params: Params, position: Array) -> Array:
        return potential_at(bound.energies(params)[name], walkers.transform, position)

    # Evaluate; islands are merged into one leading dimension, because XLA reduces and
    # stores three dimensions less well.
    position = merge_islands(ensemble.position)
    potential, pull = jax.vjp(potential_of, params, position)
    (_, grad) = pull(jnp.ones_like(potential))
    evaluated = KernelState(position, potential, grad if kernel.uses_gradient else ())

    # Reweight
    potential = potential.reshape(ensemble.potential.shape)
    alive = ensemble.log_weight > -jnp.inf
    increment = jnp.where(alive, ensemble.potential - potential, -jnp.inf)
    log_weight = jnp.where(alive, ensemble.log_weight + increment, -jnp.inf)
    ess = conditional_ess_fraction(ensemble.log_weight[:split], increment[:split])

    ensemble = ensemble._replace(potential=potential, log_weight=log_weight)
    walkers = replace(walkers, ensemble=ensemble)

    # Gradient
    if walkers.gradient is not None:
        held_out = jnp.zeros_like(log_weight[split:])
        weight = jnp.concatenate([walkers.training_weights(), held_out])
        (gradient, _) = pull(-merge_islands(weight))
        walkers = replace(walkers, gradient=gradient)
    return walkers, evaluated, ess
