"""The certified density of rows that are not trained on, while a run goes on."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from ebm_ppl.energy.bounded import bound_of
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer, SiteCertificate, flag_where
from ebm_ppl.errors import level_of_caller
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.by_base import NUM_DRAWS, certify_by_base, first_of
from ebm_ppl.normalizer.estimate import log_normalizer
from ebm_ppl.normalizer.flags import worst_of
from ebm_ppl.normalizer.surface import with_full_plates, without_priors
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.watch import WATCHED

NUM_CHAINS = 16
# Largest standard error of a log Z by the base at which a look counts, in nats.
MAX_ERROR = 0.1
KEYS = (WATCHED, f"{WATCHED}_stderr", "density_training")


class Validation:
    """Rows on which a run's parameters are judged as it goes on.

    Every ``every`` updates, log Z is certified and the mean log density of the rows, in
    nats a row, goes to the history: ``density_validation``, its standard error from log
    Z, and ``density_training`` of the rows that are trained on.  All observed sites
    count, priors do not.  The fit is the one with the highest validation density; where
    log Z has a flag there is no number, and a warning at the end says so if there was
    none at all.

    Draws are the same at every look, so that looks can be compared; a final number
    wants fresh ones (:func:`log_normalizer`), and rows of its own.

    Args:
        args: The model's positional arguments with the validation rows.
        every: Updates between two looks.
        patience: Looks without a better one after which the run ends; None goes on.
        options: Options of :func:`log_normalizer`.  By default draws of the base, where
            every energy is :func:`bounded`, and otherwise its bracket, which takes
            seconds.
        kwargs: The model's keyword arguments, and those of the training rows too where
            none are given.

    Raises:
        ValueError: ``every`` or ``patience`` is under 1.
    """

    def __init__(
        self,
        *args: Any,
        every: int = 100,
        patience: int | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("every", every), ("patience", patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; expected at least 1.")
        self.arguments = Arguments(args, kwargs)
        self.every = every
        self.patience = patience
        self.options = dict(options or {})

    def bound_to(self, backend: Any) -> "Look":
        """What a run of this backend watches."""
        return Look(self, backend.model)


@dataclass
class Look:
    """A validation of one model.

    Attributes:
        validation: Rows and options.
        model: The model.
        flags: Of the last log Z that had any.
    """

    validation: Validation
    model: Model
    flags: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = KEYS

    @property
    def every(self) -> int:
        """Updates between two looks."""
        return self.validation.every

    @property
    def patience(self) -> int | None:
        """Looks without a better one after which the run ends."""
        return self.validation.patience

    def look(self, params: Params, arguments: Arguments) -> dict[str, float]:
        """Densities of either set of rows at constrained parameters."""
        key, full = random.key(0), without_priors(with_full_plates(self.model))
        given = self.validation.arguments
        kwargs = {**arguments.kwargs, **given.kwargs}
        rows = BoundModel(full, {}, key, Arguments(given.args, kwargs))
        log_z = self._log_normalizer(rows, params)
        if not log_z.is_certified:
            self.flags = log_z.flags
            return {}

        # The training rows share it where theirs is the same log Z.
        density, error = mean_log_density(rows, params, log_z)
        trained = BoundModel(full, {}, key, arguments)
        shapes = {name: e.batch_shape for name, e in trained.energies(params).items()}
        found = {WATCHED: density, f"{WATCHED}_stderr": error}
        if shapes == {name: jnp.shape(z) for name, z in log_z.estimate.items()}:
            found["density_training"] = mean_log_density(trained, params, log_z)[0]
        return found

    def warn(self, history: Mapping[str, Any]) -> None:
        """Warn where no look had a certified log Z, so that the last state was kept."""
        values = history.get(WATCHED, ())
        if len(values) and not np.any(np.isfinite(values)):
            reasons = "; ".join(
                f"site '{name}': {flag}"
                for name, flags in self.flags.items()
                for flag in flags
            )
            warnings.warn(
                "No validation density was certified, so the last parameters were kept: "
                f"{reasons} Give Validation(..., options=dict(...)) what "
                "ebm_ppl.log_normalizer needs here.",
                stacklevel=level_of_caller(),
            )

    def _log_normalizer(self, rows: BoundModel, params: Params) -> LogNormalizer:
        """By the base where that certifies, or as the options say."""
        options, arguments = dict(self.validation.options), rows.arguments
        energies = rows.energies(params)
        may_use_base = all(_is_bounded(energy) for energy in energies.values())
        method = options.pop("method", "base" if may_use_base else "bracket")
        if method != "base":
            options = {"progress_bar": False} | options | dict(arguments.kwargs)
            return log_normalizer(
                random.key(1),
                self.model,
                params,
                *arguments.args,
                method=method,
                **options,
            )

        points = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
        sites, _ = certify_by_base(
            random.key(1),
            rows,
            energies,
            points,
            options.get("num_chains", NUM_CHAINS),
            options.get("num_walkers", NUM_DRAWS),
            options.get("tolerance", np.inf),
        )
        sites = {n: _with_error(site) for n, site in first_of(sites).items()}
        return LogNormalizer.from_sites(sites, method, params=params)


def _with_error(site: SiteCertificate) -> SiteCertificate:
    """Looks are compared by the error that is observed, which must be small."""
    flags = flag_where(
        ~(site.stderr <= MAX_ERROR),
        f"log Z has a standard error of {worst_of(site.stderr):.2g} nats{{where}}, over "
        f"{MAX_ERROR}: take more draws (num_walkers=).",
    )
    return site._replace(flags=site.flags + flags)


def _is_bounded(energy: EnergyDistribution) -> bool:
    return energy.start is None and bound_of(energy.factors) is not None


def mean_log_density(
    bound: BoundModel, params: Params, log_z: LogNormalizer
) -> tuple[float, float]:
    """Mean log likelihood of a row, and its standard error from that of log Z."""
    value, counts = _likelihood(bound, params, log_z.estimate)
    num_rows = max(float(jnp.sum(count)) for count in counts.values())
    error = sum(
        float(jnp.sum(count * log_z.stderr[name])) for name, count in counts.items()
    )
    return -float(value) / num_rows, error / num_rows


@jax.jit
def _likelihood(
    bound: BoundModel, params: Params, estimates: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Negative log likelihood, and how often every log Z enters."""

    def negative(estimates: dict[str, Array]) -> Array:
        return bound.negative_log_joint(
            params, lambda name, energy: energy.with_log_normalizer(estimates[name])
        )

    return jax.value_and_grad(negative)(estimates)
