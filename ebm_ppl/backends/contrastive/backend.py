"""Contrastive divergence: walkers that move for a while, and count equally."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import optax
from jax import Array, lax, random

from ebm_ppl.backends.base_draws import own_draws
from ebm_ppl.backends.contrastive.state import ContrastiveDivergenceState
from ebm_ppl.backends.contrastive.walk import Walk, Walked
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.row_loss import RowLoss
from ebm_ppl.energy.start import starting_coordinates
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.own_draws import distance_from_maximum, is_checked
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import check_on_params, check_optimizer
from ebm_ppl.training.step import gradient_step
from ebm_ppl.walkers.site import SiteAtParams, coordinates_for

METHODS = ("persistent", "data", "base")


@dataclass(frozen=True, eq=False)
class ContrastiveDivergence(Backend):
    r"""Energies fitted by walkers that take a few moves and count equally.

    The gradient of log Z is :math:`-\frac1n\sum_i \nabla_\theta U_\theta(x_i)` over
    walkers x, moved ``num_kernel_steps`` times by ``kernel`` from where ``method``
    lets them begin:

    - ``"persistent"``: where the last update left them, and at the first in draws of
      the base (Tieleman 2008); a share ``reset_rate`` of them begins again in the base
      (Du and Mordatch 2019);
    - ``"data"``: at the rows, one walker each (CD-k, Hinton 2002);
    - ``"base"``: in fresh draws of the base, or ``start`` (short runs, Nijkamp, Hill,
      Han, Zhu and Wu 2019).

    What it does not give: a gradient of the likelihood, as the walkers are not draws of
    the model but where moves have mixed, so that modes come out with wrong masses and
    energies with wells that no walker enters; nor any log Z.  :func:`log_normalizer`
    and :func:`score_test` serve its fits as any other, and tell.

    The loss is U of the data less that of the walkers, a sum over rows.

    Args:
        model: A NumPyro model with one or more observed :class:`EnergyDistribution`
            sites of continuous support.
        optim: An optax gradient transformation, applied to unconstrained parameters.
        kernel: :class:`MALA` or :class:`ULA`, whose weights are left out.
        method: Where walkers begin.
        num_walkers: Walkers of every energy's log Z; ``"data"`` has one per row.
        num_kernel_steps: Moves in every update.
        reset_rate: Probability that a persistent walker begins again.

    Raises:
        ValueError: An option out of range; persistent walkers for an energy with a log
            Z for each row of a subsampled plate.
        TypeError: ``optim`` is not an optax gradient transformation, or searches along
            the loss.

    Source: Hinton (2002); Tieleman (2008); Du and Mordatch (2019); Nijkamp et al.
    (2019).
    """

    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (
        LOSS,
        Diagnostic("acceptance", by_site=True, spec=".2f"),
        GRAD_NORM,
    )

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    kernel: Kernel = field(default_factory=MALA)
    method: Literal["persistent", "data", "base"] = "persistent"
    num_walkers: int = 1024
    num_kernel_steps: int = 1
    reset_rate: float = 0.0

    def __post_init__(self) -> None:
        check_optimizer("optim", self.optim)
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}; expected one of {METHODS}.")
        for name in ("num_walkers", "num_kernel_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} = {getattr(self, name)}; expected at least 1."
                )
        if not 0.0 <= self.reset_rate < 1.0:
            raise ValueError(
                f"reset_rate = {self.reset_rate}; expected a probability under 1."
            )
        if self.reset_rate and self.method != "persistent":
            raise ValueError(
                f"reset_rate = {self.reset_rate} has no meaning for method="
                f"{self.method!r}, whose walkers always begin again."
            )

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> ContrastiveDivergenceState:
        """Parameters, checked with the model on its data, and walkers in the bases."""
        key_model, key_walkers, key_next = random.split(rng_key, 3)
        found = inspect_model(
            key_model,
            self.model,
            arguments,
            init_params=init_params,
            kept="walkers" if self.method == "persistent" else None,
        )
        check_on_params("optim", self.optim, found.params)
        bound = BoundModel(self.model, found.transforms, key_model, arguments)

        position, coordinates, tuning = {}, {}, {}
        for index, (name, energy) in enumerate(found.energies.items()):
            transform = coordinates_for(self.kernel, energy, name, "walkers")
            site = SiteAtParams(name, bound, found.params, transform)
            tuning[name] = site.init_tuning(self.kernel)
            if self.method == "persistent":
                key = random.fold_in(key_walkers, index)
                position[name] = site.draw(key, (self.num_walkers,))
                coordinates[name] = transform

        return ContrastiveDivergenceState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            position=position,
            coordinates=coordinates,
            tuning=tuning,
            rng_key=key_next,
        )

    def update(
        self, state: ContrastiveDivergenceState, *args: Any, **kwargs: Any
    ) -> tuple[ContrastiveDivergenceState, dict[str, Any]]:
        """One training step; see :class:`Backend`."""
        key_model, key_walk, key_next, key_begin = random.split(state.rng_key, 4)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        walks = self._walks(bound, state, key_walk, key_begin)

        # Gradient
        loss_of = partial(self._loss, bound, walks, state.position)
        step = gradient_step(self.optim, loss_of, state.params, state.optim_state)
        walked: dict[str, Walked] = step.aux

        # Return to the whole old state where a number is not finite
        finite = Finite(
            {name: jnp.all(jnp.isfinite(w.values)) for name, w in walked.items()},
            finite_parts(step.loss, step.grad_norm, step.params),
        )
        acceptance = {name: w.acceptance for name, w in walked.items()}
        new = replace(
            state,
            params=step.params,
            optim_state=step.optim_state,
            position={name: walked[name].position for name in state.position},
            tuning={
                name: self.kernel.adapt(tuning, acceptance[name])
                for name, tuning in state.tuning.items()
            },
            rng_key=key_next,
        )
        new = finite.new_or_old(new, state)

        info = {
            "loss": step.loss,
            "acceptance": acceptance,
            "grad_norm": step.grad_norm,
            "finite": finite,
        }
        return new, info

    def _walks(
        self,
        bound: BoundModel,
        state: ContrastiveDivergenceState,
        rng_key: Array,
        key_begin: Array,
    ) -> dict[str, Walk]:
        """Moves under every energy at the state's parameters."""
        walks = {}
        for index, (name, energy) in enumerate(bound.energies(state.params).items()):
            transform = state.coordinates.get(name)
            if transform is None:
                transform = starting_coordinates(energy, name)
            walks[name] = Walk(
                name,
                energy,
                transform,
                self.kernel,
                state.tuning[name],
                self.num_kernel_steps,
                random.fold_in(rng_key, index),
                random.fold_in(key_begin, index),
            )
        return walks

    def _loss(
        self,
        bound: BoundModel,
        walks: dict[str, Walk],
        positions: dict[str, Array],
        params: Params,
    ) -> tuple[Array, dict[str, Walked]]:
        """U of the data less that of walkers, and where these are after their moves.

        Walkers move under the parameters as they are: no derivative goes through moves.
        """
        walked: dict[str, Walked] = {}

        def by_walkers(name: str, energy: EnergyDistribution) -> EnergyDistribution:
            walk = walks[name]
            position = positions.get(name)
            if position is None:
                position = walk.draws(self.num_walkers)
            elif self.reset_rate:
                position = walk.some_reset(position, self.reset_rate)
            walked[name] = walk.from_positions(position)
            potential = energy.unchecked_potential(walked[name].values)
            return energy.with_log_normalizer(-_mean_of_finite(potential))

        def by_rows(name: str, energy: EnergyDistribution) -> RowLoss:
            def loss(rows: Array) -> Array:
                walked[name] = walks[name].from_rows(lax.stop_gradient(rows))
                potential = energy.unchecked_potential(walked[name].values)
                return energy.unchecked_potential(rows) - potential

            return RowLoss(energy, loss)

        instead = by_rows if self.method == "data" else by_walkers
        return bound.negative_log_joint(params, instead), walked

    def _findings(
        self,
        fit: Fit,
        init_state: ContrastiveDivergenceState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        """By fresh draws of the bases: its own walkers agree with what they taught."""
        if has_every_row and is_checked(fit):
            state = fit.state
            bound = BoundModel(self.model, state.transforms, state.rng_key, arguments)
            held = own_draws(bound, state.params, random.fold_in(state.rng_key, 2))
            why = "Contrastive divergence follows no likelihood. "
            yield from distance_from_maximum(fit, self.model, arguments, held, why)


def _mean_of_finite(potential: Array) -> Array:
    """The mean over walkers; none counts where the energy is infinite, as at walls."""
    is_inside = potential != jnp.inf
    total = jnp.sum(jnp.where(is_inside, potential, 0.0), axis=0)
    return total / jnp.sum(is_inside, axis=0)
