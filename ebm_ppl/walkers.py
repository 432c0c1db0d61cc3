"""The walkers of one energy site, and their reweighting at new parameters."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.annealing import Ensemble, unmoved
from ebm_ppl.certificate import Pass, pass_of
from ebm_ppl.distribution import EnergyDistribution, potential_at
from ebm_ppl.kernels import KernelState
from ebm_ppl.model import BoundModel, Params
from ebm_ppl.placement import SiteAtParams
from ebm_ppl.weights import (
    conditional_ess_fraction,
    jackknife_log_mean_exp,
    pooled_ess_fraction,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ensemble", "step_size", "transform", "gradient"],
    meta_fields=["num_holdout_chains"],
)
@dataclass(frozen=True)
class Walkers:
    """The walkers of one energy site.

    Held-out islands are the last ``num_holdout_chains``.

    Attributes:
        ensemble: Positions (base-standard coordinates), potentials, log weights and
            past log normalisers.
        step_size: Langevin step h, of the site's batch shape.
        transform: The map T from positions to values, frozen at the initial parameters.
        gradient: ∇θ log Z from the training islands, a tree like the parameters; None
            where the site has a batch shape, since each log normaliser then enters the
            loss separately.
    """

    ensemble: Ensemble
    step_size: Array
    transform: Transform
    gradient: Params | None
    num_holdout_chains: int

    @property
    def values(self) -> Array:
        """Walkers x, ``(num_chains, num_walkers, *batch_shape, *event_shape)``."""
        return self.transform(self.ensemble.position)

    @property
    def log_weight(self) -> Array:
        """Log weights A, of shape ``(num_chains, num_walkers, *batch_shape)``."""
        return self.ensemble.log_weight

    @property
    def num_training_chains(self) -> int:
        """Number of islands that enter the gradient."""
        return self.ensemble.log_weight.shape[0] - self.num_holdout_chains

    def log_normalizer(self) -> tuple[Array, Array]:
        """Held-out log Z and its jackknife standard error, each of the batch shape."""
        return jackknife_log_mean_exp(
            self.ensemble.log_normalizers[self.num_training_chains :]
        )

    def held_out(self) -> Pass:
        """The held-out islands as a :class:`Pass`, for the certificate."""
        split = self.num_training_chains
        ensemble = jax.tree.map(lambda leaf: leaf[split:], self.ensemble)
        return pass_of(ensemble, unmoved(jnp.ones(self.log_weight.shape[2:])))

    def training_log_normalizer(self) -> Array:
        """Log Z from the training islands, biased because they drive the updates."""
        islands = self.ensemble.log_normalizers[: self.num_training_chains]
        return (
            islands[0]
            if self.num_training_chains == 1
            else jackknife_log_mean_exp(islands)[0]
        )

    def ess(self) -> tuple[Array, Array]:
        """ESS fractions of training and held-out islands, each of the batch shape."""
        split = self.num_training_chains
        return pooled_ess_fraction(self.log_weight[:split]), pooled_ess_fraction(
            self.log_weight[split:]
        )

    def is_usable(self) -> Array:
        """Whether the gradient and the log Ẑ of every island are finite."""
        usable = jnp.all(jnp.isfinite(self.ensemble.log_normalizers))
        return (
            usable
            if self.gradient is None
            else usable & jnp.isfinite(optax.tree.norm(self.gradient))
        )


def training_mean_potential(
    walkers: Walkers, distribution: EnergyDistribution
) -> Array:
    """Mean potential ``mean_c Σ_i w_ci U_θ(X_ci)`` over training islands.

    Walkers and weights are held fixed, so its negative gradient is ∇θ log Z.
    """
    split = walkers.num_training_chains
    weight = jax.nn.softmax(walkers.log_weight[:split], axis=1) / split
    potential = distribution.potential(
        walkers.transform(walkers.ensemble.position[:split])
    )
    # A walker outside the energy's domain has weight 0 and potential inf.
    return jnp.sum(weight * jnp.where(weight > 0, potential, 0.0), axis=(0, 1))


@jax.jit
def initial_gradient(site: SiteAtParams, walkers: Walkers) -> Params:
    """∇θ log Z at the site's parameters, before the first update has saved one."""

    def mean_potential(params: Params) -> Array:
        return -training_mean_potential(walkers, site.bound.energies(params)[site.name])

    return jax.grad(mean_potential)(site.params)


def merge_islands(value: Array) -> Array:
    """Merge the axes ``(num_chains, num_walkers)`` of an array into one."""
    return value.reshape(-1, *value.shape[2:])


def switch(
    bound: BoundModel, name: str, params: Params, walkers: Walkers
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
    evaluated = KernelState(position, potential, grad)

    # Reweight
    potential = potential.reshape(ensemble.potential.shape)
    alive = ensemble.log_weight > -jnp.inf
    increment = jnp.where(alive, ensemble.potential - potential, -jnp.inf)
    log_weight = jnp.where(alive, ensemble.log_weight + increment, -jnp.inf)
    ess = conditional_ess_fraction(ensemble.log_weight[:split], increment[:split])

    # Gradient
    gradient = walkers.gradient
    if gradient is not None:
        weight = jax.nn.softmax(log_weight[:split], axis=1) / split
        (gradient, _) = pull(
            -merge_islands(
                jnp.concatenate([weight, jnp.zeros_like(log_weight[split:])])
            )
        )

    ensemble = ensemble._replace(potential=potential, log_weight=log_weight)
    return replace(walkers, ensemble=ensemble, gradient=gradient), evaluated, ess
