"""Handlers that put a known log Z into a model's energy sites."""

import sys
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, random
from numpyro import handlers
from numpyro.infer import log_likelihood
from numpyro.primitives import _PYRO_STACK

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


class FixedNormalizers(KnownNormalizers):
    """Fix parameters at the values that log Z belongs to.

    Sample sites become deterministic, without a prior.
    """

    def __init__(self, fn: Model, log_normalizer: LogNormalizer) -> None:
        super().__init__(fn, self._constant)
        self.certificate = log_normalizer
        self.params = log_normalizer.params
        self.doubts: list[Array] = []

    def __enter__(self) -> "FixedNormalizers":
        self.doubts = []
        return super().__enter__()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "control_flow":
            # Sites in the body of a loop or a branch see only the handlers in this
            # stack.
            msg["kwargs"]["substitute_stack"].append(
                ("substitute", jax.tree.map(jnp.asarray, self.params))
            )
        if msg["type"] in ("param", "sample") and msg["name"] in self.params:
            if msg["type"] == "sample":
                self._require_own_value(msg)
            msg["value"] = self.params[msg["name"]]
            if msg["type"] == "sample":
                msg["type"] = "deterministic"
        super().process_message(msg)

    def postprocess_message(self, msg: dict) -> None:
        """Called by NumPyro after every site."""
        fixed = self.params.get(
            msg.get("name", "")
        )  # subsamples, keys and control flow have no name
        if fixed is not None and msg["value"] is not fixed:
            # An outer handler set the value; it must equal the one that log Z belongs
            # to.
            msg["value"] = self._own_value(msg, fixed)

    def _require_own_value(self, msg: dict) -> None:
        """Refuse ``do`` and ``condition`` around this handler with another value.

        They act on sample sites alone, and would find a deterministic one.
        """
        for handler in _PYRO_STACK:
            if handler is self:
                return
            value = None
            if isinstance(handler, handlers.do | handlers.condition):
                value = (handler.data or {}).get(msg["name"])
            if isinstance(handler, handlers.condition) and handler.condition_fn:
                value = handler.condition_fn(msg)
            if value is not None:
                self._own_value(msg | {"value": value}, self.params[msg["name"]])

    def _own_value(self, msg: dict, fixed: Any) -> Any:
        """The value that log Z belongs to.

        Another value is an error; where it is traced, the result is NaN.
        """
        given = msg["value"]
        expected, found = (str(jax.tree.structure(tree)) for tree in (fixed, given))
        if expected != found:
            raise ValueError(
                f"Site '{msg['name']}' was given a value of structure {found}; log Z "
                f"belongs to one of structure {expected}. Estimate it at the value "
                "that you give."
            )

        leaves = list(zip(jax.tree.leaves(fixed), jax.tree.leaves(given), strict=True))
        if any(isinstance(leaf, jax.core.Tracer) for pair in leaves for leaf in pair):
            if msg["type"] != "param":
                return jax.tree.map(
                    lambda own, other: jnp.where(own == other, own, jnp.nan),
                    fixed,
                    given,
                )

            # SVI traces every parameter: the energy keeps the fixed values, and log Z
            # is NaN if the given ones differ.
            self.doubts += [
                jnp.where(jnp.all(own == other), 0.0, jnp.nan) for own, other in leaves
            ]
            return fixed

        if not all(np.array_equal(own, other) for own, other in leaves):
            raise ValueError(
                f"Site '{msg['name']}' was given another value than that which "
                "log_normalizer belongs to. Estimate it there: "
                "ebm_ppl.log_normalizer(rng_key, model, params, ...); for draws give "
                "log_normalizer.samples, from batch_ndims=1 or 2."
            )
        return fixed

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
        require_same_at_first_draw(model, log_normalizer, Arguments(args, kwargs))
        # Read outside the model, whose scopes would change the names.
        given = {
            name: numpyro.param(log_normalizer_site(name), None)
            for name in log_normalizer.estimate
        }
        return KnownNormalizers(model, partial(_from_samples, given))(*args, **kwargs)

    return known


def require_same_at_first_draw(
    model: Model, log_normalizer: LogNormalizer, arguments: Arguments
) -> None:
    """Check the energies at the first draw against the fingerprints.

    The draws may be traced, but these energies are concrete.
    """
    if not log_normalizer.fingerprints:
        return
    with handlers.block(), jax.ensure_compile_time_eval():
        lead = (0,) * log_normalizer.batch_ndims
        first = jax.tree.map(lambda leaf: leaf[lead], log_normalizer.params)
        energies = BoundModel(model, {}, random.key(0), arguments).energies(first)

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
