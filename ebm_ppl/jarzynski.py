"""The Jarzynski backend: Langevin walkers with weights that follow the parameters while
they are learned.

Carbone, Hua, Coste and Vanden-Eijnden (NeurIPS 2023), Algorithms 1–4, with two
additions: some islands are held out of the gradient, so that log Z does not inherit the
noise it was trained on, and updates are scaled so that the conditional ESS of a
parameter step stays near a target.
"""

import warnings
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random
from numpyro.distributions.transforms import Transform
from scipy.stats import t as student_t

from ebm_ppl.annealing import AnnealingOptions, Ensemble, resample_islands
from ebm_ppl.certificate import Evidence, LogNormalizer, certify
from ebm_ppl.distribution import EnergyDistribution, evaluate_at, starting_distribution
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import inspect_model
from ebm_ppl.kernels import (
    MALA,
    Kernel,
    KernelState,
    adapt_step_size,
    initial_step_size,
    move,
)
from ebm_ppl.model import Arguments, BoundModel, Model, Params
from ebm_ppl.optimizers import check_on_params, check_optimizer, updates_of
from ebm_ppl.placement import SiteAtParams, anneal_site
from ebm_ppl.resampling import Resampling, systematic
from ebm_ppl.training import Fit, as_strong_array, run
from ebm_ppl.walkers import Walkers, initial_gradient, switch, training_mean_potential
from ebm_ppl.weights import ess_fraction, jackknife_log_mean_exp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "walkers",
        "update_scale",
        "rng_key",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class JarzynskiState:
    """What the next update needs.

    Attributes:
        params: Unconstrained parameters by site name; see ``get_params`` for their
            values.
        transforms: Unconstrained to constrained, by site name.
        optim_state: The optax state.
        walkers: One :class:`Walkers` per energy site.
        update_scale: Factor on the optimiser's update, in (0, 1]; see ``ess_target``.
        rng_key: The key of the next update.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    walkers: dict[str, Walkers]
    update_scale: Array
    rng_key: Array

    def constrained_params(self) -> Params:
        """Values at the model's ``param`` and unobserved sample sites."""
        return {
            name: self.transforms[name](value) for name, value in self.params.items()
        }

    def log_normalizer(self, tolerance: float = 1.0) -> LogNormalizer:
        """The running log Z of the held-out islands, for watching a run.

        Unbiased at any time, but its variance grows with the run: where the 95%
        interval passes ``tolerance`` (nats) a flag says so; :meth:`Jarzynski.refresh`
        re-anchors it.  It is never certified: a mode that data have and no walker has
        found would go unnoticed.  :func:`ebm_ppl.log_normalizer` looks for that.
        """
        remedy = (
            "re-anchor it with Jarzynski.refresh(...), or estimate it afresh with "
            "ebm_ppl.log_normalizer(...)"
        )
        sites = {
            name: certify(Evidence(w.held_out()), tolerance, remedy, is_running=True)
            for name, w in self.walkers.items()
        }
        unchecked = (
            "the running value is not held against the data, nor bounded from above: "
            "use ebm_ppl.log_normalizer."
        )
        sites = {
            name: site._replace(flags=(*site.flags, unchecked))
            for name, site in sites.items()
        }
        return LogNormalizer.from_sites(
            sites, "held-out islands", params=self.constrained_params()
        )


