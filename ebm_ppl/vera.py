"""The VERA backend: a generator trained beside the energy takes the place of Markov
chains.

Grathwohl, Kelly, Hashemi, Norouzi, Swersky and Duvenaud (ICLR 2021), Algorithm 1.
"""

import warnings
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.distribution import EnergyDistribution, starting_distribution
from ebm_ppl.generator import (
    Generator,
    Program,
    estimator,
    fit_score,
    inspect_generator,
)
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import inspect_model
from ebm_ppl.model import Arguments, BoundModel, Model, Params
from ebm_ppl.optimizers import check_on_params, check_optimizer, updates_of
from ebm_ppl.score import HMCScore, ImportanceScore, Score, VariationalScore
from ebm_ppl.training import Fit, as_strong_array, run
from ebm_ppl.weights import ess_fraction

SCORES = {
    "importance": ImportanceScore,
    "variational": VariationalScore,
    "hmc": HMCScore,
}

# Memory, in updates, of the running bound on log Z.
BOUND_MEMORY = 100


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "generator",
        "generator_params",
        "generator_optim_state",
        "score_state",
        "standardizer",
        "log_normalizer_bound",
        "rng_key",
    ],
    meta_fields=["entropy_weight"],
)
@dataclass(frozen=True)
class VERAState:
    """What the next update needs.

    Attributes:
        params: Unconstrained parameters of the model, by site name.
        transforms: Unconstrained to constrained, by site name.
        optim_state: Of the model's optimiser.
        generator: The generator as functions.
        generator_params: Its unconstrained parameters φ.
        generator_optim_state: Of its optimiser.
        score_state: What the score's estimator has learned.
        standardizer: The map from base-standard coordinates to x, frozen at the initial
            parameters.
        log_normalizer_bound: Running mean of ``E_q[−U] + H(q)``.
        rng_key: The key of the next update.
        entropy_weight: λ: the generator is drawn to exp(−U/λ).
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    generator: Generator
    generator_params: Params
    generator_optim_state: Any
    score_state: Any
    standardizer: Transform
    log_normalizer_bound: Array
    rng_key: Array
    entropy_weight: float

    def draws(self, rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        """``(z, x)`` from the generator, ``(num_draws, num_latents)`` and ``(num_draws, *event_shape)``."""
        return self.generator.draws(
            self.generator_params, random.split(rng_key, num_draws)
        )

    def constrained_generator_params(self) -> Params:
        """Values at the generator's ``param`` sites, as ``numpyro.infer.Predictive`` takes them."""
        return self.generator.constrain(self.generator_params)


class _Progress(NamedTuple):
    """The generator's part of a state, through its steps."""

    params: Params
    optim_state: Any
    score_state: Any
    bound: Array


