"""What a backend declares of its history."""

from typing import Any, NamedTuple

import numpy as np


class Diagnostic(NamedTuple):
    """One key of ``Fit.history``.

    Attributes:
        key: The key.
        by_site: Whether its entry is a dict by energy site.
        label: What the progress bar calls it; empty: it is not shown.
        spec: How a number is written there.
        error: The key of its standard error, written beside it.
    """

    key: str
    by_site: bool = False
    label: str = ""
    spec: str = ".4g"
    error: str | None = None


LOSS = Diagnostic("loss", label="loss")
GRAD_NORM = Diagnostic("grad_norm")


def progress_text(diagnostics: tuple[Diagnostic, ...], history: dict[str, Any]) -> str:
    """A short summary of the last entries of a history.

    Of a site with a batch shape the smallest entry is shown, and none where there would
    be a standard error beside it.
    """
    parts = []
    for shown in diagnostics:
        if not shown.label or shown.key not in history:
            continue
        entry = history[shown.key]
        if not shown.by_site:
            parts.append(f"{shown.label} {entry[-1]:{shown.spec}}")
        elif shown.error is None:
            worst = ", ".join(f"{np.min(v[-1]):{shown.spec}}" for v in entry.values())
            parts.append(f"{shown.label} {worst}")
        else:
            parts += _with_errors(shown, entry, history[shown.error])
    return ", ".join(parts)


def _with_errors(
    shown: Diagnostic, entry: dict[str, Any], errors: dict[str, Any]
) -> list[str]:
    spec = shown.spec
    return [
        f"{shown.label}[{name}] {values[-1]:{spec}} ± {errors[name][-1]:{spec}}"
        for name, values in entry.items()
        if np.ndim(errors[name][-1]) == 0
    ]
