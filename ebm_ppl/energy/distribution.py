"""The energy site: an unnormalised distribution and its guard."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.energy.construction import (
    as_log_normalizer,
    check_base_and_start,
    checked_factors,
)
from ebm_ppl.energy.draws import draw_annealed, no_key
from ebm_ppl.energy.fingerprint import Fingerprint, require_same_energy
from ebm_ppl.energy.finite_draws import draw_states
from ebm_ppl.energy.guard import (
    Constant,
    depends_on_traced,
    refuse_constant,
    traced_sites,
    varying_energy_error,
)
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.mass_function import mass_function
from ebm_ppl.energy.origin import Origin
from ebm_ppl.energy.points import as_energy, as_points
from ebm_ppl.energy.start import check_start_covers, starting_distribution
from ebm_ppl.energy.ways_out import ways_out
from ebm_ppl.energy.wrappers import innermost
from ebm_ppl.errors import UnknownNormalizerError, at_site, find_site_name
from ebm_ppl.programs.content import Content, content_of

Energy = Callable[[Array], Array]


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
    # A constant log Z is structure, not a leaf: no transformation can change it.
    pytree_aux_fields = ("_constant_log_normalizer", "_origin")
    # Traced sites of the model run that built it; a pytree operation's copy has none.
    _traced: tuple[str, ...] = ()
    # Fingerprints of the certificate's energy, and what the energy referred to when the
    # certificate was accepted.
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
        named = checked_factors(energy)
        check_base_and_start(base, start)

        # A Partial is a pytree: the distribution may cross jit and vmap if the energy
        # is a pytree of arrays.
        self.factors = {
            name: f if isinstance(f, Partial) else Partial(f)
            for name, f in named.items()
        }
        self.base = mass_function(base)
        self.start = start
        self._set_log_normalizer(as_log_normalizer(log_normalizer, base.batch_shape))
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
        """Check that the certificate's fingerprints are those of this energy.

        Where the energy is traced, a mismatch makes log Z NaN.
        """
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
        """Refuse a distribution whose arrays have other shapes than at construction.

        Raises:
            ValueError: A shape differs, for example because ``jax.vmap`` returned the
                distribution; its methods are to be called inside ``jax.vmap``.
        """
        self._origin.require_shapes(self._parts(), self._site_name)

    def _parts(self) -> tuple:
        return self.factors, self.base, self.start, self._varying_log_normalizer

    @property
    def log_normalizer(self) -> Array | None:
        """Known log Z, a scalar or of the base's batch shape; None if unknown."""
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
        """Energy of each named factor, each of shape ``(..., *batch_shape)``.

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
        potential = self.unchecked_potential(value)
        return (
            jnp.where(self.support(value), potential, jnp.inf)
            if self._validate_args
            else potential
        )

    def unchecked_potential(self, value: ArrayLike) -> Array:
        """U(x) for values known to be in the support; undefined elsewhere."""
        flat, shape = self._flatten(value)
        # Base and energy get the same array: an energy that uses the base's density
        # shares the computation. The energy keeps NumPyro's support checks, which may
        # be what truncates it.
        energy = sum(self._flat_energies(flat).values())
        return (energy - unchecked_log_prob(self.base, flat)).reshape(shape)

    def _flatten(self, value: ArrayLike) -> tuple[Array, tuple[int, ...]]:
        """The value with one leading dimension, and the shape of its energies."""
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
                f"expected (..., {', '.join(map(str, event_shape))}): batch shape "
                f"{self.batch_shape} and event shape {self.event_shape} come from the "
                "base. Reshape the data, or .expand/.to_event the base."
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
                    f"shape {jnp.shape(energy)} for values of shape {flat.shape}; "
                    f"expected {expected}, one number per event. Sum over the event "
                    "dimensions (x.sum(-1)), drop a trailing 1 (e[..., 0]), or wrap a "
                    "net that takes one event in jax.vmap."
                )
            energies[name] = as_energy(energy, name, self._site_name())

        return energies

    def with_log_normalizer(
        self, log_normalizer: ArrayLike | LogNormalizer
    ) -> "EnergyDistribution":
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
                f"density is too. {ways_out(self, name)}"
            )

        self.require_built_shapes()
        value = as_points(value, self.support.is_discrete)
        if self._constant_log_normalizer is not None:
            self._require_constant_energy(name, value)

        # Closure conversion lifts the parameters out of the energy and the base, so
        # that the identity below sees whether they are being differentiated.  A fresh
        # function each time: JAX caches the conversion by the function's identity.
        converted, closure = jax.closure_convert(
            lambda v: self.unchecked_potential(v), value
        )
        closure, log_normalizer = refuse_constant(name, closure, self.log_normalizer)

        log_prob = -converted(value, *closure) - log_normalizer
        return (
            jnp.where(self._validate_sample(value), log_prob, -jnp.inf)
            if self._validate_args
            else log_prob
        )

    def _require_constant_energy(self, name: str | None, value: Array) -> None:
        """Refuse an energy that varies, or changed, while log Z is constant."""
        self._origin.require_values(self._parts(), name)
        if self._marks and (present := self._present_content()) != self._content:
            # An object inside the energy changed (such as a module's weights): compare
            # the energy with its fingerprints again.
            for expected in self._marks:
                require_same_energy(name, self, expected)
            self._content = present
        if self._traced and depends_on_traced(self.unchecked_potential, value):
            raise varying_energy_error(name, self._traced)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Approximate draws by annealing walkers from the base (or ``start``).

        Draws on a finite support are exact, from the weights of all states.  Otherwise
        sequential Monte Carlo: 256 walkers or more follow 256 temperatures with one
        MALA move each, and draws are picked from them by weight.  Far modes that no
        walker reaches are missed: where results depend on the draws, sample with NUTS
        or use a fit's walkers.

        Raises:
            UnknownNormalizerError: log Z is unknown, or an improper base has no proper
                ``start``.
            ValueError: A discrete support is not finite, or has over 2²² states.
        """
        name = self._site_name()
        if self.log_normalizer is None:
            raise UnknownNormalizerError(
                f"Drawing from the energy{at_site(name)} needs its normaliser, which "
                f"is unknown. {ways_out(self, name)}"
            )

        self.require_built_shapes()
        if key is None:
            raise ValueError(no_key(name))
        if self.support.is_discrete:
            return draw_states(key, self, tuple(sample_shape), name)

        start = starting_distribution(self, name)
        check_start_covers(self, name)
        return draw_annealed(key, self, start, tuple(sample_shape))

    def _site_name(self) -> str | None:
        return find_site_name(self, innermost)


def unwrap(fn: Any) -> EnergyDistribution | None:
    """The energy distribution inside NumPyro's wrappers, or None."""
    found = innermost(fn)
    return found if isinstance(found, EnergyDistribution) else None