@dataclass(frozen=True, eq=False)
class VERA:
    r"""Maximum likelihood (or MAP) for one energy, by an entropy-regularised generator
    instead of Markov chains.

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
        generator_optim: One for the generator's.  Both without momentum, such as
            ``optax.adam(1e-3, b1=0.0)``: with it the two players circle each other.
        num_particles: Generator draws per step.  Over 256, a number that divides into
            blocks of 64 to 256, inside which draws lend each other their latents
            (:class:`ImportanceScore`).
        entropy_weight: λ.  Other than 1, the generator is drawn to exp(−U/λ), while log
            Z and densities stay those of exp(−U).
        gradient_penalty: γ; 0 leaves it out.  Less than 1 for thin shapes, where
            :func:`log_normalizer` still finds log Z near the generator's bound.
        score: ``"importance"`` (:class:`ImportanceScore`), ``"variational"``
            (:class:`VariationalScore`, the paper's), ``"hmc"`` (:class:`HMCScore`), or
            one of these with options.  A generator without latents needs none: its
            score is exact.
        num_energy_steps: Per update.
        num_generator_steps: Per update.
        importance_weights: True takes :math:`\nabla\log Z` from the draws of the last
            generator step, weighed by exp(−U)/q̂ and self-normalised.  Then a generator
            that lags behind the energy biases it less: by about one over the effective
            sample size (``Fit.history["generator_ess"]`` times ``num_particles``), and
            by the error of q̂, which flows do not have.  It needs a generator near the
            energy: a few effective draws are mostly noise.  Not in the paper.

    Raises:
        ValueError: Options that cannot work.
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
    gradient_penalty: float = 1.0
    score: str | Score = "importance"
    num_energy_steps: int = 1
    num_generator_steps: int = 1
    importance_weights: bool = False

    def __post_init__(self) -> None:
        for option in ("optim", "generator_optim"):
            check_optimizer(option, getattr(self, option))
        for option in ("num_particles", "num_energy_steps", "num_generator_steps"):
            if getattr(self, option) < 1:
                raise ValueError(
                    f"{option} = {getattr(self, option)}; expected at least 1."
                )
        if not self.entropy_weight > 0:
            raise ValueError(
                f"entropy_weight = {self.entropy_weight}; expected a positive number: "
                "without entropy the generator "
                "falls onto one mode."
            )
        if not self.gradient_penalty >= 0:
            raise ValueError(
                f"gradient_penalty = {self.gradient_penalty}; expected 0 or more."
            )
        if isinstance(self.score, str):
            if self.score not in SCORES:
                raise ValueError(
                    f"score = {self.score!r}; expected one of {', '.join(SCORES)}, or "
                    "an ImportanceScore."
                )
            object.__setattr__(self, "score", SCORES[self.score]())

    def init(
        self,
        rng_key: Array,
        *args: Any,
        init_params: Params | None = None,
        **kwargs: Any,
    ) -> VERAState:
        """Check the model and the generator on the data.

        Args:
            rng_key: A JAX PRNG key.
            args: The model's positional arguments.
            init_params: Constrained values for any parameter of the model, instead of
                its own initial value.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError: A model, a generator or data that cannot be fitted; the message
                names the site and the remedy.
        """
        key_model, key_generator, key_score, key_next = random.split(rng_key, 4)
        found = inspect_model(
            key_model, self.model, Arguments(args, kwargs), init_params=init_params
        )
        if len(found.energies) != 1:
            raise ValueError(
                "VERA has one generator, and the model has energy sites "
                f"{sorted(found.energies)}. Fit them one by "
                "one, or together with Jarzynski."
            )
        ((name, distribution),) = found.energies.items()
        if distribution.batch_shape:
            raise ValueError(
                f"Energy site '{name}' has batch shape {distribution.batch_shape}, one "
                "normaliser per element, but the "
                "generator draws for one. Move it into the event (.to_event), or fit "
                "with Jarzynski."
            )
        generator, generator_params = inspect_generator(
            key_generator, self.generator, name, distribution
        )
        check_on_params("optim", self.optim, found.params)
        check_on_params("generator_optim", self.generator_optim, generator_params)
        bound_model = BoundModel(
            self.model, found.transforms, key_model, Arguments(args, kwargs)
        )
        score_state, bound = _fit_first_score(
            self, key_score, bound_model, generator, found.params, generator_params
        )
        state = VERAState(
            params=found.params,
            transforms=found.transforms,
            optim_state=self.optim.init(found.params),
            generator=generator,
            generator_params=generator_params,
            generator_optim_state=self.generator_optim.init(generator_params),
            score_state=score_state,
            standardizer=standardizing_transform(
                starting_distribution(distribution, name)
            ),
            log_normalizer_bound=bound,
            rng_key=key_next,
            entropy_weight=self.entropy_weight,
        )
        return jax.tree.map(as_strong_array, state)

    def update(
        self, state: VERAState, *args: Any, **kwargs: Any
    ) -> tuple[VERAState, dict[str, Any]]:
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
        key_generator, key_energy, key_next = random.split(state.rng_key, 3)
        name, arguments = state.generator.name, Arguments(args, kwargs)

        # Generator
        distribution = BoundModel(
            self.model, state.transforms, key_energy, arguments
        ).energies(state.params)[name]
        progress = _Progress(
            state.generator_params,
            state.generator_optim_state,
            state.score_state,
            state.log_normalizer_bound,
        )
        progress, told = _repeat(
            partial(self._generator_step, state.generator, distribution),
            progress,
            key_generator,
            self.num_generator_steps,
        )

        # Energy
        energy = (state.params, state.optim_state)
        (params, optim_state), (loss, grad_norm) = _repeat(
            partial(self._energy_step, state, arguments, progress, told["draws"]),
            energy,
            key_energy,
            self.num_energy_steps,
        )

        finite = {
            "loss": jnp.isfinite(loss),
            "gradient": jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params)),
            "generator": told["in_support"]
            & jnp.isfinite(told["generator_loss"])
            & _all_finite((progress.params, progress.score_state)),
        }
        new = VERAState(
            params=params,
            transforms=state.transforms,
            optim_state=optim_state,
            generator=state.generator,
            generator_params=progress.params,
            generator_optim_state=progress.optim_state,
            score_state=progress.score_state,
            standardizer=state.standardizer,
            log_normalizer_bound=progress.bound,
            rng_key=key_next,
            entropy_weight=state.entropy_weight,
        )
        all_finite = jnp.all(jnp.stack(list(finite.values())))
        new = jax.tree.map(partial(jnp.where, all_finite), new, state)
        shares = [
            jnp.abs(share)
            for share in state.generator.at_bounds(progress.params).values()
        ]
        info = {
            "loss": loss,
            "generator_loss": told["generator_loss"],
            "entropy": {name: told["entropy"]},
            "generator_ess": {name: told["ess"]},
            "log_normalizer_bound": {name: progress.bound},
            "at_bound": jnp.max(jnp.stack(shares)) if shares else jnp.zeros_like(loss),
            "grad_norm": grad_norm,
            "generator_grad_norm": told["grad_norm"],
            "finite": finite,
        }
        return new, info

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        init_state: VERAState | None = None,
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
            progress_bar: Show both losses, once per chunk of steps.
            init_state: Continue from here exactly as if the run had not stopped; it
                stays usable.
            init_params: Constrained initial values, instead of the model's own.
            kwargs: The model's keyword arguments.

        Raises:
            NonFiniteError: A step gave a NaN or an infinity; its ``fit`` holds the last
                good state.

        Warns:
            UserWarning: The generator's scale stands at an end of its interval, or its
                entropy falls without end.
        """
        if init_state is None:
            init_state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        elif init_state.generator.program.fn is not self.generator:
            raise ValueError(
                "init_state belongs to another generator; continue with the VERA that "
                "made it, or without it."
            )
        init_state = replace(init_state, entropy_weight=self.entropy_weight)
        fit = run(
            self,
            init_state,
            num_steps,
            Arguments(args, kwargs),
            progress_bar=progress_bar,
        )
        _warn_of_bounds(fit)
        _warn_of_collapse(fit, init_state)
        return fit

    def get_params(self, state: VERAState) -> Params:
        """Constrained values at the model's ``param`` and unobserved sample sites."""
        return {
            name: state.transforms[name](value) for name, value in state.params.items()
        }

    def _score_of(self, generator: Generator) -> Score:
        assert not isinstance(self.score, str)
        return estimator(self.score, generator)

    def _generator_step(
        self,
        generator: Generator,
        distribution: EnergyDistribution,
        progress: _Progress,
        rng_key: Array,
    ) -> tuple[_Progress, dict[str, Array]]:
        """One step of φ against a fixed energy, and of the score's estimator."""
        key_draw, key_score = random.split(rng_key)
        keys = random.split(key_draw, self.num_particles)
        values, pull, latents = jax.vjp(
            lambda params: generator.draws(params, keys)[::-1],
            progress.params,
            has_aux=True,
        )
        potential, pull_potential = jax.vjp(distribution._unchecked_potential, values)
        (force,) = pull_potential(jnp.ones_like(potential))
        pair = generator.pair(lax.stop_gradient(progress.params))
        score, score_state = self._score_of(generator).evaluate(
            key_score, progress.score_state, pair, latents, values
        )
        (grads,) = pull(
            (force + self.entropy_weight * score.score) / self.num_particles
        )
        entropy = -jnp.mean(score.log_density)
        loss = jnp.mean(potential) - self.entropy_weight * entropy
        updates, optim_state = updates_of(
            self.generator_optim, grads, progress.optim_state, progress.params, loss
        )
        params = optax.apply_updates(progress.params, updates)
        now = entropy - jnp.mean(potential)
        bound = progress.bound + (now - progress.bound) / BOUND_MEMORY
        told = {
            "generator_loss": loss,
            "entropy": entropy,
            "grad_norm": optax.tree.norm(grads),
            "in_support": jnp.all(distribution.support(values)),
            "ess": ess_fraction(-potential - score.log_density),
            "draws": (values, score.log_density),
        }
        return _Progress(params, optim_state, score_state, bound), told

    def _energy_step(
        self,
        state: VERAState,
        arguments: Arguments,
        progress: _Progress,
        draws: tuple[Array, Array],
        energy: tuple[Params, Any],
        rng_key: Array,
    ) -> tuple[tuple[Params, Any], tuple[Array, Array]]:
        """One step of θ against fixed draws of the generator: fresh ones, or ``draws`` and their log q̂, weighed."""
        params, optim_state = energy
        key_model, key_draw = random.split(rng_key)
        bound = BoundModel(self.model, state.transforms, key_model, arguments)
        values, log_density = draws
        if not self.importance_weights:
            _, values = state.generator.draws(
                progress.params, random.split(key_draw, self.num_particles)
            )

        def normalize(
            name: str, distribution: EnergyDistribution
        ) -> EnergyDistribution:
            potential = distribution._unchecked_potential(values)
            if self.importance_weights:
                weights = lax.stop_gradient(jax.nn.softmax(-potential - log_density))
                surrogate = -jnp.sum(weights * potential)
            else:
                surrogate = -jnp.mean(potential)
            log_z = progress.bound + surrogate - lax.stop_gradient(surrogate)
            if self.gradient_penalty:
                distribution = _penalized(
                    distribution, state.standardizer, self.gradient_penalty
                )
            return distribution.with_log_normalizer(log_z)

        loss, grads = jax.value_and_grad(
            partial(bound.negative_log_joint, normalize=normalize)
        )(params)
        updates, optim_state = updates_of(self.optim, grads, optim_state, params, loss)
        return (optax.apply_updates(params, updates), optim_state), (
            loss,
            optax.tree.norm(grads),
        )


