"""The VERA backend: a generator takes the place of Markov chains.

Grathwohl, Kelly, Hashemi, Norouzi, Swersky and Duvenaud (ICLR 2021), Algorithm 1.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from ebm_ppl.backends.vera.gradient_draws import gradient_draws
from ebm_ppl.backends.vera.health import (
    draws_astray,
    falling_entropy,
    standing_at_bounds,
    tempered_draws,
    warn_of_momentum,
)
from ebm_ppl.backends.vera.options import check_options, resolve_score
from ebm_ppl.backends.vera.start import first_state
from ebm_ppl.backends.vera.state import GeneratorProgress, VERAState
from ebm_ppl.backends.vera.steps import (
    energy_step,
    generator_step,
    repeat,
)
from ebm_ppl.generators.fitting import score_for
from ebm_ppl.generators.program import Generator, Program
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.convergence import still_moving
from ebm_ppl.normalizer.own_draws import is_checked
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit

DEFENSIVE = (
    Diagnostic("log_normalizer_weighted", by_site=True),
    Diagnostic("gradient_ess", by_site=True),
    Diagnostic("unreached", by_site=True),
)


@dataclass(frozen=True, eq=False)
class VERA(Backend):
    r"""Maximum likelihood (or MAP) for one energy, by a generator without Markov chains.

    With q_φ the density of the generator's draws and U = E − log base, the energy and
    the generator play

    .. math::
        \max_\theta \min_\phi\; -E_{data}[U_\theta] + E_{q_\phi}[U_\theta] - \lambda
        H(q_\phi),

    whose solution for λ = 1 is maximum likelihood with q = exp(−U)/Z.  One update:

    1. generator: x = x(ε, φ); :math:`\nabla_\phi = E[(\nabla_x U + \lambda \nabla_x
       \log q_\phi)^\top \partial x / \partial\phi]`, the score ∇ₓ log q estimated by
       ``score``; an optax update, ``num_generator_steps`` times;
    2. energy: gradient of NumPyro's negative log joint, where :math:`\nabla\log Z =
       -E_{q_\phi}[\nabla_\theta U_\theta]`, plus ½γ‖∇E‖² for every data row, in
       base-standard coordinates; ``num_energy_steps`` times.

    The model's loss is a sum, as in SVI (a plate's scale included), the generator's a
    mean over its draws.

    Args:
        model: A NumPyro model with one observed :class:`EnergyDistribution` site.
            Parameters are its ``param`` sites and its unobserved global sample sites
            (fitted by MAP, in the convention of ``AutoDelta``).
        generator: A NumPyro program without arguments: latents on the whole real line,
            then x given z at the energy site's name, reparametrised and with a density,
            such as :func:`standardized_normal`.  Without latents x is a flow, whose
            score is exact.
        optim: An optax gradient transformation for the model's unconstrained
            parameters.
        generator_optim: One for the generator's.  Use no momentum in either, such as
            ``optax.adam(1e-3, b1=0.0)``: with momentum the two players oscillate.
        num_particles: Generator draws per step.  Above 256 it must divide into equal
            blocks of 64 to 256, inside which draws share their latents
            (:class:`ImportanceScore`).
        entropy_weight: λ.  Other than 1, the generator approximates exp(−U/λ), while
            log Z and densities stay those of exp(−U).
        gradient_penalty: γ.  Over 0 the fit is a *penalised* one, per row, so that more
            data do not undo it: of the precision λ of N(0, 1/λ) over N(0, 1) it finds
            the root of ``1/λ = s² (1 + 2γ(λ − 1))``, 1.7 for 4.2 at γ = 1.  Nets with
            few labels gain from it (1 on tables and digits; less on thin sets, where
            :func:`log_normalizer` still finds log Z near the generator's bound).
        score: ``"importance"`` (:class:`ImportanceScore`), ``"variational"``
            (:class:`VariationalScore`, the paper's), ``"hmc"`` (:class:`HMCScore`), or
            one of these with options.  A generator without latents needs none: its
            score is exact.
        num_energy_steps: Energy steps per update.
        num_generator_steps: Generator steps per update.
        importance_weights: True estimates :math:`\nabla\log Z` from the draws of the
            last generator step, with self-normalised weights exp(−U)/q̂.  A generator
            that lags behind the energy then causes less bias: about one over the
            effective sample size (``Fit.history["generator_ess"]`` times
            ``num_particles``), plus the error of q̂, which flows do not have.  The
            generator must be near the energy: a low effective sample size gives noisy
            gradients.  Not in the paper.
        defensive: True takes :math:`\nabla\log Z` from the generator's draws *and* as
            many draws around data rows (a kernel density of up to 256), weighted by
            exp(−U) over the density of the mixture: a mode that the generator has
            dropped keeps its pull.  ``Fit.history["unreached"]`` is the share of the
            weight where no draw of the generator goes.  For models of few parameters in
            few dimensions, at two to three times the cost of an update.  Not in the
            paper; Hesterberg (1995), Owen and Zhou (2000).

    Raises:
        ValueError: An option out of range.
        TypeError: An optimiser is not an optax gradient transformation, or searches
            along the loss.

    Source: Grathwohl et al. (2021), equations 6 to 10 and Algorithm 1.
    """

    model: Model
    generator: Program
    optim: optax.GradientTransformation
    generator_optim: optax.GradientTransformation
    _: KW_ONLY
    num_particles: int = 64
    entropy_weight: float = 1.0
    gradient_penalty: float = 0.0
    score: str | Score = "importance"
    num_energy_steps: int = 1
    num_generator_steps: int = 1
    importance_weights: bool = False
    defensive: bool = False

    parts: ClassVar[dict[str, str]] = Backend.parts | {"generator": "the generator"}
    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (
        LOSS,
        Diagnostic("generator_loss"),
        Diagnostic("entropy", by_site=True),
        Diagnostic("generator_ess", by_site=True),
        Diagnostic("log_normalizer_bound", by_site=True),
        Diagnostic("at_bound"),
        GRAD_NORM,
        Diagnostic("generator_grad_norm"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "score", resolve_score(self.score))
        if self.defensive:
            object.__setattr__(self, "diagnostics", self.diagnostics + DEFENSIVE)

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> VERAState:
        """Check the model and the generator on the data, and fit the first score."""
        state = first_state(self, rng_key, arguments, init_params, lambda fit: fit())
        warn_of_momentum("optim", self.optim, state.params)
        warn_of_momentum(
            "generator_optim", self.generator_optim, state.generator_params
        )
        return state

    def _template(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> VERAState:
        """The same without the fit."""
        return first_state(self, rng_key, arguments, init_params, jax.eval_shape)

    def update(
        self, state: VERAState, *args: Any, **kwargs: Any
    ) -> tuple[VERAState, dict[str, Any]]:
        """One training step; see :class:`Backend`.

        One body: the two players' steps, in order.
        """
        key_generator, key_energy, key_next = random.split(state.rng_key, 3)
        key_draws = random.fold_in(key_energy, 1)
        name, arguments = state.generator.name, Arguments(args, kwargs)
        bound = BoundModel(self.model, state.transforms, key_energy, arguments)

        # Generator
        energy = bound.energies(state.params)[name]
        step = partial(
            generator_step,
            self.generator_optim,
            state.generator,
            self.score_of(state.generator),
            energy,
            self.num_particles,
            self.entropy_weight,
        )
        progress = GeneratorProgress(
            state.generator_params,
            state.generator_optim_state,
            state.score_state,
            state.log_normalizer_bound,
        )

        progress, found = repeat(
            step, progress, key_generator, self.num_generator_steps
        )

        # Energy
        gradient = gradient_draws(self, key_draws, state, energy, progress, found)
        (params, optim_state), (loss, grad_norm) = repeat(
            partial(
                energy_step,
                self.optim,
                self.model,
                state,
                arguments,
                progress,
                gradient.log_normalizer,
                gradient.weighed,
                self.num_particles,
                self.gradient_penalty,
            ),
            (state.params, state.optim_state),
            key_energy,
            self.num_energy_steps,
        )

        # Return to the whole old state where a number is not finite
        finite = Finite(
            {},
            finite_parts(loss, grad_norm, params)
            | {
                "generator": found.in_support
                & jnp.isfinite(found.loss)
                & _all_finite((progress.params, progress.score_state)),
            },
        )

        new = replace(
            state,
            params=params,
            optim_state=optim_state,
            generator_params=progress.params,
            generator_optim_state=progress.optim_state,
            score_state=progress.score_state,
            log_normalizer_bound=progress.bound,
            defence=gradient.defence,
            rng_key=key_next,
        )
        new = finite.new_or_old(new, state)

        at_bounds = state.generator.at_bounds(progress.params).values()
        shares = [jnp.abs(share) for share in at_bounds]
        info = {
            "loss": loss,
            "generator_loss": found.loss,
            "entropy": {name: found.entropy},
            "generator_ess": {name: found.ess},
            "log_normalizer_bound": {name: progress.bound},
            "at_bound": jnp.max(jnp.stack(shares)) if shares else jnp.zeros_like(loss),
            "grad_norm": grad_norm,
            "generator_grad_norm": found.grad_norm,
            "finite": finite,
        }
        info |= {key: {name: found} for key, found in gradient.diagnostics.items()}
        return new, info

    def _resume(self, state: VERAState) -> VERAState:
        if state.generator.program.fn is not self.generator:
            raise ValueError(
                "init_state belongs to another generator; continue with the VERA that "
                "made it, or without it."
            )
        if (state.defence is not None) != self.defensive:
            raise ValueError(
                f"init_state was made with defensive={not self.defensive}, which decides "
                "what it carries; begin with init_params=fit.params instead."
            )
        return replace(
            state,
            entropy_weight=self.entropy_weight,
            gradient_penalty=self.gradient_penalty,
        )

    def _findings(
        self,
        fit: Fit,
        init_state: VERAState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        yield from standing_at_bounds(fit)
        yield from falling_entropy(fit, init_state)
        is_weighed = self.importance_weights or self.defensive
        yield from tempered_draws(self.entropy_weight, is_weighed)
        if has_every_row:
            yield from still_moving(fit, self.model, arguments)
        if has_every_row and is_checked(fit):
            score = self.score_of(fit.state.generator)
            yield from draws_astray(fit, self.model, arguments, score)

    def score_of(self, generator: Generator) -> Score:
        """The estimator of this generator's score."""
        assert not isinstance(self.score, str)
        return score_for(self.score, generator)


def _all_finite(tree: Any) -> Array:
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