@dataclass(frozen=True, eq=False)
class Jarzynski:
    r"""Maximum likelihood (or MAP) for energies, by walkers with Jarzynski weights.

    One update, with log weights A, islands c and training islands T:

    1. gradient of NumPyro's negative log joint, where :math:`\nabla\log Z =
       -\frac{1}{|T|}\sum_{c\in T}\sum_i w_{ci}\nabla_\theta U_\theta(X_{ci})`,
       :math:`w_c = \mathrm{softmax}(A_c)`; an optax update gives θ';
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
            It is told ``value=loss`` where it takes that.
        kernel: :class:`MALA` or :class:`ULA` (the paper's).
        num_chains: Islands, held-out ones included.
        num_walkers: Walkers per island.
        num_holdout_chains: Islands that never enter a gradient, a step size or the
            update control; log Z is theirs.  At least 2; under 4 the standard error is
            poor, and a warning says so.
        num_kernel_steps: Moves per update.
        ess_target: Conditional ESS of a switch over the training islands; an update
            that would fall under it is scaled by ``√((1−target)/(1−cESS))`` once, and
            the scale recovers by 1% a step.  None switches it off.
        ess_threshold: ESS fraction under which an island resamples.
        resampling: :func:`systematic`, :func:`multinomial`, or any function of that
            signature.
        num_temperatures: Rungs of the annealing from the start to the initial
            parameters, where these are not the start already.  None takes 32 times the
            number a pilot needed, at least 128.

    Raises:
        ValueError: Numbers of walkers or islands that cannot work.
        TypeError: ``optim`` is not an optax gradient transformation, or searches along
            the loss.

    Source: Carbone, Hua, Coste and Vanden-Eijnden (2023), Algorithms 1–4.
    """

    model: Model
    optim: optax.GradientTransformation
    _: KW_ONLY
    kernel: Kernel = field(default_factory=MALA)
    num_chains: int = 16
    num_walkers: int = 64
    num_holdout_chains: int = 4
    num_kernel_steps: int = 1
    ess_target: float | None = 0.99
    ess_threshold: float = 0.5
    resampling: Resampling = systematic
    num_temperatures: int | None = None

    def __post_init__(self) -> None:
        check_optimizer("optim", self.optim)
        for option in ("num_walkers", "num_kernel_steps"):
            if getattr(self, option) < 1:
                raise ValueError(
                    f"{option} = {getattr(self, option)}; expected at least 1."
                )
        if self.num_holdout_chains < 2:
            raise ValueError(
                f"num_holdout_chains = {self.num_holdout_chains}; expected at least 2: "
                "without two independent islands "
                "log Z has no standard error. Take 4 of the default 16."
            )
        if self.num_chains <= self.num_holdout_chains:
            raise ValueError(
                f"num_chains = {self.num_chains} with num_holdout_chains = "
                f"{self.num_holdout_chains} leaves no "
                "island to "
                "train on; expected num_chains > num_holdout_chains, such as "
                f"{4 * self.num_holdout_chains}."
            )
        if self.num_holdout_chains < 4:
            warnings.warn(
                f"num_holdout_chains = {self.num_holdout_chains}: under 4 islands the "
                "standard error of log Z is "
                "itself very uncertain.",
                stacklevel=3,
            )
        if self.ess_target is not None and not 0 < self.ess_target < 1:
            raise ValueError(
                f"ess_target = {self.ess_target}; expected a fraction in (0, 1), or "
                "None for no control."
            )
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(
                f"ess_threshold = {self.ess_threshold}; expected a fraction in [0, 1]."
            )

    def init(
        self,
        rng_key: Array,
        *args: Any,
        init_params: Params | None = None,
        **kwargs: Any,
    ) -> JarzynskiState:
        """Check the model on its data and place the walkers, annealed to the initial
        parameters where needed.

        Args:
            rng_key: A JAX PRNG key.
            args: The model's positional arguments.
            init_params: Constrained values for any parameter, instead of the model's
                own initial value.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError: A model or data that cannot be fitted; the message names the
                site and the remedy.
        """
        key_model, key_walkers, key_next = random.split(rng_key, 3)
        found = inspect_model(
            key_model, self.model, Arguments(args, kwargs), init_params=init_params
        )
        check_on_params("optim", self.optim, found.params)
        bound = BoundModel(
            self.model, found.transforms, key_model, Arguments(args, kwargs)
        )
        walkers = {}
        for index, name in enumerate(found.energies):
            key_site = random.fold_in(key_walkers, index)
            walkers[name] = self._place(
                key_site,
                name,
                bound,
                found.params,
                num_chains=self.num_chains,
                num_temperatures=self.num_temperatures,
            )
        state = JarzynskiState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            walkers=walkers,
            update_scale=jnp.ones(()),
            rng_key=key_next,
        )
        return jax.tree.map(as_strong_array, state)

    def update(
        self, state: JarzynskiState, *args: Any, **kwargs: Any
    ) -> tuple[JarzynskiState, dict[str, Any]]:
        """One training step; pure, so it can be jitted, scanned and given another batch
        each time.

        Args:
            state: From :meth:`init` or the last update.
            args: The model's positional arguments, such as a batch.
            kwargs: The model's keyword arguments.

        Returns:
            The next state and a dict of diagnostics, the keys of ``Fit.history``.
            Where anything in the step is not finite the old state is kept whole and
            ``info["finite"]`` says where.
        """
        key_model, key_move, key_resample, key_next = random.split(state.rng_key, 4)
        bound = BoundModel(
            self.model, state.transforms, key_model, Arguments(args, kwargs)
        )

        # Gradient
        loss, grads = jax.value_and_grad(partial(self._loss, bound, state.walkers))(
            state.params
        )
        updates, optim_state = updates_of(
            self.optim, grads, state.optim_state, state.params, loss
        )

        # Switch
        scale, params, walkers, evaluated = self._controlled_switch(
            bound, state, updates
        )

        # Move
        walkers, acceptance = self._move(key_move, bound, params, walkers, evaluated)

        # Resample, unless a number is not finite: then the old state stays whole
        finite = {name: w.is_usable() for name, w in walkers.items()}
        finite["loss"] = jnp.isfinite(loss)
        finite["gradient"] = jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(
            optax.tree.norm(params)
        )
        all_finite = jnp.all(jnp.stack(list(finite.values())))
        ess = {name: w.ess() for name, w in walkers.items()}
        walkers, resampled = self._resample(
            key_resample, all_finite, walkers, state.walkers
        )
        new = JarzynskiState(
            params, state.transforms, optim_state, walkers, scale, key_next
        )
        new = jax.tree.map(
            partial(jnp.where, all_finite),
            _without_ensembles(new),
            _without_ensembles(state),
        )
        new = replace(
            new,
            walkers={
                name: replace(w, ensemble=walkers[name].ensemble)
                for name, w in new.walkers.items()
            },
        )

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
            "grad_norm": optax.tree.norm(grads),
            "finite": finite,
        }
        return new, info

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        init_state: JarzynskiState | None = None,
        init_params: Params | None = None,
        **kwargs: Any,
    ) -> Fit:
        """Train for ``num_steps`` updates; Ctrl-C returns what the last finished chunk
        reached.

        Args:
            rng_key: A JAX PRNG key; not used with ``init_state``, which carries its
                own.
            num_steps: Number of updates.
            args: The model's positional arguments.
            progress_bar: Show loss, ESS and held-out log Z, once per chunk of steps.
            init_state: Continue from here exactly as if the run had not stopped; it
                stays usable.
            init_params: Constrained initial values, instead of the model's own.
            kwargs: The model's keyword arguments.

        Raises:
            NonFiniteError: A step gave a NaN or an infinity; its ``fit`` holds the last
                good state.
        """
        if init_state is None:
            init_state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        return run(
            self,
            init_state,
            num_steps,
            Arguments(args, kwargs),
            progress_bar=progress_bar,
        )

    def get_params(self, state: JarzynskiState) -> Params:
        """Constrained values at the model's ``param`` and unobserved sample sites."""
        return state.constrained_params()

    def refresh(
        self,
        rng_key: Array,
        state: JarzynskiState,
        *args: Any,
        num_temperatures: int = 1000,
        **kwargs: Any,
    ) -> JarzynskiState:
        """Re-anchor log Z: fresh held-out islands, annealed from the start to the
        current parameters.

        Long runs need it: held-out weights keep log Z unbiased, but their variance
        grows.  A warning says where the running value had gone further astray than its
        standard error allows.

        Args:
            rng_key: A JAX PRNG key.
            state: Any state; it is not changed.
            args: The model's positional arguments.
            num_temperatures: Rungs of the annealing, ``num_kernel_steps`` moves each.
            kwargs: The model's keyword arguments.
        """
        bound = BoundModel(
            self.model, state.transforms, rng_key, Arguments(args, kwargs)
        )
        walkers = {}
        for index, (name, old) in enumerate(state.walkers.items()):
            fresh = self._place(
                random.fold_in(rng_key, index),
                name,
                bound,
                state.params,
                num_chains=self.num_holdout_chains,
                num_temperatures=num_temperatures,
                transform=old.transform,
            )
            split = old.num_training_chains
            ensemble = jax.tree.map(
                lambda kept, new, split=split: jnp.concatenate([kept[:split], new]),
                old.ensemble,
                fresh.ensemble,
            )
            walkers[name] = replace(old, ensemble=ensemble)
            _warn_where_log_z_drifted(name, old, walkers[name])
        return replace(state, walkers=walkers)

    def _place(
        self,
        rng_key: Array,
        name: str,
        bound: BoundModel,
        params: Params,
        *,
        num_chains: int,
        num_temperatures: int | None,
        transform: Transform | None = None,
    ) -> Walkers:
        """Walkers of one site at ``params``: exact draws from the start, annealed where that is not the energy."""
        if transform is None:
            distribution = bound.energies(params)[name]
            transform = standardizing_transform(
                starting_distribution(distribution, name)
            )
        site = SiteAtParams(name, bound, params, transform)
        kernel = (
            MALA(self.kernel.step_size)
            if self.kernel.target_acceptance is None
            else self.kernel
        )
        annealed = anneal_site(
            rng_key,
            site,
            kernel,
            AnnealingOptions(
                self.num_kernel_steps, self.ess_threshold, self.resampling
            ),
            num_chains=num_chains,
            num_walkers=self.num_walkers,
            num_temperatures=num_temperatures,
        )
        ensemble, step_size = annealed.ensemble, annealed.ladder.step_sizes[-1]
        _warn_where_islands_disagree(name, ensemble)
        if self.kernel.target_acceptance is None:
            step_size = jnp.full_like(
                step_size, initial_step_size(self.kernel, site.dimension)
            )
        walkers = Walkers(ensemble, step_size, transform, None, self.num_holdout_chains)
        if ensemble.log_normalizer.ndim == 1 and num_chains == self.num_chains:
            return replace(walkers, gradient=initial_gradient(site, walkers))
        return walkers

    def _loss(
        self, bound: BoundModel, walkers: dict[str, Walkers], params: Params
    ) -> Array:
        """Negative log joint; the value of log Z is held out, its gradient comes from the training islands."""

        def normalize(
            name: str, distribution: EnergyDistribution
        ) -> EnergyDistribution:
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

    def _controlled_switch(
        self, bound: BoundModel, state: JarzynskiState, updates: Params
    ) -> tuple[Array, Params, dict[str, Walkers], dict[str, KernelState]]:
        """Take the update, scaled so that the training walkers' conditional ESS stays near its target."""

        def attempt(scale: Array) -> tuple:
            params = optax.apply_updates(
                state.params, jax.tree.map(lambda u: scale * u, updates)
            )
            switched = {
                name: switch(bound, name, params, w)
                for name, w in state.walkers.items()
            }
            walkers = {name: w for name, (w, _, _) in switched.items()}
            evaluated = {name: e for name, (_, e, _) in switched.items()}
            ess = jnp.min(jnp.stack([jnp.min(ess) for _, _, ess in switched.values()]))
            return (scale, params, walkers, evaluated), ess

        if self.ess_target is None:
            return attempt(jnp.ones_like(state.update_scale))[0]
        recovered = jnp.minimum(1.0, 1.01 * state.update_scale)
        first, ess = attempt(recovered)
        shrink = jnp.sqrt((1.0 - self.ess_target) / (1.0 - ess)).astype(recovered.dtype)
        return lax.cond(
            ess < self.ess_target, lambda: attempt(recovered * shrink)[0], lambda: first
        )

    def _move(
        self,
        rng_key: Array,
        bound: BoundModel,
        params: Params,
        walkers: dict[str, Walkers],
        evaluated: dict[str, KernelState],
    ) -> tuple[dict[str, Walkers], dict[str, Array]]:
        """Langevin moves under the new parameters; the step size follows the training islands alone."""
        moved, acceptance = {}, {}
        energies = bound.energies(params)
        for index, (name, site) in enumerate(walkers.items()):
            evaluate = partial(evaluate_at, energies[name], site.transform)
            kernel_state, info = move(
                self.kernel,
                random.fold_in(rng_key, index),
                evaluated[name],
                evaluate,
                site.step_size,
                self.num_kernel_steps,
            )
            islands = site.log_weight.shape[:2]
            kernel_state, info = jax.tree.map(
                lambda v, n=islands: v.reshape(*n, *v.shape[1:]), (kernel_state, info)
            )
            acceptance[name] = jnp.mean(
                info.acceptance[: site.num_training_chains], axis=(0, 1)
            )
            ensemble = site.ensemble._replace(
                position=kernel_state.position,
                potential=kernel_state.potential,
                log_weight=site.log_weight + info.log_weight,
            )
            step_size = adapt_step_size(self.kernel, site.step_size, acceptance[name])
            moved[name] = replace(site, ensemble=ensemble, step_size=step_size)
        return moved, acceptance

    def _resample(
        self,
        rng_key: Array,
        all_finite: Array,
        walkers: dict[str, Walkers],
        previous: dict[str, Walkers],
    ) -> tuple[dict[str, Walkers], dict[str, Array]]:
        """Resample islands whose own ESS is low, or go back to the previous ensembles;
        how many resampled, per site.

        One switch of three branches: selecting between old and new walkers at every
        step would read and write both in full.
        """
        kept, resampled = {}, {}
        for index, (name, site) in enumerate(walkers.items()):
            ensemble, key = site.ensemble, random.fold_in(rng_key, index)
            low = ess_fraction(ensemble.log_weight, axis=1) < self.ess_threshold
            branch = jnp.where(all_finite, jnp.any(low).astype(jnp.int32), 2)
            ensemble = lax.switch(
                branch,
                [
                    lambda old, new, key, low: new,
                    lambda old, new, key, low: resample_islands(
                        key, new, low, self.resampling
                    ),
                    lambda old, new, key, low: old,
                ],
                previous[name].ensemble,
                ensemble,
                key,
                low,
            )
            kept[name] = replace(site, ensemble=ensemble)
            resampled[name] = jnp.sum(low)
        return kept, resampled


