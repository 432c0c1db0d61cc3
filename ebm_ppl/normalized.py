"""Models whose normalisers are known: ordinary NumPyro models, on which all of NumPyro and ArviZ is right."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from numpyro import handlers
from numpyro.primitives import Messenger

from ebm_ppl.certificate import LogNormalizer, log_normalizer_site
from ebm_ppl.distribution import EnergyDistribution
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.exact import enumeration, quadrature
from ebm_ppl.fingerprint import require_same_energy
from ebm_ppl.guard import traced_sites, varying_energy_error
from ebm_ppl.model import Arguments, BoundModel, KnownNormalizers, Model, Normalize, Params
from ebm_ppl.pointwise import require_no_rows, require_pointwise


class _Fixed(Messenger):
    """Fix parameters: sample sites become deterministic, without a prior; any other value makes NaN."""

    def __init__(self, fn: Callable, params: Params) -> None:
        super().__init__(fn)
        self.params = params

    def process_message(self, msg: dict) -> None:
        if msg["type"] in ("param", "sample") and msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
            if msg["type"] == "sample":
                msg["type"] = "deterministic"

    def postprocess_message(self, msg: dict) -> None:
        fixed = self.params.get(msg.get("name", ""))
        if fixed is not None and msg["value"] is not fixed:
            # A handler outside brought another value, which log Z does not belong to: equal, or nothing.
            msg["value"] = _own_value(msg["name"], fixed, msg["value"])


def _own_value(name: str, fixed: Any, given: Any) -> Any:
    """The value that log Z belongs to; an error where another was given, NaN where that is traced."""
    leaves = list(zip(jax.tree.leaves(fixed), jax.tree.leaves(given), strict=True))
    if any(isinstance(leaf, jax.core.Tracer) for pair in leaves for leaf in pair):
        return jax.tree.map(lambda own, other: jnp.where(own == other, own, jnp.nan), fixed, given)

    if not all(np.array_equal(own, other) for own, other in leaves):
        raise ValueError(
            f"Site '{name}' was given another value than that which log_normalizer belongs to. Estimate it there: "
            "ebm_ppl.log_normalizer(rng_key, model, params, ...); for draws give log_normalizer.samples, from "
            "batch_ndims=1 or 2."
        )
    return fixed


def normalized(
    model: Model,
    log_normalizer: LogNormalizer | None = None,
    *,
    num_points: int | None = None,
    allow_uncertified: bool = False,
) -> Model:
    """Return ``model`` with known normalisers at its energy sites.

    NUTS, SVI, ``log_likelihood``, ``Predictive``, ``az.from_numpyro``, ``az.loo`` and ``az.compare`` are right on it.

    - Without ``log_normalizer``: log Z is found inside the model by quadrature (one or two dimensions) or enumeration
      (finite supports), as a differentiable function of the parameters, which stay free.
    - With one from :func:`log_normalizer` at a point: the parameters are fixed at that point, log Z is the
      constant that belongs to it, and other latent sites stay free.
    - With one over parameter draws: give ``log_normalizer.samples`` as the posterior samples, to
      ``log_likelihood`` or ``Predictive``; each draw then has its own log Z.

    Args:
        model: A NumPyro model with energy sites.
        log_normalizer: From :func:`log_normalizer`.
        num_points: Of the quadrature; see :func:`log_normalizer`.
        allow_uncertified: Accept a ``log_normalizer`` that has flags.

    Raises:
        UncertifiedNormalizerError: ``log_normalizer`` has flags.
        ValueError: (When the model runs) a site that neither quadrature nor enumeration serves, or that
            ``log_normalizer`` lacks.
    """
    if log_normalizer is None:
        return KnownNormalizers(model, _exactly(num_points))
    if not allow_uncertified:
        log_normalizer.require_certified()
    if log_normalizer.batch_ndims:
        return _OfDraws(model, log_normalizer)
    return _Fixed(KnownNormalizers(model, _constant(log_normalizer)), log_normalizer.params)


def _exactly(num_points: int | None) -> Normalize:
    checked: set[str] = set()

    def normalize(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
        require_no_rows(name, distribution)
        known = _exact(name, distribution, num_points)
        if name in checked:
            return known

        doubt = require_pointwise(name, distribution)
        if isinstance(doubt, jax.core.Tracer):
            return known.with_log_normalizer(jnp.asarray(known.log_normalizer) + doubt)
        checked.add(name)
        return known

    return normalize


def _exact(name: str, distribution: EnergyDistribution, num_points: int | None) -> EnergyDistribution:
    discrete = distribution.support.is_discrete
    log_z, flags = enumeration(distribution, name) if discrete else quadrature(distribution, name, num_points)
    if flags:
        method = "Enumeration" if discrete else "Quadrature"
        raise UnknownNormalizerError(f"{method} at energy site '{name}' cannot be trusted: {' '.join(flags)}")
    return distribution.with_log_normalizer(log_z)


def _constant(log_normalizer: LogNormalizer) -> Normalize:
    def constant(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
        if name not in log_normalizer.estimate:
            raise ValueError(
                f"log_normalizer has sites {sorted(log_normalizer.estimate)}, but the model has energy site '{name}'; "
                "estimate it with ebm_ppl.log_normalizer(rng_key, model, params, ...) on this model."
            )
        estimate = log_normalizer.estimate[name]
        if estimate.shape != distribution.batch_shape:
            raise ValueError(
                f"log_normalizer has log Z of shape {estimate.shape} at energy site '{name}', whose batch shape is now "
                f"{distribution.batch_shape}; estimate it for the same arguments."
            )
        if name in log_normalizer.fingerprints:
            doubt = require_same_energy(name, distribution, log_normalizer.fingerprints[name])
            if isinstance(doubt, jax.core.Tracer):
                # A sampler would take NaN for a place without mass.
                if sites := traced_sites():
                    raise varying_energy_error(name, sites)
                estimate += doubt
        return distribution.with_log_normalizer(estimate)

    return constant


class _OfDraws(KnownNormalizers):
    """A model with one log Z per parameter draw, whose energies are compared with the marks at the first draw."""

    def __init__(self, model: Model, log_normalizer: LogNormalizer) -> None:
        super().__init__(model, _from_samples)
        self.certificate = log_normalizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        lead = (0,) * self.certificate.batch_ndims
        marks = self.certificate.fingerprints
        # The draws may be traced here, the arguments are not: what they make of the first draw is a number.
        with handlers.block(), jax.ensure_compile_time_eval():
            first = jax.tree.map(lambda leaf: leaf[lead], self.certificate.params)
            found = BoundModel(self.fn, {}, random.key(0), Arguments(args, kwargs)).energies(first) if marks else {}
        for name, distribution in found.items():
            if name in marks:
                require_same_energy(name, distribution, marks[name])
        return super().__call__(*args, **kwargs)


def _from_samples(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
    value: Any = numpyro.param(log_normalizer_site(name), None)
    if value is None:
        raise UnknownNormalizerError(
            f"Energy site '{name}' has one log Z per parameter draw, and this run was given none: pass "
            "log_normalizer.samples as the posterior samples of log_likelihood or Predictive."
        )
    return distribution.with_log_normalizer(value)
