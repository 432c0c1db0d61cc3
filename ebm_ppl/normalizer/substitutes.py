"""Handlers that put a known log Z into a model's energy sites."""

import sys
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
import numpyro
from jax import Array, random
from numpyro.infer import log_likelihood

from ebm_ppl.energy.distribution import EnergyDistribution, unwrap
from ebm_ppl.energy.fingerprint import require_same_energy
from ebm_ppl.energy.guard import traced_sites, varying_energy_error
from ebm_ppl.energy.log_normalizer import LogNormalizer, log_normalizer_site
from ebm_ppl.energy.pointwise import require_no_rows, require_pointwise
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.exact.enumeration import total
from ebm_ppl.exact.quadrature import integral, rows_at
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.handlers import KnownNormalizers
from ebm_ppl.model.plates import FullPlates
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.belongs import require_site
from ebm_ppl.normalizer.fixed_parameters import FixedParameters
from ebm_ppl.normalizer.parameter_draws import marked_draw
from ebm_ppl.programs.arguments import Arguments


class ExactNormalizers(KnownNormalizers):
    """Exact log Z at every energy site, checked at the data there."""

    def __init__(self, fn: Model, num_points: int | None) -> None:
        super().__init__(fn, self._normalize)
        self.num_points = num_points
        self.rows: Array | None = None
        self.checked: set[str] = set()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        energy = unwrap(msg["fn"]) if msg["type"] == "sample" else None
        if energy is not None:
            observed = msg["value"] if msg["is_observed"] else None
            self.rows = None if observed is None else rows_at(energy, observed)
        super().process_message(msg)

    def _normalize(
        self, name: str, distribution: EnergyDistribution
    ) -> EnergyDistribution:
        require_no_rows(name, distribution)
        # Concrete energies are checked once, traced ones in every run.
        doubt = (
            np.zeros(())
            if name in self.checked
            else require_pointwise(name, distribution)
        )

        discrete = distribution.support.is_discrete
        found = (
            total(distribution, name)
            if discrete
            else integral(distribution, name, self.num_points, self.rows)
        )
        if found.flags:
            method = "Enumeration" if discrete else "Quadrature"
            raise UnknownNormalizerError(
                f"{method} at energy site '{name}' cannot be trusted: "
                f"{' '.join(found.flags)}"
            )

        if isinstance(doubt, jax.core.Tracer):
            return distribution.with_log_normalizer(found.estimate + doubt)
        self.checked.add(name)
        return distribution.with_log_normalizer(found.estimate)


class FixedNormalizers(FixedParameters):
    """log Z as given, and parameters fixed where it belongs to."""

    def __init__(self, fn: Model, log_normalizer: LogNormalizer) -> None:
        super().__init__(fn, self._constant, log_normalizer.params)
        self.certificate = log_normalizer

    def _constant(
        self, name: str, distribution: EnergyDistribution
    ) -> EnergyDistribution:
        require_site(self.certificate, name)
        estimate = self.certificate.estimate[name]
        if estimate.shape != distribution.batch_shape:
            raise ValueError(
                f"log_normalizer has log Z of shape {estimate.shape} at energy site "
                f"'{name}', whose batch shape is now {distribution.batch_shape}; "
                "estimate it for the same arguments, and leave subsample_size out, which "
                "picks some of the rows."
            )

        doubts = list(self.doubts)
        if name in self.certificate.fingerprints:
            doubt = require_same_energy(
                name, distribution, self.certificate.fingerprints[name]
            )
            if isinstance(doubt, jax.core.Tracer):
                # A sampler would take NaN for a point without mass.
                if sites := traced_sites():
                    raise varying_energy_error(name, sites)
                doubts.append(doubt)
        return distribution.with_log_normalizer(
            sum(doubts, estimate) if doubts else estimate
        )


def model_at_draws(model: Model, log_normalizer: LogNormalizer) -> Model:
    """The model with one log Z per draw, given among the posterior samples."""

    @wraps(model)
    def known(*args: Any, **kwargs: Any) -> Any:
        require_same_at_marked_draw(model, log_normalizer, Arguments(args, kwargs))
        # Read outside the model, whose scopes would change the names.
        given = {
            name: numpyro.param(log_normalizer_site(name), None)
            for name in log_normalizer.estimate
        }
        return KnownNormalizers(model, partial(_from_samples, given))(*args, **kwargs)

    return known


def require_same_at_marked_draw(
    model: Model, log_normalizer: LogNormalizer, arguments: Arguments
) -> None:
    """Check the energies at the marked draw against the fingerprints.

    The draws may be traced, but these energies are concrete.
    """
    if not log_normalizer.fingerprints:
        return
    with jax.ensure_compile_time_eval():
        marked = marked_draw(log_normalizer.params, log_normalizer.batch_ndims)
        energies = BoundModel(model, {}, random.key(0), arguments).energies(marked)

    for name, expected in log_normalizer.fingerprints.items():
        if name in energies:
            require_same_energy(name, energies[name], expected)


def _from_samples(
    given: Params, name: str, distribution: EnergyDistribution
) -> EnergyDistribution:
    if given.get(name) is None:
        raise UnknownNormalizerError(
            f"Energy site '{name}' has one log Z per parameter draw, and this run was "
            "given none: pass log_normalizer.samples as the posterior samples of "
            "log_likelihood or Predictive."
        )
    return distribution.with_log_normalizer(given[name])


class EveryRow(FullPlates):
    """Switch subsampling off inside ``numpyro.infer.log_likelihood``.

    It returns one number per row of the data.  NumPyro does not say which function runs
    a model: only the frame of ``log_likelihood`` tells it from a step of SVI.
    """

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] in ("plate", "sample") and _is_running(log_likelihood):
            super().process_message(msg)


def _is_running(function: Any) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
