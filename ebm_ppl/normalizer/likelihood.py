"""Score and information of a model with energies, from weighted draws of them.

All along given directions: parameters are ``unravel(flat + directions @ step)``.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.nn import logsumexp

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.programs.products import einsum, matmul
from ebm_ppl.smc.weights import ess_fraction
from ebm_ppl.walkers.switch import merge_islands

# More parameters than this are a net, tested along a few directions of every module.
MAX_PARAMETERS = 1000
# Terms of one sum, where digits matter.
SHORT_SUM = 16
# Roundings of a sum over rows that the score, a difference of two, may be off by.
ROUNDING = 4.0
# Derivatives along so few directions are cheaper forwards.
MAX_FORWARD = 64


def num_params(params: Params) -> int:
    """Number of parameters."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


class Draws(NamedTuple):
    """Draws of one site at the origin of the directions.

    Attributes:
        values: ``(num_chains, num_walkers, *batch, *event)``.
        log_weight: ``(num_chains, num_walkers, *batch)``.
        potential: U at the origin, likewise.
    """

    values: Array
    log_weight: Array
    potential: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bound", "params", "directions", "draws"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LikelihoodSurface:
    """The negative log joint around parameters, log Z by reweighted draws.

    Geyer and Thompson (1992): ``log Z(θ) − log Z(θ₀) = log E_θ₀[exp(U_θ₀ − U_θ)]``.

    Attributes:
        bound: The model on its data.
        params: Unconstrained parameters θ₀ that the draws belong to.
        directions: ``(num_params, k)``.
        draws: By site.
    """

    bound: BoundModel
    params: Params
    directions: Array
    draws: dict[str, Draws]

    @property
    def is_net(self) -> bool:
        """Whether there are too many parameters to be tested one by one."""
        return num_params(self.params) > MAX_PARAMETERS

    def at(self, step: Array) -> Params:
        """Unconstrained parameters a step away."""
        flat, unravel = ravel_pytree(self.params)
        return unravel(flat + matmul(self.directions, step))

    def log_weights(
        self, name: str, distribution: EnergyDistribution
    ) -> tuple[Array, Array]:
        """Log weights of a site's draws under another energy, and log of their sum."""
        draws = self.draws[name]
        potential = distribution.unchecked_potential(draws.values)
        log_weight = draws.log_weight + draws.potential - potential
        total = logsumexp(log_weight, axis=(0, 1))
        return log_weight, total - logsumexp(draws.log_weight, axis=(0, 1))

    def negative_log_joint(self, step: Array, offsets: dict[str, Array]) -> Array:
        """With ``offsets`` added to every log Z."""
        return self.bound.negative_log_joint(
            self.at(step),
            lambda name, distribution: distribution.with_log_normalizer(
                offsets[name] + self.log_weights(name, distribution)[1]
            ),
        )

    def offsets(self) -> dict[str, Array]:
        """Zeros, of every log Z's shape."""
        return {n: jnp.zeros(d.potential.shape[2:]) for n, d in self.draws.items()}


@partial(jax.jit, static_argnames="name")
def site_potential(
    bound: BoundModel, params: Params, name: str, values: Array
) -> Array:
    """U of one site at its draws."""
    return bound.energies(params)[name].unchecked_potential(values)


@jax.jit
def value_and_counts(
    surface: LikelihoodSurface, step: Array
) -> tuple[Array, dict[str, Array]]:
    """Negative log joint at a step, and how often every log Z enters."""
    return jax.value_and_grad(surface.negative_log_joint, argnums=1)(
        step, surface.offsets()
    )


class Quadratic(NamedTuple):
    """A surface near a step.

    Attributes:
        value: Negative log joint.
        score: Minus its gradient, ``(k,)``.
        information: ``(k, k)``.
        noise: Monte Carlo covariance of the score, by the jackknife over islands.
        rounding: Error of the score from floating point, ``(k,)``.
        counts: How often every log Z enters, by site.
        ess: Smallest ESS fraction of the reweighted draws.
    """

    value: Array
    score: Array
    information: Array
    noise: Array
    rounding: Array
    counts: dict[str, Array]
    ess: Array