def _warn_where_islands_disagree(name: str, ensemble: Ensemble) -> None:
    stderr = float(jnp.max(jackknife_log_mean_exp(ensemble.log_normalizers)[1]))
    if not stderr < 1.0:
        warnings.warn(
            f"Annealing to energy site '{name}': its islands disagree about log Z "
            f"(standard error {stderr:.2g} nats), "
            "so no number that rests on it can be trusted. Take more temperatures or "
            "walkers, or a base nearer to the "
            "energy; if nothing helps, the energy may not be bounded below.",
            stacklevel=4,
        )


def _warn_where_log_z_drifted(name: str, old: Walkers, fresh: Walkers) -> None:
    (was, was_error), (now, now_error) = old.log_normalizer(), fresh.log_normalizer()
    ratios = jnp.abs(was - now) / jnp.hypot(was_error, now_error)
    worst = float(jnp.nanmax(ratios))
    if worst > student_t.ppf(1.0 - 0.005 / ratios.size, old.num_holdout_chains - 1):
        gap = float(jnp.ravel(was - now)[jnp.nanargmax(ratios)])
        warnings.warn(
            f"The running log Z of energy site '{name}' had drifted by {gap:+.2g} "
            f"nats, {worst:.1f} standard errors: "
            "do not use what the history says of the steps before. Refresh more often, "
            "or lower the learning rate.",
            stacklevel=3,
        )


def _without_ensembles(state: JarzynskiState) -> JarzynskiState:
    return replace(
        state,
        walkers={
            name: replace(w, ensemble=None)  # type: ignore[arg-type]
            for name, w in state.walkers.items()
        },
    )
