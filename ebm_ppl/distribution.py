"""The energy site: an unnormalised distribution and its guard."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from jax.tree_util import Partial
from jax.typing import ArrayLike
from numpyro.distributions.transforms import Transform

from ebm_ppl.annealing import AnnealingOptions, Path, anneal, refine_ladder, run_pilot
from ebm_ppl.certificate import LogNormalizer
from ebm_ppl.discrete import mass_function, needs_continuous
from ebm_ppl.errors import UnknownNormalizerError, at_site, find_site_name
from ebm_ppl.fingerprint import Fingerprint, require_same_energy
from ebm_ppl.fingerprint import fingerprint as fingerprint
from ebm_ppl.geometry import log_abs_det, standardizing_transform
from ebm_ppl.guard import (
    Constant,
    Origin,
    depends_on_traced,
    refuse_constant,
    traced_sites,
    varying_energy_error,
)
from ebm_ppl.kernels import MALA, KernelState, initial_step_size
from ebm_ppl.pointwise import as_energy, as_points
from ebm_ppl.resampling import multinomial, systematic
from ebm_ppl.snapshot import Content, content_of
from ebm_ppl.supports import (
    is_improper,
    points_in_support,
    same_support,
    unchecked_log_prob,
)

Energy = Callable[[Array], Array]

_WAY_OUT = (
    "Fit its parameters with ebm_ppl.Jarzynski(model, ...), or give a known "
    "normaliser: "
    "EnergyDistribution(energy, base, log_normalizer=...), from "
    "ebm_ppl.log_normalizer(...) or in closed form."
)


class EnergyDistribution(dist.Distribution):
    r"""An unnormalised distribution declared by its energy.

    .. math::
        p(x) = \frac{\mathrm{base}(x)\, e^{-E(x)}}{Z}, \qquad Z = \int
        \mathrm{base}(x)\, e^{-E(x)}\, dx, \qquad U(x) = E(x) - \log \mathrm{base}(x).

    Low energy is likely.  The base fixes the event shape, the support and the reference
    measure.  Where the base has a batch shape there is one Z per batch element; a
    ``plate`` that expands the site shares one Z.

    Without ``log_normalizer``, :meth:`log_prob` and :meth:`sample` raise
    :class:`UnknownNormalizerError`: an energy whose normaliser is left out gives
    silently wrong fits, posteriors and LOO.

    Args:
        energy: A callable, or a mapping of named factors whose sum is E.  Each takes
            values of shape ``(..., *batch_shape, *event_shape)`` and returns ``(...,
            *batch_shape)``; it is called with exactly one leading dimension.
        base: Any NumPyro distribution, its batch shape included.  ``ImproperUniform``
            gives the plain ``exp(−E)``.
        start: A proper distribution over the same space, for walkers to start from.
            Needed only with an improper base; log Z is anchored there.
        log_normalizer: log Z of base·exp(−E), a scalar or ``batch_shape``, or a
            certified :class:`LogNormalizer` of one site, where it is known.  It makes
            this an ordinary normalised distribution.  A *constant* serves while
            parameters are fixed (an energy prior on a latent x); while parameters
            inside the energy or the base are differentiated, a constant raises.
        validate_args: As for every NumPyro distribution.

    Raises:
        TypeError: ``energy`` is not callable, or ``base`` is not a distribution.
        ValueError: The shapes of ``start`` or ``log_normalizer`` do not fit the base.
        UncertifiedNormalizerError: ``log_normalizer`` has flags.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("factors", "base", "start", "_varying_log_normalizer")
    # A constant log Z is no leaf: nothing can differentiate, scale or add to it.
    pytree_aux_fields = ("_constant_log_normalizer", "_origin")
    # Traced sites of the run that built it; a copy made by pytree operations is built
    # outside of any.
    _traced: tuple[str, ...] = ()
    # What a certificate that was taken knows of its energy, and what the energy
    # referred to then.
    _marks: tuple[Fingerprint, ...] = ()
    _content: Content | None = None

    def __init__(
        self,
        energy: Energy | Mapping[str, Energy],
        base: dist.Distribution,
        *,
        start: dist.Distribution | None = None,
        log_normalizer: ArrayLike | LogNormalizer | None = None,
        validate_args: bool | None = None,
    ) -> None:
        named = dict(energy) if isinstance(energy, Mapping) else {"energy": energy}
        for name, factor in named.items():
            if not callable(factor):
                raise TypeError(
                    f"Energy factor '{name}' is a {type(factor).__name__}; expected a "
                    "callable E(x)."
                )
        if not named:
            raise ValueError(
                "The mapping of energy factors is empty; name at least one callable."
            )
        if not isinstance(base, dist.Distribution):
            raise TypeError(
                f"base is a {type(base).__name__}; expected a numpyro Distribution."
            )
        if start is not None and not isinstance(start, dist.Distribution):
            raise TypeError(
                f"start is a {type(start).__name__}; expected a numpyro Distribution."
            )
        if (
            start is not None
            and start.batch_shape + start.event_shape
            != base.batch_shape + base.event_shape
        ):
            raise ValueError(
                f"start has shape {start.batch_shape + start.event_shape}; expected "
                "the base's "
                f"{base.batch_shape + base.event_shape}. Expand it: "
                "start.expand(...).to_event(...)."
            )
        # A Partial is a pytree: the distribution may cross jit and vmap where the
        # energy is one over arrays.
        self.factors = {
            name: f if isinstance(f, Partial) else Partial(f)
            for name, f in named.items()
        }
        self.base = mass_function(base)
        self.start = start
        self._set_log_normalizer(_as_log_normalizer(log_normalizer, base.batch_shape))
        super().__init__(
            base.batch_shape, base.event_shape, validate_args=validate_args
        )

        if isinstance(log_normalizer, LogNormalizer):
            self._require_own(log_normalizer)

    def _set_log_normalizer(self, value: Any) -> None:
        is_constant = value is not None and not isinstance(value, jax.core.Tracer)
        self._constant_log_normalizer = (
            Constant(np.asarray(value)) if is_constant else None
        )
        self._varying_log_normalizer: Array | None = None if is_constant else value
        self._traced = traced_sites() if is_constant else ()
        self._origin = Origin.of(self._parts(), keep=is_constant)

    def _require_own(self, certificate: LogNormalizer) -> None:
        """The certificate's marks must be those of this energy; where they are traced, log Z is NaN if not."""
        self._marks = tuple(certificate.fingerprints.values())
        self._content = self._present_content()
        for expected in self._marks:
            doubt = require_same_energy(None, self, expected)
            if not isinstance(doubt, jax.core.Tracer):
                continue
            if self._traced:
                raise varying_energy_error(self._site_name(), self._traced)
            self._set_log_normalizer(jnp.asarray(self.log_normalizer) + doubt)

    def _present_content(self) -> Content:
        return content_of([factor.func for factor in self.factors.values()])

    def require_built_shapes(self) -> None:
        """Refuse a distribution whose arrays have other axes than when it was built.

        Raises:
            ValueError: It came out of ``jax.vmap``, say, whose methods are to be called
                inside of it.
        """
        self._origin.require_shapes(self._parts(), self._site_name)

    def _parts(self) -> tuple:
        return self.factors, self.base, self.start, self._varying_log_normalizer

    @property
    def log_normalizer(self) -> Array | None:
        """Known log Z, of the base's batch shape or a scalar; None where it is not known."""
        if self._constant_log_normalizer is None:
            return self._varying_log_normalizer
        return jnp.asarray(self._constant_log_normalizer.value)

    @property
    def support(self) -> Any:
        """The base's support."""
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        """Always False: draws are not differentiable."""
        return False

    def factor_energies(self, value: ArrayLike) -> dict[str, Array]:
        """Energy of each named factor at ``value``, each of shape ``(...,
        *batch_shape)``.

        Raises:
            ValueError: A factor returned another shape, or ``value`` does not end in
                the event shape.
        """
        flat, shape = self._flatten(value)
        return {
            name: energy.reshape(shape)
            for name, energy in self._flat_energies(flat).items()
        }

    def energy(self, value: ArrayLike) -> Array:
        """E(x), the sum of the factors, of shape ``(..., *batch_shape)``."""
        return sum(self.factor_energies(value).values())  # type: ignore[return-value]

    def potential(self, value: ArrayLike) -> Array:
        """U(x) = E(x) − log base(x), of shape ``(..., *batch_shape)``."""
        value = as_points(value, self.support.is_discrete)
        potential = self._unchecked_potential(value)
        return (
            jnp.where(self.support(value), potential, jnp.inf)
            if self._validate_args
            else potential
        )

    def _unchecked_potential(self, value: ArrayLike) -> Array:
        """U(x) for values known to be in the support; garbage elsewhere."""
        flat, shape = self._flatten(value)
        # The base sees the very array that the energy sees: an energy that uses its
        # density shares the arithmetic. The energy itself keeps NumPyro's checks, which
        # may be what truncates it.
        energy = sum(self._flat_energies(flat).values())
        return (energy - unchecked_log_prob(self.base, flat)).reshape(shape)

    def _flatten(self, value: ArrayLike) -> tuple[Array, tuple[int, ...]]:
        """The value with one leading dimension, and the shape that its energies have."""
        self.require_built_shapes()
        value = as_points(value, self.support.is_discrete)
        event_shape = self.batch_shape + self.event_shape
        leading = value.shape[: max(value.ndim - len(event_shape), 0)]
        try:
            # Broadcasting against the batch shape is NumPyro's rule for values.
            value = jnp.broadcast_to(value, leading + event_shape)
        except ValueError:
            raise ValueError(
                f"The value{at_site(self._site_name())} has shape {value.shape}; "
                "expected (..., "
                f"{', '.join(map(str, event_shape))}): batch shape {self.batch_shape} "
                "and event shape "
                f"{self.event_shape} come from the base. Reshape the data, or "
                ".expand/.to_event the base."
            ) from None
        return value.reshape((-1, *event_shape)), leading + self.batch_shape

    def _flat_energies(self, flat: Array) -> dict[str, Array]:
        expected = (flat.shape[0], *self.batch_shape)
        energies = {}
        for name, factor in self.factors.items():
            energy = factor(flat)
            if jnp.shape(energy) != expected:
                raise ValueError(
                    f"Energy factor '{name}'{at_site(self._site_name())} returned "
                    f"shape {jnp.shape(energy)} for values "
                    f"of shape {flat.shape}; expected {expected}, one number per "
                    "event. Sum over the event "
                    "dimensions (x.sum(-1)), drop a trailing 1 (e[..., 0]), or wrap a "
                    "net that takes one event "
                    "in jax.vmap."
                )
            energies[name] = as_energy(energy, name, self._site_name())
        return energies

    def with_log_normalizer(self, log_normalizer: ArrayLike) -> "EnergyDistribution":
        """The same energy with another known log Z."""
        return EnergyDistribution(
            self.factors,
            self.base,
            start=self.start,
            log_normalizer=log_normalizer,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """``log base(x) − E(x) − log Z``, of shape ``(..., *batch_shape)``.

        Raises:
            UnknownNormalizerError: log Z is not known, or it is a constant while the
                energy or the base is differentiated with respect to parameters.
        """
        name = self._site_name()
        if self.log_normalizer is None:
            raise UnknownNormalizerError(
                f"The normaliser of the energy{at_site(name)} is unknown, so its log "
                f"density is too. {_WAY_OUT}"
            )
        self.require_built_shapes()
        value = as_points(value, self.support.is_discrete)
        if self._constant_log_normalizer is not None:
            self._require_constant_energy(name, value)

        # Closure conversion lifts the parameters inside the energy and the base out, so
        # that the identity below sees whether a derivative with respect to them is
        # being taken.  A fresh function each time: JAX caches the conversion by the
        # function's identity.
        converted, closure = jax.closure_convert(
            lambda v: self._unchecked_potential(v), value
        )
        closure, log_normalizer = refuse_constant(name, closure, self.log_normalizer)

        log_prob = -converted(value, *closure) - log_normalizer
        return (
            jnp.where(self._validate_sample(value), log_prob, -jnp.inf)
            if self._validate_args
            else log_prob
        )

    def _require_constant_energy(self, name: str | None, value: Array) -> None:
        """A constant log Z belongs to an energy that does not vary either."""
        self._origin.require_values(self._parts(), name)
        if self._marks and (present := self._present_content()) != self._content:
            # An object inside the energy changed (a module's weights, say): is it still
            # the energy of the marks?
            for expected in self._marks:
                require_same_energy(name, self, expected)
            self._content = present
        if self._traced and depends_on_traced(self._unchecked_potential, value):
            raise varying_energy_error(name, self._traced)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Approximate draws by annealed sequential Monte Carlo from the base (or
        ``start``).

        A population of 256 walkers or more follows 256 temperatures with one MALA move
        each; draws are picked from it by weight.  Far modes that no walker reaches are
        missed: for work that rests on draws, sample with NUTS or look at a fit's
        walkers.

        Raises:
            UnknownNormalizerError: log Z is not known, nor a start for an improper
                base, or the support is discrete.
        """
        name = self._site_name()
        if self.log_normalizer is None:
            raise UnknownNormalizerError(
                f"Drawing from the energy{at_site(name)} needs its normaliser, which "
                f"is unknown. {_WAY_OUT}"
            )
        self.require_built_shapes()
        start = starting_distribution(self, name)
        check_start_covers(self, name)
        if self.support.is_discrete:
            raise UnknownNormalizerError(
                needs_continuous(self.base, name, "drawing by Langevin moves")
            )
        shape = tuple(sample_shape)
        count = 1
        for size in shape:
            count *= size
        assert key is not None
        key_pilot, key_start, key_run, key_pick, key_order = random.split(key, 5)
        transform = standardizing_transform(start)
        path = annealing_path(self, start, transform)
        options = AnnealingOptions(
            num_kernel_steps=1, ess_threshold=0.5, resampling=systematic
        )
        kernel = MALA()

        def exact(key: Array, num: int) -> Array:
            return transform.inv(start.sample(key, (1, num)))

        size = 1
        for length in self.event_shape:
            size *= length
        step_size = jnp.full(self.batch_shape, initial_step_size(kernel, size))
        key_pilot, key_pilot_start = random.split(key_pilot)
        pilot = run_pilot(
            kernel,
            key_pilot,
            path,
            exact(key_pilot_start, 256),
            step_size,
            options,
            max_rungs=256,
        )
        ladder = refine_ladder(pilot, 256)
        ensemble, _ = anneal(
            kernel, key_run, path, exact(key_start, max(count, 256)), ladder, options
        )
        values = transform(ensemble.position[0])
        log_weight = jnp.moveaxis(ensemble.log_weight[0], 0, -1).reshape(
            -1, values.shape[0]
        )
        picked = jax.vmap(multinomial)(
            random.split(key_pick, log_weight.shape[0]), log_weight
        )
        picked = jax.vmap(random.permutation)(
            random.split(key_order, log_weight.shape[0]), picked
        )[:, :count]
        picked = jnp.moveaxis(picked.reshape((*self.batch_shape, count)), -1, 0)
        indices = picked.reshape(picked.shape + (1,) * self.event_dim)
        return jnp.take_along_axis(values, indices, axis=0).reshape(
            shape + self.batch_shape + self.event_shape
        )

    def _site_name(self) -> str | None:
        return find_site_name(self, unwrap)


def _as_log_normalizer(
    value: ArrayLike | LogNormalizer | None, batch_shape: tuple[int, ...]
) -> Array | np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, LogNormalizer):
        if len(value.estimate) != 1 or value.batch_ndims:
            raise ValueError(
                f"log_normalizer has sites {sorted(value.estimate)} and "
                f"{value.batch_ndims} axes of draws; expected "
                "one site at one parameter value. Give the number of this site: "
                "log_normalizer=log_z.estimate[name]."
            )
        value.require_certified()
        (value,) = value.estimate.values()
        if value.shape != batch_shape:
            raise ValueError(
                f"log_normalizer has log Z of shape {value.shape}; expected the base's "
                f"batch shape {batch_shape}. "
                "Estimate it for this very distribution."
            )
    # NumPy's arrays stay constants inside a trace too.
    array: Any = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
    if not jnp.issubdtype(
        array.dtype, jnp.floating
    ) or array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        array = array.astype(jnp.result_type(float))
    if jnp.broadcast_shapes(array.shape, batch_shape) != batch_shape:
        raise ValueError(
            f"log_normalizer has shape {array.shape}; expected a scalar or the base's "
            f"batch shape {batch_shape}."
        )
    return array


def unwrap(fn: Any) -> EnergyDistribution | None:
    """The energy distribution inside NumPyro's expand, mask and to_event wrappers, or None."""
    while isinstance(
        fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent
    ):
        fn = fn.base_dist
    return fn if isinstance(fn, EnergyDistribution) else None


def rewrap(fn: Any, replacement: EnergyDistribution) -> dist.Distribution:
    """The same wrappers around another energy distribution."""
    if isinstance(fn, dist.ExpandedDistribution):
        return rewrap(fn.base_dist, replacement).expand(fn.batch_shape)
    if isinstance(fn, dist.MaskedDistribution):
        return rewrap(fn.base_dist, replacement).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return rewrap(fn.base_dist, replacement).to_event(fn.reinterpreted_batch_ndims)
    return replacement


def starting_distribution(
    distribution: EnergyDistribution, name: str | None
) -> dist.Distribution:
    """Where walkers start: ``start``, or the base itself where it is proper.

    Raises:
        UnknownNormalizerError: The base is improper and no start is named.
    """
    start = distribution.base if distribution.start is None else distribution.start
    if is_improper(start):
        found = "base" if distribution.start is None else "start"
        raise UnknownNormalizerError(
            f"The {found} of the energy{at_site(name)} is improper: there is nowhere "
            "to start from and log Z has no "
            "anchor. "
            "Name a proper starting distribution: EnergyDistribution(energy, base, "
            "start=dist.Normal(...).to_event(...))."
        )
    return start


def check_start_covers(distribution: EnergyDistribution, name: str | None) -> None:
    """Refuse a ``start`` of another support than the base's: log Z would be that of a
    smaller, or of a larger, set.

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
            "which leaves out part of the base's, "
            f"{distribution.support}: log Z would be that of the smaller set. Name a "
            "start over the whole support, or "
            "a base with the smaller one."
        )
    if is_improper(start):
        return
    outside = ~distribution.support(start.sample(random.key(1), (256,)))
    if not isinstance(outside, jax.core.Tracer) and bool(jnp.any(outside)):
        raise ValueError(
            f"The start of the energy{at_site(name)} has support {start.support}, "
            "which reaches beyond the base's, "
            f"{distribution.support}: walkers would leave it. Name a start over the "
            "base's support."
        )


def potential_at(
    distribution: EnergyDistribution, transform: Transform, position: Array
) -> Array:
    """``U_u(u) = U(T(u)) − log|det T'(u)|``, of shape ``(..., *batch_shape)``; T maps onto the support."""
    value = transform(position)
    return distribution._unchecked_potential(value) - log_abs_det(
        transform, position, value
    )


def evaluate_at(
    distribution: EnergyDistribution, transform: Transform, position: Array
) -> KernelState:
    """Potential and gradient of every walker: one forward and one backward pass."""
    potential, pull = jax.vjp(partial(potential_at, distribution, transform), position)
    (grad,) = pull(jnp.ones_like(potential))
    return KernelState(position, potential, grad)


def annealing_path(
    distribution: EnergyDistribution, start: dist.Distribution, transform: Transform
) -> Path:
    """The path from ``start`` to the energy in coordinates u, with x = transform(u)."""

    def path_start(position: Array) -> Array:
        value = transform(position)
        return -unchecked_log_prob(start, value) - log_abs_det(
            transform, position, value
        )

    def difference(position: Array) -> Array:
        value = transform(position)
        if start is distribution.base:
            return distribution.energy(value)
        return distribution._unchecked_potential(value) + unchecked_log_prob(
            start, value
        )

    return Path(path_start, difference)
