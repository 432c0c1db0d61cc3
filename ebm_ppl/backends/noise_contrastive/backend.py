"""Noise-contrastive estimation: energies, and log Z, learned by telling data from noise."""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import count
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random
from jax.nn import softplus

from ebm_ppl.backends.judged_by_base import judged_by_base
from ebm_ppl.backends.monte_carlo.warnings import MIN_UPDATES
from ebm_ppl.backends.noise_contrastive.state import NoiseContrastiveState
from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.row_loss import RowLoss
from ebm_ppl.energy.start import starting_distribution
from ebm_ppl.energy.weighted_draws import weighted_draws
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.weights import log_mean_exp
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import check_on_params, check_optimizer, updates_of

# Draws by which the first log Z is guessed.
NUM_GUESSES = 1024


@dataclass(frozen=True, eq=False)
class NoiseContrastive(Backend):
    r"""Energies fitted by telling their data from draws of their bases.

    Rows are told from noise, draws y of the base (or ``start``) q, of which there are ν
    times as many.  A row x counts, in the place of its log density,

    .. math::
        \log\sigma(G(x)) + \frac{\nu}{n} \sum_{j\le n} \log\sigma(-G(y_j)), \qquad
        G = -U_\theta - c - \log q - \log\nu,

    where c, which is learned beside θ, ends at log Z: with ever more data, c and θ are
    those of maximum likelihood, at a variance that is the larger the farther the noise
    is from the data.  Plates, scales and masks keep NumPyro's meaning.

    θ and c move together, and slowly where noise and data are far apart; a run that ends
    far from the likelihood's maximum says so.

    What it does not give: an honest log Z.  The learned one has no error and no bound,
    and misses what the noise does not reach; :func:`log_normalizer` certifies one, and
    the export says where the two disagree.

    Args:
        model: A NumPyro model with one or more observed :class:`EnergyDistribution`
            sites of any support.
        optim: An optax gradient transformation, applied to unconstrained parameters.
        num_draws: Draws n of the noise, fresh in every update; of each batch element,
            where an energy has a log Z for each.
        noise_ratio: ν, how many times as much noise as data rows are told from.  The
            larger it is, the nearer the fit is to maximum likelihood.
        log_normalizer_optim: The same for log Z; None takes ``optim``.

    Raises:
        ValueError: An option out of range; an energy has a log Z for each row of a
            subsampled plate, where none can be learned.
        TypeError: An optimiser is not an optax gradient transformation, or searches
            along the loss.

    Source: Gutmann and Hyvärinen (2012), equation 8.
    """

    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (
        LOSS,
        Diagnostic("log_normalizer", by_site=True, label="log Z", spec=".3f"),
        GRAD_NORM,
    )

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    num_draws: int = 1024
    noise_ratio: float = 10.0
    log_normalizer_optim: optax.GradientTransformation | None = None

    def __post_init__(self) -> None:
        check_optimizer("optim", self.optim)
        if self.log_normalizer_optim is not None:
            check_optimizer("log_normalizer_optim", self.log_normalizer_optim)
        if self.num_draws < 2:
            raise ValueError(f"num_draws = {self.num_draws}; expected at least 2.")
        if not 0 < self.noise_ratio < math.inf:
            raise ValueError(
                f"noise_ratio = {self.noise_ratio}; expected a positive number."
            )

    @property
    def _own_optim(self) -> optax.GradientTransformation:
        return self.log_normalizer_optim or self.optim

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> NoiseContrastiveState:
        """Parameters, checked with the model on its data, and a guess of log Z."""
        key_model, key_guess, key_next = random.split(rng_key, 3)
        found = inspect_model(
            key_model,
            self.model,
            arguments,
            init_params=init_params,
            needs_walkers=False,
            kept="a learned log Z",
        )
        check_on_params("optim", self.optim, found.params)
        bound = BoundModel(self.model, found.transforms, key_model, arguments)
        guesses = _guesses(bound, found.params, key_guess)

        return NoiseContrastiveState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            log_normalizers=guesses,
            log_normalizer_optim_state=self._own_optim.init(guesses),
            rng_key=key_next,
        )

    def update(
        self, state: NoiseContrastiveState, *args: Any, **kwargs: Any
    ) -> tuple[NoiseContrastiveState, dict[str, Any]]:
        """One training step; see :class:`Backend`."""
        key_model, key_noise, key_next = random.split(state.rng_key, 3)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        # Gradient
        loss_of = partial(_loss, self, bound, key_noise)
        loss, (grads, own_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            state.params, state.log_normalizers
        )
        updates, optim_state = updates_of(
            self.optim, grads, state.optim_state, state.params, loss
        )
        own_updates, own_state = updates_of(
            self._own_optim,
            own_grads,
            state.log_normalizer_optim_state,
            state.log_normalizers,
            loss,
        )
        params = optax.apply_updates(state.params, updates)
        log_z = optax.apply_updates(state.log_normalizers, own_updates)

        # Return to the whole old state where a number is not finite
        grad_norm = optax.tree.norm((grads, own_grads))
        finite = Finite(
            {name: jnp.all(jnp.isfinite(value)) for name, value in log_z.items()},
            finite_parts(loss, grad_norm, params),
        )
        new = NoiseContrastiveState(
            params, state.transforms, optim_state, log_z, own_state, key_next
        )
        new = finite.new_or_old(new, state)

        info = {
            "loss": loss,
            "log_normalizer": new.log_normalizers,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new, info

    def _findings(
        self,
        fit: Fit,
        init_state: NoiseContrastiveState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        if not fit.history or len(fit.history["loss"]) < MIN_UPDATES:
            return
        yield from judged_by_base(fit, self.model, arguments, has_every_row)


def _loss(
    backend: NoiseContrastive,
    bound: BoundModel,
    rng_key: Array,
    params: Params,
    log_normalizers: dict[str, Array],
) -> Array:
    """The negative log joint, where energies give way to what tells data from noise."""
    index = count()

    def instead(name: str, energy: EnergyDistribution) -> RowLoss:
        start = starting_distribution(energy, name)
        key = random.fold_in(rng_key, next(index))
        noise = lax.stop_gradient(start.sample(key, (backend.num_draws,)))

        def log_odds(values: Array) -> Array:
            # The noise is that of the present parameters, where the start has any.
            log_noise = lax.stop_gradient(unchecked_log_prob(start, values))
            log_model = -energy.unchecked_potential(values) - log_normalizers[name]
            return log_model - log_noise - math.log(backend.noise_ratio)

        of_noise = backend.noise_ratio * jnp.mean(softplus(log_odds(noise)), axis=0)
        return RowLoss(energy, lambda rows: softplus(-log_odds(rows)) + of_noise)

    return bound.negative_log_joint(params, instead)


@jax.jit
def _guesses(bound: BoundModel, params: Params, rng_key: Array) -> dict[str, Array]:
    """Log Z by draws of each start."""
    return {
        name: log_mean_exp(
            weighted_draws(
                random.fold_in(rng_key, index), name, energy, (NUM_GUESSES,)
            ).log_weight,
            axis=0,
        )
        for index, (name, energy) in enumerate(bound.energies(params).items())
    }
