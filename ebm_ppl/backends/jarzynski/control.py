"""The loss of an update, and the switch of the walkers to the updated parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.kernels.base import Kernel, KernelState
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.walkers.state import Walkers, training_mean_potential
from ebm_ppl.walkers.switch import switch


def negative_log_joint(
    bound: BoundModel, walkers: dict[str, Walkers], params: Params
) -> Array:
    """Negative log joint with an estimated log Z.

    The value of log Z comes from the held-out islands, its gradient from the training
    islands.
    """

    def normalize(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
        site = walkers[name]
        value = lax.stop_gradient(site.log_normalizer()[0])
        if site.gradient is None:
            surrogate = training_mean_potential(site, distribution)
            return distribution.with_log_normalizer(
                value - surrogate + lax.stop_gradient(surrogate)
            )

        # <∇log Z, θ> with the value removed: its derivative is the saved gradient.
        displacement = jax.tree.map(lambda p: p - lax.stop_gradient(p), params)
        return distribution.with_log_normalizer(
            value + optax.tree.vdot(site.gradient, displacement)
        )

    return bound.negative_log_joint(params, normalize)


class Switched(NamedTuple):
    """Parameters after an update, and the walkers reweighted to them.

    Attributes:
        scale: Factor on the update.
        params: The new parameters.
        walkers: Reweighted to them.
        evaluated: Kernel states of the walkers at ``params``, islands merged.
    """

    scale: Array
    params: Params
    walkers: dict[str, Walkers]
    evaluated: dict[str, KernelState]


def controlled_switch(
    kernel: Kernel,
    bound: BoundModel,
    params: Params,
    walkers: dict[str, Walkers],
    updates: Params,
    update_scale: Array,
    ess_target: float | None,
) -> Switched:
    """Apply the update, scaled so that the conditional ESS stays near its target.

    The conditional ESS is that of the training walkers, the lowest over all sites and
    batch elements.
    """

    def attempt(scale: Array) -> tuple[Switched, Array]:
        scaled = jax.tree.map(lambda u: scale * u, updates)
        new = optax.apply_updates(params, scaled)
        switched = {
            name: switch(kernel, bound, name, new, w) for name, w in walkers.items()
        }
        ess = jnp.min(jnp.stack([jnp.min(ess) for _, _, ess in switched.values()]))

        reweighted = {name: w for name, (w, _, _) in switched.items()}
        evaluated = {name: e for name, (_, e, _) in switched.items()}
        return Switched(scale, new, reweighted, evaluated), ess

    if ess_target is None:
        return attempt(jnp.ones_like(update_scale))[0]

    recovered = jnp.minimum(1.0, 1.01 * update_scale)
    first, ess = attempt(recovered)
    shrink = jnp.sqrt((1.0 - ess_target) / (1.0 - ess)).astype(recovered.dtype)
    return lax.cond(
        ess < ess_target, lambda: attempt(recovered * shrink)[0], lambda: first
    )
