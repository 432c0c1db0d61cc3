"""The generator's step and the energy's step of a VERA update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random

from ebm_ppl.backends.vera.penalty import with_penalty
from ebm_ppl.backends.vera.state import GeneratorProgress, VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.generators.program import Generator
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model, Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.weights import ess_fraction
from ebm_ppl.training.optimizers import updates_of

# Time constant of the running mean of the bound on log Z, in updates.
BOUND_MEMORY = 100


class GeneratorInfo(NamedTuple):
    """Draws and diagnostics of one generator step.

    Attributes:
        loss: ``E_q[U] − λ H(q)``.
        entropy: H(q), estimated.
        grad_norm: Norm of the gradient.
        in_support: Whether all draws lie in the energy's support.
        ess: ESS fraction of the draws under importance weights exp(−U)/q̂.
        values: The draws.
        log_density: Their log q̂.
    """

    loss: Array
    entropy: Array
    grad_norm: Array
    in_support: Array
    ess: Array
    values: Array
    log_density: Array


def generator_step(
    optim: optax.GradientTransformation,
    generator: Generator,
    score: Score,
    distribution: EnergyDistribution,
    num_particles: int,
    entropy_weight: float,
    progress: GeneratorProgress,
    rng_key: Array,
) -> tuple[GeneratorProgress, GeneratorInfo]:
    """One step of φ at a fixed energy, and one of the score estimator."""
    # Draws and forces
    key_draw, key_score = random.split(rng_key)
    keys = random.split(key_draw, num_particles)
    values, pull, latents = jax.vjp(
        lambda params: generator.draws(params, keys)[::-1],
        progress.params,
        has_aux=True,
    )
    potential, pull_potential = jax.vjp(distribution.unchecked_potential, values)
    (force,) = pull_potential(jnp.ones_like(potential))

    # Score
    pair = generator.pair(lax.stop_gradient(progress.params))
    found, score_state = score.evaluate(
        key_score, progress.score_state, pair, latents, values
    )
    (grads,) = pull((force + entropy_weight * found.score) / num_particles)

    # Step
    entropy = -jnp.mean(found.log_density)
    loss = jnp.mean(potential) - entropy_weight * entropy
    updates, optim_state = updates_of(
        optim, grads, progress.optim_state, progress.params, loss
    )
    params = optax.apply_updates(progress.params, updates)
    now = entropy - jnp.mean(potential)
    bound = running_mean(progress.bound, now)

    info = GeneratorInfo(
        loss,
        entropy,
        optax.tree.norm(grads),
        jnp.all(distribution.support(values)),
        ess_fraction(-potential - found.log_density),
        values,
        found.log_density,
    )
    return GeneratorProgress(params, optim_state, score_state, bound), info


def running_mean(old: Array, now: Array) -> Array:
    """A mean over about the last ``BOUND_MEMORY`` updates."""
    return old + (now - old) / BOUND_MEMORY


def energy_step(
    optim: optax.GradientTransformation,
    model: Model,
    state: VERAState,
    arguments: Arguments,
    progress: GeneratorProgress,
    level: Array,
    weighed: tuple[Array, Array] | None,
    num_particles: int,
    gradient_penalty: float,
    energy: tuple[Params, Any],
    rng_key: Array,
) -> tuple[tuple[Params, Any], tuple[Array, Array]]:
    """One step of θ at a fixed generator.

    Args:
        optim: The model's optimiser.
        model: The model.
        state: The state before the update.
        arguments: The model's arguments.
        progress: The generator after its steps.
        level: What the loss takes for log Z; its gradient comes from the draws.
        weighed: Draws and the log density q̂ that they come from, to be weighted by
            exp(−U)/q̂; None for fresh draws of the generator with equal weights.
        num_particles: Number of fresh draws.
        gradient_penalty: γ.
        energy: θ and the optimiser's state.
        rng_key: A JAX PRNG key.

    Returns:
        θ and the optimiser's state; the loss and the norm of its gradient.
    """
    params, optim_state = energy
    key_model, key_draw = random.split(rng_key)
    bound = BoundModel(model, state.transforms, key_model, arguments)
    if weighed is None:
        keys = random.split(key_draw, num_particles)
        _, values = state.generator.draws(progress.params, keys)
    else:
        values, log_density = weighed

    def normalize(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
        potential = distribution.unchecked_potential(values)
        if weighed is None:
            surrogate = -jnp.mean(potential)
        else:
            weights = lax.stop_gradient(jax.nn.softmax(-potential - log_density))
            surrogate = -jnp.sum(weights * potential)
        log_z = level + surrogate - lax.stop_gradient(surrogate)

        if gradient_penalty:
            distribution = with_penalty(
                distribution, state.coordinates, gradient_penalty
            )
        return distribution.with_log_normalizer(log_z)

    loss, grads = jax.value_and_grad(bound.negative_log_joint)(params, normalize)
    updates, optim_state = updates_of(optim, grads, optim_state, params, loss)
    energy = (optax.apply_updates(params, updates), optim_state)
    return energy, (loss, optax.tree.norm(grads))


def repeat(step: Any, carry: Any, rng_key: Array, num_steps: int) -> tuple[Any, Any]:
    """``step(carry, key)``, ``num_steps`` times: the carry and the last step's info."""
    if num_steps == 1:
        return step(carry, rng_key)
    carry, infos = lax.scan(step, carry, random.split(rng_key, num_steps))
    return carry, jax.tree.map(lambda leaf: leaf[-1], infos)
