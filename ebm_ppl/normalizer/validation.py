"""The certified density of rows that are not trained on, while a run goes on."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import random

from ebm_ppl.energy.bounded import bound_of
from ebm_ppl.energy.log_normalizer import LogNormalizer, reasons_of
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.density import mean_log_density
from ebm_ppl.normalizer.estimate import log_normalizer
from ebm_ppl.normalizer.look_by_base import Base
from ebm_ppl.normalizer.same_energies import have_same_energies
from ebm_ppl.normalizer.surface import without_priors
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.monitor import require_counts

WATCHED = "density_validation"
KEYS = (WATCHED, f"{WATCHED}_stderr", "density_training")
RESERVED = set(inspect.signature(log_normalizer).parameters) - {"args", "kwargs"}
OPTIONS = RESERVED - {"rng_key", "model", "params", "batch_ndims"}
OF_BASE = {"method", "num_chains", "num_walkers", "tolerance", "progress_bar"}


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
            every energy is :func:`bounded`: limits within ``tolerance`` of 2 nats, an
            observed error of 0.1 at most and, if the limits leave over a nat open, no
            more than 5% of the rows where no draw has come.  Otherwise, or with options
            that draws of the base do not have, its bracket, which takes seconds.
        kwargs: The model's keyword arguments, and those of the training rows too where
            none are given.

    Raises:
        ValueError: ``every`` or ``patience`` is under 1, or an option is none of
            :func:`log_normalizer`'s or of its method's.
    """

    def __init__(
        self,
        *args: Any,
        every: int = 100,
        patience: int | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require_counts(every, patience)
        self.arguments = Arguments(args, kwargs)
        self.every = every
        self.patience = patience
        self.options = dict(options or {})

        known = OF_BASE if self.options.get("method") == "base" else OPTIONS
        if unknown := set(self.options) - known:
            raise ValueError(
                f"Validation(options=) has {sorted(unknown)}; expected some of "
                f"{sorted(known)}."
            )

    def bound_to(
        self, model: Model, params: Params, arguments: Arguments
    ) -> "ModelValidation":
        """What a run watches, checked on the rows that it is to train on.

        Raises:
            ValueError: The model's energies depend on the rows that it is given, so that
                those of the validation rows are others.
        """
        given = self.arguments
        if clash := RESERVED & (set(given.kwargs) | set(arguments.kwargs)):
            raise ValueError(
                f"The model has keyword arguments {sorted(clash)}, which "
                "ebm_ppl.log_normalizer has too; rename them in the model."
            )
        likelihood, key = without_priors(with_full_plates(model)), random.key(0)
        kwargs = {**arguments.kwargs, **given.kwargs}
        rows = BoundModel(likelihood, {}, key, Arguments(given.args, kwargs))
        trained = BoundModel(likelihood, {}, key, arguments)
        are_shared = have_same_energies(rows, trained, params)
        rows_by_base, trained_by_base = (Base(b, self.options) for b in (rows, trained))
        return ModelValidation(self, model, rows_by_base, trained_by_base, are_shared)


@dataclass
class ModelValidation:
    """A validation of one model.

    Attributes:
        validation: Rows and options.
        model: The model.
        rows: Its likelihood of the validation rows, and log Z by the base there.
        trained: The same of the training rows.
        are_shared: Whether the same log Z's serve both.
        flags: Of the last log Z that had any.
    """

    validation: Validation
    model: Model
    rows: Base
    trained: Base
    are_shared: bool
    flags: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = KEYS
    watched: str = WATCHED

    @property
    def every(self) -> int:
        """Updates between two looks."""
        return self.validation.every

    @property
    def patience(self) -> int | None:
        """Looks without a better one after which the run ends."""
        return self.validation.patience

    def look(self, params: Params) -> dict[str, float]:
        """Densities of either set of rows at constrained parameters."""
        log_z = self._log_normalizer(self.rows, params)
        if not log_z.is_certified:
            self.flags = log_z.flags
            return {}
        density, error = mean_log_density(self.rows.bound, params, log_z)
        found = {WATCHED: density, f"{WATCHED}_stderr": error}

        if not self.are_shared:
            log_z = self._log_normalizer(self.trained, params)
        if log_z.is_certified:
            density, _ = mean_log_density(self.trained.bound, params, log_z)
            found["density_training"] = density
        return found

    def findings(self, history: Mapping[str, Any]) -> Iterator[Finding]:
        """That no look had a certified log Z, so that the last state was kept."""
        values = history.get(WATCHED, ())
        if len(values) and not np.any(np.isfinite(values)):
            yield Finding(
                "No validation density was certified, so the last parameters were kept: "
                f"{reasons_of(self.flags)} Give Validation(..., options=dict(...)) what "
                "ebm_ppl.log_normalizer needs here."
            )

    def _log_normalizer(self, base: Base, params: Params) -> LogNormalizer:
        """By the base where that certifies, or as the options say."""
        options, arguments = dict(self.validation.options), base.bound.arguments
        energies = base.bound.energies(params)
        may_use_base = options.keys() <= OF_BASE and all(
            energy.start is None and bound_of(energy.factors) is not None
            for energy in energies.values()
        )
        method = options.pop("method", "base" if may_use_base else "bracket")
        if method == "base":
            return base.log_normalizer(params, energies)
        return log_normalizer(
            random.key(1),
            self.model,
            params,
            *arguments.args,
            method=method,
            **({"progress_bar": False} | options),
            **arguments.kwargs,
        )
