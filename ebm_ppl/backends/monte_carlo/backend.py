"""Monte Carlo maximum likelihood: log Z by fresh draws of the base at every update."""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from jax import Array, random

from ebm_ppl.backends.judged_by_base import judged_by_base
from ebm_ppl.backends.monte_carlo.normalizer import Normalizer, normalizer_of
from ebm_ppl.backends.monte_carlo.state import MonteCarloMLEState
from ebm_ppl.backends.monte_carlo.warnings import MIN_UPDATES, few_draws
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.weighted_draws import weighted_draws
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import check_on_params, check_optimizer
from ebm_ppl.training.step import gradient_step


@dataclass(frozen=True, eq=False)
class MonteCarloMLE(Backend):
    r"""Maximum likelihood (or MAP) for energies on a base that is near to the data.

    At every update, with n fresh draws y of the base,

    .. math::
        \log Z(\theta) \approx \log \frac1n \sum_j e^{-E_\theta(y_j)},

    whose gradient is the self-normalised mean of :math:`-\nabla_\theta E_\theta(y_j)`.
    There are no walkers, so nothing remembers the parameters' path.  What it takes is a
    base that reaches wherever the energy may be low: a mixture, a flow or a kernel
    density of the data (:func:`from_sklearn`), and an energy that cannot leave it far
    behind (:func:`bounded`).  Where few of the draws carry the weight, a warning says so.

    The loss is a sum, as in SVI (a plate's scale included), so rates of plain gradient
    descent are N times smaller than for a mean loss.

    Args:
        model: A NumPyro model with one or more observed :class:`EnergyDistribution`
            sites, of continuous or discrete support.  Parameters are its ``param`` sites
            and its unobserved global sample sites (fitted by MAP, in the convention of
            ``AutoDelta``).
        optim: An optax gradient transformation, applied to unconstrained parameters.
        num_draws: Draws of every energy's base (or ``start``) per update; of each batch
            element, where an energy has a log Z for each.

    Raises:
        ValueError: ``num_draws`` is under 2.
        TypeError: ``optim`` is not an optax gradient transformation, or searches along
            the loss.

    Source: Geyer and Thompson (1992); Geyer (1994).
    """

    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (
        LOSS,
        Diagnostic("ess", by_site=True, label="ESS", spec=".2f"),
        Diagnostic(
            "log_normalizer",
            by_site=True,
            label="log Z",
            spec=".3f",
            error="log_normalizer_stderr",
        ),
        Diagnostic("log_normalizer_stderr", by_site=True),
        GRAD_NORM,
    )

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    num_draws: int = 1024

    def __post_init__(self) -> None:
        check_optimizer("optim", self.optim)
        if self.num_draws < 2:
            raise ValueError(f"num_draws = {self.num_draws}; expected at least 2.")

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> MonteCarloMLEState:
        """Parameters, checked with the model on its data."""
        key_model, key_next = random.split(rng_key)
        found = inspect_model(
            key_model,
            self.model,
            arguments,
            init_params=init_params,
            needs_walkers=False,
            kept=None,
        )
        check_on_params("optim", self.optim, found.params)
        return MonteCarloMLEState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            rng_key=key_next,
        )

    def update(
        self, state: MonteCarloMLEState, *args: Any, **kwargs: Any
    ) -> tuple[MonteCarloMLEState, dict[str, Any]]:
        """One training step; see :class:`Backend`."""
        key_model, key_draws, key_next = random.split(state.rng_key, 3)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        # Gradient
        loss_of = partial(_negative_log_joint, bound, key_draws, self.num_draws)
        step = gradient_step(self.optim, loss_of, state.params, state.optim_state)
        found = step.aux

        # Return to the whole old state where a number is not finite
        finite = Finite(
            {
                name: jnp.all(jnp.isfinite(site.estimate))
                for name, site in found.items()
            },
            finite_parts(step.loss, step.grad_norm, step.params),
        )
        new = MonteCarloMLEState(
            step.params, state.transforms, step.optim_state, key_next
        )
        new = finite.new_or_old(new, state)

        info = {
            "loss": step.loss,
            "ess": {name: site.ess for name, site in found.items()},
            "log_normalizer": {name: site.estimate for name, site in found.items()},
            "log_normalizer_stderr": {
                name: site.stderr for name, site in found.items()
            },
            "grad_norm": step.grad_norm,
            "finite": finite,
        }
        return new, info

    def _findings(
        self,
        fit: Fit,
        init_state: MonteCarloMLEState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        if not fit.history or len(fit.history["loss"]) < MIN_UPDATES:
            return
        yield from few_draws(fit, self.num_draws)
        yield from judged_by_base(fit, self.model, arguments, has_every_row)


def _negative_log_joint(
    bound: BoundModel, rng_key: Array, num_draws: int, params: Params
) -> tuple[Array, Mapping[str, Normalizer]]:
    """The loss with log Z by draws, and what the draws say of each log Z."""
    found: dict[str, Normalizer] = {}

    def normalize(name: str, energy: EnergyDistribution) -> EnergyDistribution:
        key = random.fold_in(rng_key, len(found))
        draws = weighted_draws(key, name, energy, (num_draws,))
        found[name] = normalizer_of(draws.log_weight)
        return energy.with_log_normalizer(found[name].estimate)

    return bound.negative_log_joint(params, normalize), found
