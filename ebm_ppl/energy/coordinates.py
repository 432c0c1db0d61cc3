"""Coordinates u in which a base distribution is standard: ``x = T(u)``.

Walkers move in u, the energy sees x.  A normal base gives its affine map, a transformed
normal base that map followed by its transforms, everything else ``biject_to(support)``.
"""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    IdentityTransform,
    IndependentTransform,
    Transform,
)

from ebm_ppl.energy.mixture import NormalMixture
from ebm_ppl.energy.opaque import traceable
from ebm_ppl.energy.supports import bijector_of
from ebm_ppl.energy.wrappers import innermost
from ebm_ppl.programs.products import einsum, matmul


class CholeskyAffine(Transform):
    """``x = loc + L u`` as one matrix product over all leading dimensions.

    NumPyro's ``LowerCholeskyAffine`` multiplies one matrix by one vector per walker,
    several times slower on an ensemble.  ``loc``: ``(*batch, d)``; ``scale_tril``:
    ``(*batch, d, d)`` or ``(d, d)``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, loc: Array, scale_tril: Array) -> None:
        self.loc = loc
        self.scale_tril = scale_tril

    def __call__(self, x: Array) -> Array:
        """Map u to x."""
        if self.scale_tril.ndim == 2:
            return self.loc + matmul(x, self.scale_tril.T)
        return self.loc + einsum("...ij,...j->...i", self.scale_tril, x)

    def _inverse(self, y: Array) -> Array:
        return solve_triangular(self.scale_tril, (y - self.loc)[..., None], lower=True)[
            ..., 0
        ]

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: object = None
    ) -> Array:
        """``log |det L|``, of shape ``x.shape[:-1]``."""
        log_det = jnp.log(jnp.diagonal(self.scale_tril, axis1=-2, axis2=-1)).sum(-1)
        return jnp.broadcast_to(log_det, x.shape[:-1])

    def tree_flatten(self) -> tuple:
        """Flatten for JAX; ``loc`` and ``scale_tril`` are the leaves."""
        return (self.loc, self.scale_tril), (("loc", "scale_tril"), {})

    def eq(self, other: object, static: bool = False) -> bool:
        """Two maps are equal only if they are the same object."""
        return self is other


def standardizing_transform(base: dist.Distribution) -> Transform:
    """Return the bijection x = T(u) for which ``base`` is (close to) standard in u.

    ``T.log_abs_det_jacobian`` has the batch shape of ``base``: event dimensions are
    summed.
    """
    inner = innermost(base)
    # The map u → |u| has no inverse: a folded base takes its support's bijection.
    is_folded = isinstance(inner, dist.TransformedDistribution) and any(
        isinstance(part, AbsTransform) for part in inner.transforms
    )
    if isinstance(inner, dist.TransformedDistribution) and not is_folded:
        parts = [standardizing_transform(inner.base_dist), *inner.transforms]
        return _sum_event_dims(traceable(ComposeTransform(parts)), base)
    if isinstance(inner, dist.Normal):
        return _sum_event_dims(
            AffineTransform(_like(base, inner.loc), _like(base, inner.scale)), base
        )
    if isinstance(inner, dist.MultivariateNormal) and len(base.event_shape) == 1:
        return CholeskyAffine(jnp.asarray(inner.loc), inner.scale_tril)
    if isinstance(inner, NormalMixture):
        return CholeskyAffine(inner.mean, jnp.linalg.cholesky(inner.covariance_matrix))
    return _sum_event_dims(bijector_of(base), base)


def log_abs_det(transform: Transform, position: Array, value: Array) -> Array:
    """``log|det T'(u)|``, broadcastable to the batch shape.

    A constant is summed once, not for every walker.
    """
    if isinstance(transform, IndependentTransform):
        inner = transform.base_transform
        if isinstance(inner, IdentityTransform):
            return jnp.zeros(())
        if isinstance(inner, AffineTransform):
            axes = tuple(range(-transform.reinterpreted_batch_ndims, 0))
            return jnp.sum(jnp.log(jnp.abs(inner.scale)), axis=axes)
    return transform.log_abs_det_jacobian(position, value)


def _like(wrapped: dist.Distribution, value: Array) -> Array:
    # Follows the wrappers outwards: expanding may broadcast, `Independent` only
    # reinterprets dimensions.
    if isinstance(wrapped, dist.Independent | dist.MaskedDistribution):
        return _like(wrapped.base_dist, value)
    if isinstance(wrapped, dist.ExpandedDistribution):
        value = _like(wrapped.base_dist, value)
    return jnp.broadcast_to(value, wrapped.batch_shape + wrapped.event_shape)


def _sum_event_dims(transform: Transform, base: dist.Distribution) -> Transform:
    missing = len(base.event_shape) - transform.codomain.event_dim
    return IndependentTransform(transform, missing) if missing > 0 else transform
