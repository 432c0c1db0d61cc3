"""Where walkers start, and the path from there to the energy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.base_programs import draws_of, unchecked_log_prob
from ebm_ppl.energy.coordinates import log_abs_det, standardizing_transform
from ebm_ppl.energy.supports import is_improper, points_in_support, same_support
from ebm_ppl.energy.unnormalized import Unnormalized
from ebm_ppl.energy.wrappers import path_to
from ebm_ppl.errors import UnknownNormalizerError, at_site
from ebm_ppl.kernels.base import Potential
from ebm_ppl.smc.path import Path


def starting_distribution(
    distribution: Unnormalized, name: str | None
) -> dist.Distribution:
    """Where walkers start: ``start`` if it is given, otherwise the base.

    Raises:
        UnknownNormalizerError: That distribution is improper, or an energy.
    """
    start = distribution.base if distribution.start is None else distribution.start
    if is_improper(start):
        found = "base" if distribution.start is None else "start"
        raise UnknownNormalizerError(
            f"The {found} of the energy{at_site(name)} is improper: there is nowhere "
            "to start from and log Z has no anchor. Name a proper starting "
            "distribution: EnergyDistribution(energy, base, "
            "start=dist.Normal(...).to_event(...))."
        )
    # Known by what it has: distributions import this module.
    if path_to(start, lambda part: hasattr(part, "unchecked_potential")):
        raise UnknownNormalizerError(
            f"The {'base' if distribution.start is None else 'start'} of the "
            f"energy{at_site(name)} is an energy itself, whose draws are approximate "
            "(annealed), and nothing that begins from them could be certified. Name a "
            "distribution that draws exactly, such as the inner energy's own base: "
            "EnergyDistribution(energy, inner, start=inner.base)."
        )
    return start


def starting_coordinates(distribution: Unnormalized, name: str | None) -> Transform:
    """The map T from coordinates u, in which the start is standard, to values.

    Raises:
        UnknownNormalizerError: The base is improper and no start is named.
    """
    return standardizing_transform(starting_distribution(distribution, name))


def check_start_covers(distribution: Unnormalized, name: str | None) -> None:
    """Refuse a ``start`` whose support differs from the base's.

    log Z would be that of a smaller or larger set.

    Raises:
        ValueError: Points of either support lie outside the other.
    """
    start = distribution.start
    if start is None or same_support(start.support, distribution.support):
        return

    inside = start.support(points_in_support(distribution.base, random.key(0), 256))
    if not isinstance(inside, jax.core.Tracer) and not bool(jnp.all(inside)):
        raise ValueError(
            f"The start of the energy{at_site(name)} has support {start.support}, "
            f"which leaves out part of the base's, {distribution.support}: log Z would "
            "be that of the smaller set. Name a start over the whole support, or a "
            "base with the smaller one."
        )

    if is_improper(start):
        return
    outside = ~distribution.support(draws_of(start, random.key(1), 256))
    if not isinstance(outside, jax.core.Tracer) and bool(jnp.any(outside)):
        raise ValueError(
            f"The start of the energy{at_site(name)} has support {start.support}, "
            f"which reaches beyond the base's, {distribution.support}: walkers would "
            "leave it. Name a start over the base's support."
        )


def potential_at(
    distribution: Unnormalized, transform: Transform, position: Array
) -> Array:
    """``U_u(u) = U(T(u)) − log|det T'(u)|``, of shape ``(..., *batch_shape)``.

    T is ``transform``, which maps onto the support.
    """
    value = transform(position)
    return distribution.unchecked_potential(value) - log_abs_det(
        transform, position, value
    )


def target_of(distribution: Unnormalized, transform: Transform) -> Potential:
    """The energy as what kernels move under, in the coordinates of ``transform``."""
    return Potential(partial(potential_at, distribution, transform))


def energy_beyond(
    distribution: Unnormalized, start: dist.Distribution, value: Array
) -> Array:
    """``U + log start``, the energy by which the model differs from its start.

    It is E itself where the start is the base; ``exp`` of minus it has mean Z.
    """
    if start is distribution.base:
        return distribution.energy(value)
    return distribution.unchecked_potential(value) + unchecked_log_prob(start, value)


def annealing_path(
    distribution: Unnormalized, start: dist.Distribution, transform: Transform
) -> Path:
    """The path from ``start`` to the energy in coordinates u, with x = transform(u)."""

    def path_start(position: Array) -> Array:
        value = transform(position)
        return -unchecked_log_prob(start, value) - log_abs_det(
            transform, position, value
        )

    def difference(position: Array) -> Array:
        return energy_beyond(distribution, start, transform(position))

    return Path(path_start, difference)
