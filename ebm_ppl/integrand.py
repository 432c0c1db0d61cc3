"""An energy as a density over a box, in coordinates ``u = sinh(t)`` in which its base is standard."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.transforms import AffineTransform, IdentityTransform, IndependentTransform, Transform

from ebm_ppl.cubature import Density, Rows
from ebm_ppl.distribution import EnergyDistribution, is_improper, same_support, unchecked_log_prob
from ebm_ppl.errors import at_site
from ebm_ppl.geometry import CholeskyAffine, log_abs_det, standardizing_transform

# Where the box stops: nothing is known of an integrand beyond it, so its weight there must have vanished.
REACH = 1e4


class Integrand:
    """log of ``base(x) exp(−E(x)) |dx/dt|``, and the box of t, ``[−half_width, half_width]^dims``."""

    def __init__(self, distribution: EnergyDistribution, name: str | None) -> None:
        self.distribution = distribution
        self.transform = _coordinates(distribution)
        self.batch_shape = distribution.batch_shape
        shape = self.transform.inverse_shape(distribution.batch_shape + distribution.event_shape)
        self.event_shape = shape[len(distribution.batch_shape) :]
        self.dims = math.prod(self.event_shape)
        if self.dims not in (1, 2):
            raise ValueError(
                f"The energy{at_site(name)} has {self.dims} unconstrained dimensions; quadrature serves one or two. "
                "Use method='bracket'."
            )
        self.dtype = jnp.result_type(float)
        # A bijector's tails fall like exp(−|u|); past −log(eps) its values are those of the support's ends.
        reach = REACH if _is_affine(self.transform) else -math.log(float(jnp.finfo(self.dtype).eps))
        self.half_width = math.asinh(reach)
        self.has_slopes = True

    @property
    def batch(self) -> int:
        """Number of batch elements."""
        return math.prod(self.batch_shape)

    def density(self, position: Array, with_slopes: bool) -> Density:
        """The log density at t, ``(num_points, batch, dims)``; without slopes where the energy has no derivative."""
        if with_slopes and self.has_slopes:
            try:
                return self._with_slopes(position)
            except Exception:  # The values alone were found before: what fails is the energy's derivative.
                self.has_slopes = False
        unconstrained = self._unconstrained(position)
        value = self.transform(unconstrained)
        potential, magnitude = self._potential(value)
        log_det = log_abs_det(self.transform, unconstrained, value)
        return self._assembled(position, potential - log_det, magnitude)

    def _with_slopes(self, position: Array) -> Density:
        unconstrained = self._unconstrained(position)
        value, pull_value = jax.vjp(self.transform, unconstrained)
        potential, pull, magnitude = jax.vjp(self._potential, value, has_aux=True)
        (by_value,) = pull(jnp.ones_like(potential))
        log_det, pull_log_det = jax.vjp(partial(self._log_det, potential.shape), unconstrained)
        slope = pull_value(by_value)[0] - pull_log_det(jnp.ones_like(log_det))[0]
        slope = jnp.tanh(position) - slope.reshape(position.shape) * jnp.cosh(position)

        # Values are rounded too, and the energy with them.
        axes = tuple(range(potential.ndim, value.ndim))
        magnitude = magnitude + jnp.abs(value * by_value).sum(axes)
        return self._assembled(position, potential - log_det, magnitude)._replace(slope=slope)

    def _unconstrained(self, position: Array) -> Array:
        return jnp.sinh(position).reshape(-1, *self.batch_shape, *self.event_shape)

    def _log_det(self, shape: tuple[int, ...], unconstrained: Array) -> Array:
        return jnp.broadcast_to(log_abs_det(self.transform, unconstrained, self.transform(unconstrained)), shape)

    def _potential(self, value: Array) -> tuple[Array, Array]:
        """U, and the size of what it is the sum of."""
        energies = self.distribution.factor_energies(value).values()
        log_base = unchecked_log_prob(self.distribution.base, value)
        potential = sum(energies) - log_base
        return potential, sum(jnp.abs(energy) for energy in energies) + jnp.abs(log_base)

    def _assembled(self, position: Array, potential: Array, magnitude: Array) -> Density:
        log_jacobian = jnp.log(jnp.cosh(position)).sum(-1)
        flat = log_jacobian.shape
        magnitude = jnp.broadcast_to(magnitude, potential.shape)
        return Density(log_jacobian - potential.reshape(flat), magnitude.reshape(flat))

    def rows(self, values: Array) -> Rows:
        """Data rows of shape ``(num_rows, *batch_shape, *event_shape)`` in the box's coordinates."""
        values = jnp.asarray(values, self.dtype)
        event_dims = tuple(range(1 + len(self.batch_shape), values.ndim))
        position = self.transform.inv(values).reshape(len(values), self.batch, self.dims)
        position = jnp.arcsinh(position)
        is_valid = jnp.isfinite(values).all(event_dims) & self.distribution.support(values)
        is_valid = is_valid.reshape(position.shape[:2]) & jnp.isfinite(position).all(-1)
        position = jnp.where(is_valid[..., None], position, 0.0)
        return Rows(position, is_valid, self.density(position, False))


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