def _all_finite(tree: Any) -> Array:
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _penalized(
    distribution: EnergyDistribution, transform: Transform, weight: float
) -> EnergyDistribution:
    """The energy plus ``½ weight ‖∇E‖²``, the gradient in base-standard coordinates."""

    def penalized(values: Array) -> Array:
        energy, pull = jax.vjp(distribution.energy, values)
        _, pull_transform = jax.vjp(transform, transform.inv(values))
        (grad,) = pull_transform(*pull(jnp.ones_like(energy)))
        return energy + 0.5 * weight * jnp.sum(
            grad.reshape(len(energy), -1) ** 2, axis=1
        )

    return EnergyDistribution(
        penalized,
        distribution.base,
        start=distribution.start,
        validate_args=distribution._validate_args,
    )


def _repeat(step: Any, carry: Any, rng_key: Array, num_steps: int) -> tuple[Any, Any]:
    """``step(carry, key)`` so many times; what the last one said."""
    if num_steps == 1:
        return step(carry, rng_key)
    carry, told = lax.scan(step, carry, random.split(rng_key, num_steps))
    return carry, jax.tree.map(lambda leaf: leaf[-1], told)


@partial(jax.jit, static_argnums=0)
def _fit_first_score(
    backend: VERA,
    rng_key: Array,
    bound: BoundModel,
    generator: Generator,
    params: Params,
    generator_params: Params,
) -> tuple[Any, Array]:
    """The score's estimator fitted to the first generator, before any gradient rests on it, and ``E_q[−U] + H(q)``."""
    distribution = bound.energies(params)[generator.name]

    def elbo(values: Array, log_density: Array) -> Array:
        return -jnp.mean(distribution._unchecked_potential(values) + log_density)

    score = backend._score_of(generator)
    score_state, bounds = fit_score(
        score, rng_key, generator, generator_params, backend.num_particles, elbo
    )
    return score_state, jnp.mean(bounds[-BOUND_MEMORY:])


