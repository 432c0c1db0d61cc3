"""log Z without sampling: a trapezoid rule in one or two dimensions, and sums over finite supports.

Both are differentiable in the energy's parameters, so that they can stand inside a model under NUTS or SVI.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax
from jax.nn import logsumexp
from numpyro.distributions.transforms import AffineTransform, IdentityTransform, IndependentTransform, Transform

from ebm_ppl.distribution import EnergyDistribution, is_improper, potential_at, same_support
from ebm_ppl.errors import at_site
from ebm_ppl.geometry import CholeskyAffine, standardizing_transform

DEFAULT_POINTS = {1: 2_049, 2: 513}
MAX_STATES = 2**22
# Where the rule stops: nothing is known of an integrand beyond it, so its weight there must have vanished.
REACH = 1e4
MAX_MISSED = 1e-6


def quadrature(
    distribution: EnergyDistribution, name: str | None = None, num_points: int | None = None
) -> tuple[Array, tuple[str, ...]]:
    """Log Z by the trapezoid rule, which converges exponentially for smooth integrands.

    Trefethen and Weideman (2014).  In coordinates in which the base is standard, ``u = sinh(t)`` on an even grid
    in t.  The rule is checked against itself at half the points, and for weight that it misses beyond its ends.

    Args:
        distribution: An energy over at most two unconstrained dimensions.
        name: The site's, for messages.
        num_points: Per dimension, odd.

    Returns:
        log Z, ``batch_shape``, and the reasons to doubt it.  Under a trace, where no reason can be read, log Z is NaN
        instead.

    Raises:
        ValueError: More than two dimensions, or a discrete support.
    """
    if distribution.support.is_discrete:
        raise ValueError(
            f"The energy{at_site(name)} has a discrete support ({distribution.support}); expected a continuous one. "
            "A finite support can be summed: method='enumeration'."
        )
    transform = _coordinates(distribution)
    event_shape = transform.inverse_shape(distribution.batch_shape + distribution.event_shape)
    event_shape = event_shape[len(distribution.batch_shape) :]
    num_dims = math.prod(event_shape)
    if num_dims not in DEFAULT_POINTS:
        raise ValueError(
            f"The energy{at_site(name)} has {num_dims} unconstrained dimensions; quadrature serves one or two. "
            "Use method='bracket'."
        )
    num_points = DEFAULT_POINTS[num_dims] if num_points is None else num_points
    if num_points < 9 or num_points % 2 == 0:
        raise ValueError(f"num_points = {num_points}; expected an odd number of at least 9.")
    dtype = jnp.result_type(float)
    # A bijector's tails fall like exp(−|u|); past −log(eps) its values are those of the support's ends.
    reach = REACH if _is_affine(transform) else -math.log(float(jnp.finfo(dtype).eps))
    grid = jnp.linspace(-math.asinh(reach), math.asinh(reach), num_points, dtype=dtype)
    mesh = jnp.stack(jnp.meshgrid(*[grid] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    position = jnp.sinh(mesh).reshape(-1, *(1,) * len(distribution.batch_shape), *event_shape)
    position = jnp.broadcast_to(position, (len(mesh), *distribution.batch_shape, *event_shape))
    # Points where the energy is infinite count nothing, and must not meet its derivative: 0 · inf is NaN.
    outside = jnp.isposinf(lax.stop_gradient(potential_at(distribution, transform, position)))
    inside = jnp.where(outside.reshape(outside.shape + (1,) * len(event_shape)), 0.0, position)
    potential = jnp.where(outside, jnp.inf, potential_at(distribution, transform, inside))
    log_jacobian = jnp.log(jnp.cosh(mesh)).sum(-1).reshape(-1, *(1,) * len(distribution.batch_shape))
    values = (log_jacobian - potential).reshape(*(num_points,) * num_dims, *distribution.batch_shape)
    axes = tuple(range(num_dims))
    log_step = math.log(float(2 * math.asinh(reach) / (num_points - 1)))
    fine = logsumexp(values, axis=axes) + num_dims * log_step
    coarse = logsumexp(values[(slice(None, None, 2),) * num_dims], axis=axes) + num_dims * (log_step + math.log(2.0))
    missed = _share_beyond_the_ends(values, num_dims)
    # For smooth integrands the fine rule's error is about the square of this; for others no smaller.
    allowed = max(1e-6, 100 * float(jnp.finfo(dtype).eps))
    disagreement = jnp.abs(fine - coarse)
    good = (disagreement < allowed) & (missed < MAX_MISSED)
    if isinstance(fine, jax.core.Tracer):
        return jnp.where(good, fine, jnp.nan), ()
    flags = []
    if not bool(jnp.all(jnp.isfinite(fine))):
        flags.append("the integral is not finite: check that the energy is finite on its support.")
    elif not bool(jnp.all(missed < MAX_MISSED)):
        flags.append(
            f"{float(jnp.max(missed)):.1e} of the integral lies beyond the ends of the grid: the energy may not be "
            "bounded below, or its scale is far from the base's."
        )
    elif not bool(jnp.all(good)):
        flags.append(
            f"half the points give log Z {float(jnp.max(disagreement)):.1e} away: take more num_points, a base nearer "
            "to the energy, or a smooth energy (truncate by the base's support, not by infinite energies)."
        )
    return fine, tuple(flags)


def _share_beyond_the_ends(values: Array, num_dims: int) -> Array:
    """Weight that the grid misses over what it holds, if every end goes on falling as between its last two points."""
    total = logsumexp(values, axis=tuple(range(num_dims)))
    missed = jnp.zeros_like(total)
    for axis in range(num_dims):
        for last, inner in ((0, 1), (-1, -2)):
            log_share, log_inner = (
                logsumexp(jnp.take(values, index, axis=axis), axis=tuple(range(num_dims - 1))) - total
                for index in (last, inner)
            )
            ratio = jnp.expm1(log_inner - log_share)
            share = jnp.exp(log_share)
            beyond = jnp.where(ratio > 0, share / ratio, jnp.inf)
            missed += jnp.where(share > 0, beyond, 0.0)
    return missed


def _coordinates(distribution: EnergyDistribution) -> Transform:
    base = distribution.base
    start = distribution.start
    if is_improper(base) and start is not None and same_support(start.support, base.support):
        base = start
    return standardizing_transform(base)


def _is_affine(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, AffineTransform | IdentityTransform | CholeskyAffine)


def enumeration(distribution: EnergyDistribution, name: str | None = None) -> tuple[Array, tuple[str, ...]]:
    """Log Z as a sum over every state of a finite support.

    Args:
        distribution: An energy whose base has independent elements with an enumerable support, such as
            ``dist.Bernoulli(0.5).expand([16]).to_event(1)``.
        name: The site's, for messages.

    Returns:
        log Z, ``batch_shape``, and the reasons to doubt it (an energy that is not finite).

    Raises:
        ValueError: A support that is not finite, or has more than 2²² states.
    """
    element: Any = distribution.base
    while isinstance(element, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        element = element.base_dist
    if not element.has_enumerate_support or element.event_shape:
        raise ValueError(
            f"The energy{at_site(name)} has support {distribution.support}, which cannot be enumerated; expected a "
            "base of independent Bernoulli, categorical, binomial or discrete uniform elements. Use method='bracket'."
        )
    support = element.enumerate_support(expand=False).reshape(-1)
    size, num_elements = support.shape[0], math.prod(distribution.event_shape)
    num_states = size**num_elements
    if num_states > MAX_STATES:
        raise ValueError(
            f"The energy{at_site(name)} has {size}^{num_elements} states; enumeration serves up to {MAX_STATES:,}."
        )
    places = size ** jnp.arange(num_elements)
    digits = (jnp.arange(num_states)[:, None] // places) % size
    states = support[digits].reshape(-1, *(1,) * len(distribution.batch_shape), *distribution.event_shape)
    states = jnp.broadcast_to(states, (num_states, *distribution.batch_shape, *distribution.event_shape))
    log_z = logsumexp(-distribution.potential(states), axis=0)
    if isinstance(log_z, jax.core.Tracer):
        return jnp.where(jnp.isfinite(log_z), log_z, jnp.nan), ()
    if bool(jnp.all(jnp.isfinite(log_z))):
        return log_z, ()
    return log_z, ("the sum is not finite: check that the energy is finite on its support.",)
