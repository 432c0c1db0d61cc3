"""Attributes of an export: library, log Z with its flags and errors."""

import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ebm_ppl.energy.log_normalizer import LogNormalizer, reasons_of
from ebm_ppl.errors import level_of_caller

# Prefixes of a site's own attributes and variables; its history has further ones.
ATTRIBUTES = (
    "log_normalizer",
    "log_normalizer_flags",
    "log_normalizer_stderr",
    "log_normalizer_lower",
    "log_normalizer_upper",
    "mean_log_density",
    "holdout_chains",
)

STATISTICS = ("log_weight", "energy", "ancestor", "ess", "khat", "held_out")

SHARED = (
    "inference_library",
    "inference_library_version",
    "log_normalizer_source",
    "log_normalizer_bound",
    "entropy_weight",
    "gradient_penalty",
    "contradictions",
    "findings",
    "is_at_maximum",
    "gain_per_row",
    "score_test_flags",
)


def warn_of_flags(log_normalizer: LogNormalizer, missing: str) -> None:
    """Warn that log Z is not certified, and name what is left out as a result."""
    warnings.warn(
        f"{missing} is left out, because log Z ({log_normalizer.method}) is not "
        f"certified: {reasons_of(log_normalizer.flags)} Pass "
        "log_normalizer=ebm_ppl.log_normalizer(...) at these parameters, or "
        "allow_uncertified=True.",
        stacklevel=level_of_caller(),
    )


def warn_of_contradictions(found: Sequence[str]) -> None:
    """Warn of what a certified log Z shows to be wrong with a fit."""
    for contradiction in found:
        warnings.warn(
            f"{contradiction} Look at the fit with ebm_ppl.score_test(...).",
            stacklevel=level_of_caller(),
        )


def attributes_of(
    log_normalizer: LogNormalizer | None, ends: Mapping[str, str]
) -> dict[str, Any]:
    """Attributes as flat strings and numbers, the only types that netCDF takes."""
    attributes: dict[str, Any] = {
        "inference_library": "ebm_ppl",
        "inference_library_version": importlib.metadata.version("ebm-ppl"),
    }
    if log_normalizer is None:
        return attributes
    attributes["log_normalizer_source"] = log_normalizer.method

    for name, end in ends.items():
        attributes[f"log_normalizer_flags{end}"] = json.dumps(
            log_normalizer.flags[name], ensure_ascii=False
        )
        if log_normalizer.batch_ndims:
            # log Z has one value per draw and is part of the log likelihood; the
            # attribute holds the largest standard error.
            attributes[f"log_normalizer_stderr{end}"] = float(
                jnp.max(log_normalizer.stderr[name])
            )
            continue

        for key, value in (
            ("log_normalizer", log_normalizer.estimate),
            ("log_normalizer_stderr", log_normalizer.stderr),
            ("log_normalizer_lower", log_normalizer.lower),
            ("log_normalizer_upper", log_normalizer.upper),
        ):
            attributes[f"{key}{end}"] = _attribute(value[name])
    return attributes


def _attribute(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else np.array(value)
