"""Properties of supports and base distributions that need no energy."""

from functools import partial

import jax
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    IdentityTransform,
    IndependentTransform,
    Transform,
    biject_to,
)

from ebm_ppl.energy.base_programs import draws_of
from ebm_ppl.energy.wrappers import elementwise, innermost


def is_improper(base: dist.Distribution) -> bool:
    """Whether a base is, under any wrapper, an ``ImproperUniform`` or masked."""
    while hasattr(base, "base_dist"):
        if isinstance(base, dist.MaskedDistribution) and base._mask is not True:
            return True
        base = base.base_dist
    return isinstance(base, dist.ImproperUniform)


def same_support(one: constraints.Constraint, other: constraints.Constraint) -> bool:
    """Whether two constraints are the same but for event dims; False if unknown."""
    return elementwise(one) is elementwise(other)


def bijector_of(base: dist.Distribution) -> Transform:
    """NumPyro's bijection from unconstrained space onto a base's support.

    Raises:
        NotImplementedError: NumPyro has none.
    """
    try:
        return biject_to(base.support)
    except NotImplementedError as error:
        inner = innermost(base)
        raise NotImplementedError(
            f"A {type(inner).__name__} has support {base.support}, which NumPyro "
            "cannot map the whole space onto, so walkers and quadrature have no "
            "coordinates there. Take a base over the real line, a half-line, an "
            "interval or a simplex, and write the energy of x there."
        ) from error


def points_in_support(
    base: dist.Distribution, rng_key: Array, num_points: int
) -> Array:
    """Scattered points of a base's support, ``(num_points, *batch, *event)``.

    A continuous base need not have a sampler.
    """
    if base.support.is_discrete:
        return draws_of(base, rng_key, num_points)

    transform = bijector_of(base)
    shape = transform.inverse_shape(base.batch_shape + base.event_shape)

    # Scales at which a bijector's values still differ from the support's ends, and far
    # larger ones where the support has no ends.
    inner = transform
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    reach = 1e4 if isinstance(inner, IdentityTransform) else 3.0

    return transform(_scattered(rng_key, (num_points, *shape), reach))


@partial(jax.jit, static_argnums=(1, 2))
def _scattered(rng_key: Array, shape: tuple[int, ...], reach: float) -> Array:
    """Normal points at scales from 1 to ``reach``, one scale for each."""
    key_scale, key_points = random.split(rng_key)
    scales = reach ** random.uniform(key_scale, (shape[0], *(1,) * (len(shape) - 1)))
    return scales * random.normal(key_points, shape)
