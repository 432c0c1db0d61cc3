"""The walkers of one energy site, and their reweighting at new parameters."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.kernels.base import Tuning
from ebm_ppl.model.program import Params
from ebm_ppl.smc.ensemble import Ensemble, unmoved
from ebm_ppl.smc.passes import Pass, pass_of
from ebm_ppl.smc.weights import jackknife_log_mean_exp, pooled_ess_fraction
from ebm_ppl.walkers.site import SiteAtParams

# Nats from the islands' median beyond which log Z gives an island no more weight, or no
# less: what walkers learn of themselves moves it, and none may speak for all.
MAX_LEAN = 1.0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ensemble", "tuning", "transform", "gradient"],
    meta_fields=["num_holdout_chains"],
)
@dataclass(frozen=True)
class Walkers:
    """The walkers of one energy site.

    Held-out islands are the last ``num_holdout_chains``.

    Attributes:
        ensemble: Positions (base-standard coordinates), potentials, log weights and
            past log normalisers.
        tuning: The kernel's tuning: Langevin steps' size h, of the site's batch shape.
        transform: The map T from positions to values, frozen at the initial parameters.
        gradient: ∇θ log Z from the training islands, a tree like the parameters; None
            where the site has a batch shape, since each log normaliser then enters the
            loss separately.
    """

    ensemble: Ensemble
    tuning: Tuning
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

    def is_training(self) -> Array:
        """Which islands enter the gradient, ``(num_chains,)``."""
        return jnp.arange(self.log_weight.shape[0]) < self.num_training_chains

    def training_weights(self) -> Array:
        """The training walkers' weights in the gradient, ``(num_training, ...)``.

        An island counts by its Ẑ, as a walker does by its weight: the mean is then a
        ratio of two unbiased estimates, while equal islands would keep the bias of a
        single one.  Weights sum to one over islands and walkers.
        """
        split = self.num_training_chains
        log_z = self.ensemble.log_normalizers[:split]
        lean = jnp.clip(log_z - jnp.median(log_z, axis=0), -MAX_LEAN, MAX_LEAN)
        within = jax.nn.softmax(self.log_weight[:split], axis=1)
        return jax.nn.softmax(lean, axis=0)[:, None] * within

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
    """Mean potential ``Σ_ci w_ci U_θ(X_ci)`` over training islands.

    Walkers and weights are held fixed, so its negative gradient is ∇θ log Z.
    """
    weight = walkers.training_weights()
    potential = distribution.potential(
        walkers.transform(walkers.ensemble.position[: walkers.num_training_chains])
    )
    # A walker outside the energy's domain has weight 0 and potential inf.
    return jnp.sum(weight * jnp.where(weight > 0, potential, 0.0), axis=(0, 1))


@jax.jit
def initial_gradient(site: SiteAtParams, walkers: Walkers) -> Params:
    """∇θ log Z at the site's parameters, before the first update has saved one."""

    def mean_potential(params: Params) -> Array:
        return -training_mean_potential(walkers, site.bound.energies(params)[site.name])

    return jax.grad(mean_potential)(site.params)
