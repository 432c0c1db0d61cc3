"""Models whose normalisers are known: ordinary NumPyro models, on which all of NumPyro and ArviZ is right."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.primitives import Messenger

from ebm_ppl.certificate import LogNormalizer, log_normalizer_site
from ebm_ppl.distribution import EnergyDistribution, fingerprint, require_same_energy, unwrap
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.exact import integral, rows_at, total
from ebm_ppl.model import KnownNormalizers, Model, Normalize, Params


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
        fixed = self.params.get(msg["name"])
        if fixed is not None and msg["value"] is not fixed:
            # A handler outside brought another value, which log Z does not belong to: equal, or nothing.
            msg["value"] = jax.tree.map(lambda own, given: jnp.where(own == given, own, jnp.nan), fixed, msg["value"])


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
        return _ExactNormalizers(model, num_points)
    if not allow_uncertified:
        log_normalizer.require_certified()
    if log_normalizer.batch_ndims:
        return KnownNormalizers(model, _from_samples)
    return _Fixed(KnownNormalizers(model, _constant(log_normalizer)), log_normalizer.params)


class _ExactNormalizers(KnownNormalizers):
    """Exact log Z at every energy site, checked at the data there."""

    def __init__(self, fn: Model, num_points: int | None) -> None:
        super().__init__(fn, self._normalize)
        self.num_points = num_points
        self.rows: jax.Array | None = None

    def process_message(self, msg: dict) -> None:
        energy = unwrap(msg["fn"]) if msg["type"] == "sample" else None
        if energy is not None:
            observed = msg["value"] if msg["is_observed"] else None
            self.rows = None if observed is None else rows_at(energy, observed)
        super().process_message(msg)

    def _normalize(self, name: str, distribution: EnergyDistribution) -> EnergyDistribution:
        discrete = distribution.support.is_discrete
        found = total(distribution, name) if discrete else integral(distribution, name, self.num_points, self.rows)
        if found.flags:
            method = "Enumeration" if discrete else "Quadrature"
            raise UnknownNormalizerError(f"{method} at energy site '{name}' cannot be trusted: {' '.join(found.flags)}")
        return distribution.with_log_normalizer(found.estimate)


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
            estimate += require_same_energy(name, fingerprint(distribution), log_normalizer.fingerprints[name])
        return distribution.with_log_normalizer(estimate)

    return constant


def _from_samples(name: str, distribution: EnergyDistribution) -> EnergyDistribution:
    value: Any = numpyro.param(log_normalizer_site(name), None)
    if value is None:
        raise UnknownNormalizerError(
            f"Energy site '{name}' has one log Z per parameter draw, and this run was given none: pass "
            "log_normalizer.samples as the posterior samples of log_likelihood or Predictive."
        )
    return distribution.with_log_normalizer(value)
