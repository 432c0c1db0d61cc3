"""Discrete bases as mass functions, whatever transforms them."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ComposeTransform, Transform


class Renamed(constraints.Constraint):
    """The image of a discrete set under a bijection."""

    is_discrete = True

    def __init__(self, original: constraints.Constraint, transform: Transform) -> None:
        self.original = original
        self.transform = transform

    @property
    def event_dim(self) -> int:
        """Number of event dimensions."""
        return self.original.event_dim

    def __call__(self, x: Array) -> Array:
        """Whether x is the image of a point of the support."""
        original = jnp.round(self.transform.inv(x))
        same = jnp.isclose(self.transform(original), x, rtol=1e-5, atol=1e-6)
        event_dim = self.original.event_dim
        return self.original(original) & (
            jnp.all(same, axis=tuple(range(-event_dim, 0))) if event_dim else same
        )

    def __repr__(self) -> str:
        return f"{type(self.transform).__name__} of {self.original}"

    def eq(self, other: object, static: bool = False) -> Any:
        """Equal if both parts are equal."""
        return (
            isinstance(other, Renamed)
            and self.original == other.original
            and self.transform == other.transform
        )

    def tree_flatten(self) -> tuple:
        """Flatten for JAX; ``original`` and ``transform`` are the leaves."""
        return (self.original, self.transform), (("original", "transform"), {})


class _RenamedDistribution(dist.Distribution):
    """The mass function of a bijection of a discrete distribution."""

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("original", "transform")

    def __init__(
        self,
        original: dist.Distribution,
        transform: Transform,
        batch_shape: tuple,
        event_shape: tuple,
    ) -> None:
        self.original = original
        self.transform = transform
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return Renamed(self.original.support, self.transform)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Transformed draws of the original."""
        return self.transform(self.original.sample(key, sample_shape))

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log mass of the original state that ``value`` is the image of."""
        return self.original.log_prob(
            jnp.round(self.transform.inv(value)).astype(jnp.result_type(int))
        )


def mass_function(base: dist.Distribution) -> dist.Distribution:
    """The base itself, or its mass function where it transforms a discrete base."""
    if isinstance(base, dist.TransformedDistribution):
        original = mass_function(base.base_dist)
        if not original.support.is_discrete:
            return base
        transform = (
            base.transforms[0]
            if len(base.transforms) == 1
            else ComposeTransform(base.transforms)
        )
        return _RenamedDistribution(
            original, transform, base.batch_shape, base.event_shape
        )

    if not isinstance(
        base, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
    ):
        return base

    inner = mass_function(base.base_dist)
    if inner is base.base_dist:
        return base
    if isinstance(base, dist.Independent):
        return inner.to_event(base.reinterpreted_batch_ndims)
    return (
        inner.expand(base.batch_shape)
        if isinstance(base, dist.ExpandedDistribution)
        else inner.mask(base._mask)
    )