def _warn_of_bounds(fit: Fit) -> None:
    recent = (
        fit.history["at_bound"][-max(1, len(fit.history["at_bound"]) // 4) :]
        if fit.history
        else np.zeros(0)
    )
    if len(recent) < 50 or not np.mean(recent >= 0.5) > 0.5:
        return
    shares = fit.state.generator.at_bounds(fit.state.generator_params)
    for name, share in jax.device_get(shares).items():
        if abs(share) < 0.5:
            continue
        end, why = (
            (
                "lower",
                "the generator wants to be sharper than that, or is collapsing: widen "
                "the interval downwards, or ",
            )
            if share > 0
            else (
                "upper",
                "its net explains too little: take a larger net or more latents, ",
            )
        )
        warnings.warn(
            f"Generator parameter '{name}' has stood at the {end} end of its interval "
            "for most of the last quarter of "
            f"the run: {why}raise the generator's learning rate.",
            stacklevel=3,
        )


def _warn_of_collapse(fit: Fit, init_state: VERAState) -> None:
    """Entropy that still falls, and fast, in the last third of a run."""
    if not fit.history:
        return
    (entropy,) = fit.history["entropy"].values()
    if len(entropy) < 300:
        return
    size = max(
        1, len(jax.tree.leaves(init_state.generator_params)) and _event_size(init_state)
    )
    parts = [np.mean(part) for part in np.array_split(np.asarray(entropy, float), 6)]
    middle, late = parts[2] - parts[3], parts[4] - parts[5]
    if late > 0.25 * size and late >= 0.5 * middle:
        warnings.warn(
            f"The generator's entropy falls without end (by {late:.2g} nats over the "
            "last sixth of the run, now "
            f"{parts[5]:.3g}): it is collapsing onto few points. Raise entropy_weight "
            "or gradient_penalty, lower the "
            "model's learning rate, or take more num_generator_steps.",
            stacklevel=3,
        )


def _event_size(state: VERAState) -> int:
    _, shape = jax.eval_shape(lambda s: s.draws(s.rng_key, 1), state)
    return int(np.prod(shape.shape[1:]))