@jax.jit
def quadratic(surface: LikelihoodSurface, step: Array) -> Quadratic:
    """Value, score, Fisher information and the score's Monte Carlo error."""
    # Score
    value, (gradient, counts) = jax.value_and_grad(
        surface.negative_log_joint, argnums=(0, 1)
    )(step, surface.offsets())

    # Information of the energies
    num = step.shape[0]
    information, left_out, ess = jnp.zeros((num, num)), jnp.zeros((1, num)), []
    size = jnp.zeros(num)
    energies = surface.bound.energies(surface.at(step))
    for name, draws in surface.draws.items():
        log_weight, _ = surface.log_weights(name, energies[name])
        ess.append(jnp.min(ess_fraction(merge_islands(log_weight), axis=0)))
        found, without = _moments(surface, step, name, draws, log_weight, counts[name])
        information += found
        left_out = left_out + without
        size += jnp.max(jnp.abs(without), axis=0)

    # Priors and other sites, the energies held where they are
    def rest(step: Array) -> Array:
        zero = 0.0 * jnp.sum(gradient)
        return surface.bound.negative_log_joint(
            surface.at(step), lambda name, _: energies[name].with_log_normalizer(zero)
        )

    information += jax.hessian(rest)(step)

    # Jackknife over islands
    num_chains = left_out.shape[0]
    spread = left_out - jnp.mean(left_out, axis=0)
    noise = (num_chains - 1) / num_chains * matmul(spread.T, spread)
    rounding = ROUNDING * jnp.finfo(size.dtype).eps * size
    return Quadratic(
        value, -gradient, information, noise, rounding, counts, jnp.min(jnp.stack(ess))
    )


def _moments(
    surface: LikelihoodSurface,
    step: Array,
    name: str,
    draws: Draws,
    log_weight: Array,
    counts: Array,
) -> tuple[Array, Array]:
    """Sums over a site's elements: covariances of ∂U, and its means without each island."""
    batch = math.prod(log_weight.shape[2:])
    log_weight = log_weight.reshape(*log_weight.shape[:2], batch)
    counts = jnp.broadcast_to(counts, draws.potential.shape[2:]).reshape(batch)
    num = step.shape[0]

    def of_element(element: Array) -> tuple[Array, Array]:
        slopes = _slopes(surface, step, name, draws.values, element)
        shape = slopes.shape[:2]
        weight = jax.nn.softmax(log_weight[:, :, element].ravel()).reshape(shape)

        parts = einsum("ci,cik->ck", weight, slopes)
        mean, shares = jnp.sum(parts, axis=0), jnp.sum(weight, axis=1)
        centred = ((slopes - mean) * jnp.sqrt(weight)[..., None]).reshape(-1, num)
        moment = _gram(centred)
        left_out = (mean - parts) / (1.0 - shares[:, None])
        count = counts[element]
        return count * moment, count * left_out

    found, left_out = lax.map(of_element, jnp.arange(batch))
    return jnp.sum(found, axis=0), jnp.sum(left_out, axis=0)


def _gram(rows: Array) -> Array:
    """``rows.T @ rows``, of few columns by sums of few terms.

    Nearly collinear columns are told apart by the last digits, which one long sum loses.
    """
    size, num = rows.shape
    if num > MAX_FORWARD:
        return matmul(rows.T, rows)
    padded = jnp.pad(rows, ((0, -size % SHORT_SUM), (0, 0)))
    blocks = padded.reshape(-1, SHORT_SUM, num)
    found = einsum("gik,gil->gkl", blocks, blocks)
    while len(found) > 1:
        found = jnp.pad(found, ((0, -len(found) % SHORT_SUM), (0, 0), (0, 0)))
        found = jnp.sum(found.reshape(-1, SHORT_SUM, num, num), axis=1)
    return found[0]


def _slopes(
    surface: LikelihoodSurface, step: Array, name: str, values: Array, element: Array
) -> Array:
    """∂U along the directions at every walker, of one batch element."""

    def potential(step: Array, values: Array) -> Array:
        energy = surface.bound.energies(surface.at(step))[name]
        found = energy.unchecked_potential(values)
        return found.reshape(len(values), -1)[:, element]

    def potential_of_one(step: Array, value: Array) -> Array:
        return potential(step, value[None])[0]

    flat: Any = values.reshape(-1, *values.shape[2:])
    if step.shape[0] > MAX_FORWARD:
        found = jax.vmap(jax.grad(potential_of_one), (None, 0))(step, flat)
    else:
        found = jax.jacfwd(potential)(step, flat)
    return found.reshape(*values.shape[:2], -1)
