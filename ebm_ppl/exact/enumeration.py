"""Sums over all states of a finite support."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import logsumexp

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.states import in_blocks, states_in_support
from ebm_ppl.exact.terms import summed
from ebm_ppl.exact.verdict import MAX_ROUNDING, Exact, accuracy, rounding_flag


def enumeration(
    distribution: EnergyDistribution, name: str | None = None
) -> tuple[Array, tuple[str, ...]]:
    """Estimate and flags of :func:`total`."""
    found = total(distribution, name)
    return found.estimate, found.flags


def total(distribution: EnergyDistribution, name: str | None = None) -> Exact:
    """Log Z as a sum over every state of a finite support.

    Args:
        distribution: An energy over a finite discrete support, such as
            ``dist.Bernoulli(0.5).expand([16]).to_event(1)``, ``dist.Multinomial(3,
            probs)``, or a bijection of one.
        name: The site's name, for messages.

    Raises:
        ValueError: The support is not finite, or has more than 2²² states.
    """
    every, inside = states_in_support(distribution.base, distribution.support, name)
    energies = tuple(distribution.factor_energies(every).values())
    log_base = unchecked_log_prob(distribution.base, every)
    log_z, rounding = _sum_over(energies, log_base, inside)
    error = jnp.where(rounding > accuracy(), rounding, 0.0)

    if isinstance(log_z, jax.core.Tracer):
        is_good = jnp.isfinite(log_z) & (rounding <= MAX_ROUNDING)
        return Exact(jnp.where(is_good, log_z, jnp.nan), error, ())
    if not bool(jnp.all(jnp.isfinite(log_z))):
        return Exact(
            log_z,
            error,
            ("the sum is not finite: check that the energy is finite on its support.",),
        )

    worst = float(jnp.max(rounding))
    return Exact(
        log_z,
        error,
        () if worst <= MAX_ROUNDING else (rounding_flag(worst, log_z.dtype),),
    )


@jax.jit
def _sum_over(
    energies: tuple[Array, ...], log_base: Array, inside: Array
) -> tuple[Array, Array]:
    """Log Z, and by how much rounding may have moved it."""
    log_value, magnitude = summed(energies, log_base)
    log_value = jnp.where(inside, log_value, -jnp.inf)
    log_z = logsumexp(logsumexp(in_blocks(log_value), axis=1), axis=0)

    weight = jnp.exp(log_value - log_z)
    weighted = jnp.sum(jnp.where(weight > 0, weight * magnitude, 0.0), axis=0)
    eps = float(jnp.finfo(log_z.dtype).eps)
    return log_z, lax.stop_gradient(eps * (weighted + jnp.abs(log_z)))
