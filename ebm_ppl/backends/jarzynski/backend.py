"""The Jarzynski backend: walkers whose weights follow the parameters.

Carbone, Hua, Coste and Vanden-Eijnden (NeurIPS 2023), Algorithms 1–4, with two
additions: some islands are held out of the gradient, so that log Z does not inherit the
noise it was trained on, and updates are scaled so that the conditional ESS of a
parameter step stays near a target.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from ebm_ppl.backends.jarzynski.clock import begin_clock
from ebm_ppl.backends.jarzynski.control import controlled_switch, negative_log_joint
from ebm_ppl.backends.jarzynski.journey import led_to
from ebm_ppl.backends.jarzynski.options import check_options
from ebm_ppl.backends.jarzynski.placement import abstract_walkers, place_walkers
from ebm_ppl.backends.jarzynski.refresh import with_fresh_log_z
from ebm_ppl.backends.jarzynski.renewal import renewed
from ebm_ppl.backends.jarzynski.state import JarzynskiState, new_or_old
from ebm_ppl.backends.jarzynski.warnings import (
    held_out_draws,
    training_left_held_out,
)
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.convergence import still_moving
from ebm_ppl.normalizer.own_draws import distance_from_maximum, is_checked
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.resampling import Resampling, systematic
from ebm_ppl.training.backend import Backend, Finite, finite_parts
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import check_on_params, updates_of
from ebm_ppl.walkers.moves import move_walkers, resample_or_return
from ebm_ppl.walkers.state import Walkers


@dataclass(frozen=True, eq=False)
class Jarzynski(Backend):
    r"""Maximum likelihood (or MAP) for energies, by walkers with Jarzynski weights.

    One update, with log weights A, islands c and training islands T:

    1. gradient of NumPyro's negative log joint, where :math:`\nabla\log Z =
       -\sum_{c\in T} v_c \sum_i w_{ci}\nabla_\theta U_\theta(X_{ci})`, :math:`w_c =
       \mathrm{softmax}(A_c)` and islands count by their log Z, within bounds,
       :math:`v = \mathrm{softmax}(\mathrm{clip}(\log\hat Z))`; an optax update gives
       θ';
    2. switch: :math:`A_i \mathrel{+}= U_\theta(X_i) - U_{\theta'}(X_i)`;
    3. move under θ' with ``kernel``, whose own weight is added;
    4. islands whose ESS is under ``ess_threshold`` resample.

    The loss is a sum, as in SVI (a plate's scale included), so rates of plain gradient
    descent are N times smaller than for a mean loss.

    Args:
        model: A NumPyro model with one or more observed :class:`EnergyDistribution`
            sites.  Parameters are its ``param`` sites and its unobserved global sample
            sites (fitted by MAP, in the convention of ``AutoDelta``).
        optim: An optax gradient transformation, applied to unconstrained parameters.
            Its update receives ``value=loss`` if it accepts that argument.
        kernel: :class:`MALA` or :class:`ULA` (the paper's).
        num_chains: Islands, held-out ones included.
        num_walkers: Walkers per island.
        num_holdout_chains: Islands that never enter a gradient, a step size or the
            update control; log Z is estimated from them.  At least 2; under 4 the
            standard error is unreliable, and a warning is given.
        num_kernel_steps: Moves per update.
        moved_share: Share of each island's walkers that move in an update, chosen at
            random (Algorithms 3 and 4); all are switched, so weights stay exact.
        ess_target: Target for the conditional ESS (cESS) of a switch over the training
            islands.  An update with a lower one is scaled once by
            ``√((1−target)/(1−cESS))``; the scale recovers by 1% a step.  None disables
            the control.
        ess_threshold: ESS fraction under which an island resamples.  A coefficient of
            variation c of its weights, by which the paper decides, is an ESS of
            1 / (1 + c²).
        resampling: :func:`systematic`, :func:`residual`, :func:`multinomial`, or any
            function of that signature.
        num_temperatures: Temperatures of the annealing from the start to the energy at
            the initial parameters, where the two differ.  None takes 32 times the
            number that a pilot run needed, at least 128.
        renew_every: Updates after which :meth:`run` lets held-out islands
            begin to train and replaces the oldest training islands by fresh ones, which
            are then held out: it takes back what a fit learns from its own walkers.  The
            first time is after four such periods.  Where annealing needs more
            temperatures, or fresh islands miss what the others know, such as a narrow
            mode, it happens that much more rarely, with more of them.  None lets walkers
            grow old with the fit, as the paper does.

    Raises:
        ValueError: An option out of range, such as too few walkers or islands.
        TypeError: ``optim`` is not an optax gradient transformation, or searches along
            the loss.

    Source: Carbone, Hua, Coste and Vanden-Eijnden (2023), Algorithms 1–4.
    """

    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (
        LOSS,
        Diagnostic("ess", by_site=True, label="ESS", spec=".2f"),
        Diagnostic("ess_holdout", by_site=True),
        Diagnostic(
            "log_normalizer",
            by_site=True,
            label="log Z",
            spec=".3f",
            error="log_normalizer_stderr",
        ),
        Diagnostic("log_normalizer_stderr", by_site=True),
        Diagnostic("log_normalizer_training", by_site=True),
        Diagnostic("update_scale"),
        Diagnostic("resampled", by_site=True),
        Diagnostic("acceptance", by_site=True),
        GRAD_NORM,
    )

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    kernel: Kernel = field(default_factory=MALA)
    num_chains: int = 16
    num_walkers: int = 64
    num_holdout_chains: int = 4
    num_kernel_steps: int = 1
    moved_share: float = 1.0
    ess_target: float | None = 0.99
    ess_threshold: float = 0.5
    resampling: Resampling = systematic
    num_temperatures: int | None = None
    renew_every: int | None = 50

    def __post_init__(self) -> None:
        check_options(self)

    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> JarzynskiState:
        """Walkers of every site, annealed to the initial parameters where needed."""
        place = partial(
            place_walkers,
            self,
            num_chains=self.num_chains,
            num_temperatures=self.num_temperatures,
        )
        return self._state(rng_key, arguments, init_params, place)

    def _template(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> JarzynskiState:
        """The same with walkers that are shapes."""
        place = partial(abstract_walkers, self)
        return self._state(rng_key, arguments, init_params, place)

    def _state(
        self,
        rng_key: Array,
        arguments: Arguments,
        init_params: Params | None,
        place: Callable[..., Walkers],
    ) -> JarzynskiState:
        key_model, key_walkers, key_next = random.split(rng_key, 3)
        found = inspect_model(key_model, self.model, arguments, init_params=init_params)
        check_on_params("optim", self.optim, found.params)
        bound = BoundModel(self.model, found.transforms, key_model, arguments)

        walkers = {
            name: place(random.fold_in(key_walkers, index), name, bound, found.params)
            for index, name in enumerate(found.energies)
        }

        return JarzynskiState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            walkers=walkers,
            update_scale=jnp.ones(()),
            clock=begin_clock(self.renew_every, self.kernel, walkers),
            rng_key=key_next,
        )

    def update(
        self, state: JarzynskiState, *args: Any, **kwargs: Any
    ) -> tuple[JarzynskiState, dict[str, Any]]:
        """One training step; see :class:`Backend`.

        One body: the four words of the algorithm, in order.
        """
        key_model, key_move, key_resample, key_next = random.split(state.rng_key, 4)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        # Gradient
        loss, grads = jax.value_and_grad(
            partial(negative_log_joint, bound, state.walkers)
        )(state.params)
        updates, optim_state = updates_of(
            self.optim, grads, state.optim_state, state.params, loss
        )

        # Switch
        scale, params, walkers, evaluated = controlled_switch(
            self.kernel,
            bound,
            state.params,
            state.walkers,
            updates,
            state.update_scale,
            self.ess_target,
        )

        # Move
        walkers, acceptance = move_walkers(
            self.kernel,
            key_move,
            bound.energies(params),
            walkers,
            evaluated,
            self.num_kernel_steps,
            self.moved_share,
        )

        grad_norm = optax.tree.norm(grads)
        ess = {name: w.ess() for name, w in walkers.items()}
        finite = Finite(
            {name: w.is_usable() for name, w in walkers.items()},
            finite_parts(loss, grad_norm, params),
        )

        # Resample, or return to the whole old state where a number is not finite
        walkers, resampled = resample_or_return(
            key_resample,
            finite.everywhere(),
            walkers,
            state.walkers,
            self.ess_threshold,
            self.resampling,
        )
        clock = None if state.clock is None else state.clock.tick()
        new = JarzynskiState(
            params, state.transforms, optim_state, walkers, scale, clock, key_next
        )
        new = new_or_old(finite.everywhere(), new, state)

        log_z = {name: w.log_normalizer() for name, w in walkers.items()}
        info = {
            "loss": loss,
            "ess": {name: pair[0] for name, pair in ess.items()},
            "ess_holdout": {name: pair[1] for name, pair in ess.items()},
            "log_normalizer": {name: pair[0] for name, pair in log_z.items()},
            "log_normalizer_stderr": {name: pair[1] for name, pair in log_z.items()},
            "log_normalizer_training": {
                name: w.training_log_normalizer() for name, w in walkers.items()
            },
            "update_scale": scale,
            "resampled": resampled,
            "acceptance": acceptance,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new, info

    def _resume(self, state: JarzynskiState) -> JarzynskiState:
        """Renewal is this backend's choice; a clock that runs goes on."""
        if self.renew_every is None or state.clock is None:
            clock = begin_clock(self.renew_every, self.kernel, state.walkers)
            return replace(state, clock=clock)
        return state

    def updates_until_upkeep(self, state: JarzynskiState) -> int:
        """Until islands are renewed."""
        if state.clock is None:
            return super().updates_until_upkeep(state)
        return int(state.clock.left)

    def upkeep(self, state: JarzynskiState, arguments: Arguments) -> JarzynskiState:
        """Renew the oldest islands, where that was asked for."""
        return state if state.clock is None else renewed(self, state, arguments)

    def with_params(
        self, state: JarzynskiState, params: Params, arguments: Arguments
    ) -> JarzynskiState:
        """The state at other parameters, to which its walkers are led in small steps."""
        return led_to(self, state, params, arguments)

    def _findings(
        self,
        fit: Fit,
        init_state: JarzynskiState,
        arguments: Arguments,
        has_every_row: bool,
    ) -> Iterator[Finding]:
        yield from training_left_held_out(fit, self.renew_every is not None)
        if has_every_row:
            errors = fit.history.get("log_normalizer_stderr")
            yield from still_moving(fit, self.model, arguments, errors)
        if has_every_row and is_checked(fit):
            held = held_out_draws(fit.state.walkers)
            yield from distance_from_maximum(fit, self.model, arguments, held, "")

    def refresh(
        self,
        rng_key: Array,
        state: JarzynskiState,
        *args: Any,
        num_temperatures: int = 1000,
        **kwargs: Any,
    ) -> JarzynskiState:
        """Re-anchor log Z by fresh held-out islands, annealed from the start.

        Long runs need it: held-out weights keep log Z unbiased, but their variance
        grows.  A warning says where the running value had gone further astray than its
        standard error allows.

        Args:
            rng_key: A JAX PRNG key.
            state: Any state; it is not changed.
            args: The model's positional arguments.
            num_temperatures: Temperatures of the annealing, with ``num_kernel_steps``
                moves at each.
            kwargs: The model's keyword arguments.
        """
        return with_fresh_log_z(
            self, rng_key, state, Arguments(args, kwargs), num_temperatures
        )
