"""An energy as a density over a box in t.

``u = sinh(t)`` are the coordinates in which the base is standard.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.transforms import (
    AffineTransform,
    IdentityTransform,
    IndependentTransform,
    Transform,
)

from ebm_ppl.energy.coordinates import (
    CholeskyAffine,
    log_abs_det,
    standardizing_transform,
)
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import is_improper, same_support, unchecked_log_prob
from ebm_ppl.errors import at_site
from ebm_ppl.exact.judge import Density, Rows

# The box's end in u: the integrand is unknown beyond it, so its mass there must be
# negligible.
REACH = 1e4


class Integrand:
    """log of ``base(x) exp(−E(x)) |dx/dt|`` over a box of t.

    The box is ``[−half_width, half_width]^dims``.
    """

    def __init__(self, distribution: EnergyDistribution, name: str | None) -> None:
        self.distribution = distribution
        self.transform = _coordinates(distribution)
        self.batch_shape = distribution.batch_shape
        shape = self.transform.inverse_shape(
            distribution.batch_shape + distribution.event_shape
        )

        self.event_shape = shape[len(distribution.batch_shape) :]
        self.dims = math.prod(self.event_shape)
        if self.dims not in (1, 2):
            raise ValueError(
                f"The energy{at_site(name)} has {self.dims} unconstrained dimensions; "
                "quadrature serves one or two. Use method='bracket'."
            )

        self.dtype = jnp.result_type(float)
        # A bijector's tails fall like exp(−|u|); past −log(eps) its values round to the
        # support's ends.
        is_affine = _is_affine(self.transform)
        reach = REACH if is_affine else -math.log(float(jnp.finfo(self.dtype).eps))
        self.steepening = 0.0 if is_affine else 1.0
        self.half_width = math.asinh(reach)
        self.has_slopes = True

    @property
    def batch(self) -> int:
        """Number of batch elements."""
        return math.prod(self.batch_shape)

    def density(self, position: Array, with_slopes: bool) -> Density:
        """The log density at t, ``(num_points, batch, dims)``.

        There are no slopes where the energy has no derivative.
        """
        if with_slopes and self.has_slopes:
            try:
                return self._with_slopes(position)
            except Exception:
                # An energy that fails itself raises again below; otherwise only its
                # derivative failed.
                self.has_slopes = False

        _, log_density, magnitude = self._at(position)
        return Density(log_density, magnitude)

    def _with_slopes(self, position: Array) -> Density:
        """The density with slopes by forward derivatives.

        They cost little where every operation is dispatched on its own.
        """
        slopes = []
        for axis in range(self.dims):
            along = jnp.broadcast_to(
                jnp.asarray(np.eye(self.dims)[axis], position.dtype), position.shape
            )
            (value, log_density, magnitude), (_, slope, _) = jax.jvp(
                self._at, (position,), (along,)
            )
            slopes.append(slope)

        # Rounding of the values shifts the energy too.
        _, (by_scale, _) = jax.jvp(self._potential, (value,), (value,))
        magnitude = magnitude + jnp.abs(by_scale).reshape(magnitude.shape)
        return Density(log_density, magnitude, jnp.stack(slopes, axis=-1))

    def _at(self, position: Array) -> tuple[Array, Array, Array]:
        """x, the log density, and the magnitude of the terms that it is the sum of."""
        unconstrained = jnp.sinh(position).reshape(
            -1, *self.batch_shape, *self.event_shape
        )
        value = self.transform(unconstrained)
        potential, magnitude = self._potential(value)

        log_det = log_abs_det(self.transform, unconstrained, value)
        log_jacobian = jnp.log(jnp.cosh(position)).sum(-1)
        log_density = log_jacobian + (log_det - potential).reshape(log_jacobian.shape)
        return value, log_density, magnitude.reshape(log_jacobian.shape)

    def _potential(self, value: Array) -> tuple[Array, Array]:
        """U, and the magnitude of the terms that it is the sum of."""
        energies = self.distribution.factor_energies(value).values()
        log_base = unchecked_log_prob(self.distribution.base, value)
        potential = sum(energies) - log_base
        magnitude = sum(jnp.abs(energy) for energy in energies) + jnp.abs(log_base)
        return potential, jnp.broadcast_to(magnitude, potential.shape)

    def rows(self, values: Array) -> Rows:
        """Data rows, ``(num_rows, *batch_shape, *event_shape)``, in coordinates t."""
        values = jnp.asarray(values, self.dtype)
        event_dims = tuple(range(1 + len(self.batch_shape), values.ndim))
        position = self.transform.inv(values).reshape(
            len(values), self.batch, self.dims
        )
        position = jnp.arcsinh(position)

        is_valid = jnp.isfinite(values).all(event_dims) & self.distribution.support(
            values
        )
        is_valid = is_valid.reshape(position.shape[:2]) & jnp.isfinite(position).all(-1)
        position = jnp.where(is_valid[..., None], position, 0.0)
        return Rows(position, is_valid, self.density(position, False))


def _coordinates(distribution: EnergyDistribution) -> Transform:
    base = distribution.base
    start = distribution.start
    if (
        is_improper(base)
        and start is not None
        and same_support(start.support, base.support)
    ):
        base = start
    return standardizing_transform(base)


def _is_affine(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, AffineTransform | IdentityTransform | CholeskyAffine)
