"""Score matching: energies fitted by their derivatives at the data alone."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import count
from typing import Any, Literal

import optax
from jax import Array, random

from ebm_ppl.backends.monte_carlo.warnings import MIN_UPDATES
from ebm_ppl.backends.score_matching.losses import (
    RowsLoss,
    denoising_loss,
    exact_loss,
    sliced_loss,
)
from ebm_ppl.backends.score_matching.smoothness import not_smooth
from ebm_ppl.backends.score_matching.state import ScoreMatchingState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.row_loss import RowLoss
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.convergence import still_moving
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import check_on_params, check_optimizer
from ebm_ppl.training.step import gradient_step

METHODS = ("exact", "sliced", "denoising")


@dataclass(frozen=True, eq=False)
class ScoreMatching(Backend):
    r"""Energies fitted by their derivatives at the data: no draws, no normaliser.

    A row's loss, in the place of its negative log density, is

    .. math::
        \tfrac12\|\nabla U_\theta(x)\|^2 - \mathrm{tr}\,\nabla^2 U_\theta(x),

    which is, but for a constant, half the squared distance between the gradient of the
    model's log density and that of the data's.  Plates, scales and masks keep NumPyro's
    meaning; priors count against a loss that is not in nats.  Derivatives are taken in
    the values themselves where the support is the whole space, and in their logs or
    logits where it is not.

    What it does not give: log Z (ask :func:`log_normalizer`), draws, and the mass of
    modes that lie apart, which no derivative at the data knows
    (:func:`score_test` tells how far the fit is from maximum likelihood).  Energies
    have to be smooth: where one has walls, jumps, or kinks as a net of ReLUs does, a
    warning says so.  ``"denoising"`` fits the density of the data with noise.

    Args:
        model: A NumPyro model with one or more observed :class:`EnergyDistribution`
            sites of continuous support; bases may be improper, and an energy may have a
            log Z for each row of a subsampled plate.
        optim: An optax gradient transformation, applied to unconstrained parameters.
        method: ``"exact"``, whose cost grows with the number of elements of an event;
            ``"sliced"``, with random directions; or ``"denoising"``.
        num_slices: Directions of ``"sliced"``.
        noise_scale: Standard deviation σ of the noise of ``"denoising"``, in the values
            (or their logs, or logits).

    Raises:
        ValueError: An option out of range, or a discrete support.
        TypeError: ``optim`` is not an optax gradient transformation, or searches along
            the loss.

    Source: Hyvärinen (2005); Song, Garg, Shi and Ermon (2019); Vincent (2011).
    """

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    method: Literal["exact", "sliced", "denoising"] = "exact"
    num_slices: int = 1
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        check_optimizer("optim", self.optim)
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}; expected one of {METHODS}.")
        if self.num_slices < 1:
            raise ValueError(f"num_slices = {self.num_slices}; expected at least 1.")
        is_denoising, scale = self.method == "denoising", self.noise_scale
        if is_denoising and not (scale is not None and scale > 0):
            raise ValueError(
                f"noise_scale = {scale}; method='denoising' needs the standard "
                "deviation of its noise, such as a tenth of the data's."
            )
        if not is_denoising and scale is not None:
            raise ValueError(
                f"noise_scale = {scale} has no meaning for method={self.method!r}; "
                "leave it out, or write method='denoising'."
            )

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> ScoreMatchingState:
        """Parameters, checked with the model on its data."""
        key_model, key_next = random.split(rng_key)
        found = inspect_model(
            key_model,
            self.model,
            arguments,
            init_params=init_params,
            needs_walkers=False,
            needs_start=False,
            kept=None,
        )
        for name, energy in found.energies.items():
            if energy.support.is_discrete:
                raise ValueError(
                    f"Energy site '{name}' has a discrete support ({energy.support}), "
                    "where there are no derivatives to match. Fit it with "
                    "ebm_ppl.MonteCarloMLE(model, ...)."
                )
        check_on_params("optim", self.optim, found.params)

        return ScoreMatchingState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            rng_key=key_next,
        )

    def update(
        self, state: ScoreMatchingState, *args: Any, **kwargs: Any
    ) -> tuple[ScoreMatchingState, dict[str, Any]]:
        """One training step; see :class:`Backend`."""
        key_model, key_loss, key_next = random.split(state.rng_key, 3)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        def loss_of(params: Params) -> tuple[Array, None]:
            index = count()

            def instead(name: str, energy: EnergyDistribution) -> RowLoss:
                key = random.fold_in(key_loss, next(index))
                return RowLoss(energy, self._loss_of(key, energy))

            return bound.negative_log_joint(params, instead), None

        step = gradient_step(self.optim, loss_of, state.params, state.optim_state)

        # Return to the whole old state where a number is not finite
        parts = finite_parts(step.loss, step.grad_norm, step.params)
        finite = Finite({}, parts)
        new = ScoreMatchingState(
            step.params, state.transforms, step.optim_state, key_next
        )
        new = finite.new_or_old(new, state)
        info = {"loss": step.loss, "grad_norm": step.grad_norm, "finite": finite}
        return new, info

    def _loss_of(self, rng_key: Array, energy: EnergyDistribution) -> RowsLoss:
        if self.method == "exact":
            return exact_loss(energy)
        if self.method == "sliced":
            return sliced_loss(energy, rng_key, self.num_slices)
        assert self.noise_scale is not None
        return denoising_loss(energy, rng_key, self.noise_scale)

    def _findings(
        self,
        fit: Fit,
        init_state: ScoreMatchingState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        if not fit.history or len(fit.history["loss"]) < MIN_UPDATES:
            return
        if self.method != "denoising":
            key = random.fold_in(fit.state.rng_key, 2)
            bound = BoundModel(
                self.model, fit.state.transforms, fit.state.rng_key, arguments
            )
            yield from not_smooth(bound, fit.state.params, key)
        if has_every_row:
            yield from still_moving(fit, self.model, arguments, unit="")
