"""An energy as a density over a box in t.

``u = sinh(t)`` are the coordinates in which the base is standard.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    IdentityTransform,
    IndependentTransform,
    Transform,
)

from ebm_ppl.energy.base_programs import draws_of, unchecked_log_prob
from ebm_ppl.energy.coordinates import (
    CholeskyAffine,
    log_abs_det,
    standardizing_transform,
)
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import is_improper, same_support
from ebm_ppl.errors import at_site
from ebm_ppl.exact.judge import Density, Rows
from ebm_ppl.exact.terms import summed
from ebm_ppl.programs.one_program import one_program

# The box's end in u: the integrand is unknown beyond it, so its mass there must be
# negligible.
REACH = 1e4

# Draws of the base at all batch elements together.
MAX_DRAWS = 2**16

# Relative error of the density at a draw of the base that does not count: unlike data
# rows, draws are there to find what was overlooked.
SLACK = 0.01


class BaseDraws(NamedTuple):
    """Draws of the base (or ``start``), in coordinates t.

    Attributes:
        guides: Those that guide the splitting of cells.
        checks: Others, which judge its result.
        log_start: Log density of the base in t at ``checks``, ``(num_checks, batch)``.
    """

    guides: Rows | None = None
    checks: Rows | None = None
    log_start: Array | None = None


@partial(jax.jit, static_argnums=2)
def _split(rows: Rows, log_start: Array, num_guides: int) -> BaseDraws:
    guides = jax.tree.map(lambda leaf: leaf[:num_guides], rows)
    checks, log_start = jax.tree.map(lambda leaf: leaf[num_guides:], (rows, log_start))
    return BaseDraws(guides, checks, log_start)


class Integrand:
    """log of ``base(x) exp(−E(x)) |dx/dt|`` over a box of t.

    The box is ``[−half_width, half_width]^dims``.
    """

    def __init__(self, distribution: EnergyDistribution, name: str | None) -> None:
        self.distribution = distribution
        self.start = _start(distribution)
        self.transform = standardizing_transform(self.start)
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
        _, (by_scale, _) = jax.jvp(self._log_value, (value,), (value,))
        magnitude = magnitude + jnp.abs(by_scale).reshape(magnitude.shape)
        return Density(log_density, magnitude, jnp.stack(slopes, axis=-1))

    def _at(self, position: Array) -> tuple[Array, Array, Array]:
        """x, the log density, and the magnitude of the terms that it is the sum of."""
        value, log_det, log_jacobian = self._values(position)
        log_value, magnitude = self._log_value(value)
        log_density = _in_t(log_value, log_det, log_jacobian)
        return value, log_density, magnitude.reshape(log_density.shape)

    def _values(self, position: Array) -> tuple[Array, Array, Array]:
        """X at t, ``log |det dx/du|`` of x's batch shape and ``log |du/dt|`` of t's."""
        return _values_at(self.transform, position, self.batch_shape + self.event_shape)

    def _log_value(self, value: Array) -> tuple[Array, Array]:
        """−U, and the magnitude of the terms that it is the sum of."""
        energies = tuple(self.distribution.factor_energies(value).values())
        return summed(energies, unchecked_log_prob(self.distribution.base, value))

    def rows(self, data: Array) -> Rows:
        """Data rows, ``(num_rows, *batch_shape, *event_shape)``, in coordinates t."""
        data = jnp.asarray(data, self.dtype)
        return self._at_values(data, np.zeros(len(data)))

    def draws(self, num_guides: int, num_checks: int) -> BaseDraws:
        """Draws of the base, the same in every call; none where it has no sampler.

        They are fewer where there are many batch elements.
        """
        if is_improper(self.start):
            return BaseDraws()
        leaves = jax.tree.leaves(self.start)
        is_known = not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        # Of a known base they are constants of a compiled model.
        when = jax.ensure_compile_time_eval() if is_known else nullcontext()
        try:
            with when:
                drawn = draws_of(self.start, random.key(0), num_guides + num_checks)
        except NotImplementedError:
            return BaseDraws()

        share = min(1.0, MAX_DRAWS / max(self.batch * len(drawn), 1))
        num_guides = max(8, int(share * num_guides))
        drawn = drawn[: max(16, int(share * len(drawn)))].astype(self.dtype)
        slack = np.where(np.arange(len(drawn)) < num_guides, SLACK, 0.0)
        rows = self._at_values(drawn, slack)
        return _split(rows, self._log_start(rows.position), num_guides)

    def _log_start(self, position: Array) -> Array:
        """Log density of the base (or ``start``) at t, ``(num_points, batch)``."""
        value, log_det, log_jacobian = self._values(position)
        log_start = unchecked_log_prob(self.start, value)
        return _in_t(log_start, log_det, log_jacobian)

    def _at_values(self, values: Array, slack: np.ndarray) -> Rows:
        """Points in coordinates t, with their densities."""
        event_dims = tuple(range(1 + len(self.batch_shape), values.ndim))
        position, is_valid = _positions_of(
            self.transform,
            self.distribution.support,
            values,
            event_dims,
            (self.batch, self.dims),
        )
        return Rows(
            position,
            is_valid,
            self.density(position, False),
            jnp.asarray(slack, self.dtype),
        )


@one_program(static_argnums=(2,))
def _values_at(
    transform: Transform, position: Array, shape: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """:meth:`Integrand._values`, x before its transform having ``shape``."""
    unconstrained = jnp.sinh(position).reshape(-1, *shape)
    value = transform(unconstrained)
    log_det = log_abs_det(transform, unconstrained, value)
    return value, log_det, jnp.log(jnp.cosh(position)).sum(-1)


@one_program(static_argnums=(3, 4))
def _positions_of(
    transform: Transform,
    support: constraints.Constraint,
    values: Array,
    event_dims: tuple[int, ...],
    shape: tuple[int, int],
) -> tuple[Array, Array]:
    """Coordinates t of x, ``(num, *shape)``, and whether x lies in the support."""
    position = jnp.arcsinh(transform.inv(values).reshape(len(values), *shape))
    is_valid = jnp.isfinite(values).all(event_dims) & support(values)
    is_valid = is_valid.reshape(position.shape[:2]) & jnp.isfinite(position).all(-1)
    return jnp.where(is_valid[..., None], position, 0.0), is_valid


@jax.jit
def _in_t(log_value: Array, log_det: Array, log_jacobian: Array) -> Array:
    """The log density at t from that at x."""
    return log_jacobian + (log_det + log_value).reshape(log_jacobian.shape)


def _start(distribution: EnergyDistribution) -> dist.Distribution:
    """The base, or ``start`` in the place of an improper one."""
    base = distribution.base
    start = distribution.start
    if (
        is_improper(base)
        and start is not None
        and same_support(start.support, base.support)
    ):
        return start
    return base


def _is_affine(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, AffineTransform | IdentityTransform | CholeskyAffine)
