"""What a finished run shows of itself."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from ebm_ppl.errors import level_of_caller
from ebm_ppl.training.fit import Fit


class Finding(NamedTuple):
    """A sentence on a finished run.

    Attributes:
        text: What was found, what follows from it, and what to do.
        is_warned_of: Whether it speaks against the fit; others say what could not be
            told, and stand in the fit alone.
    """

    text: str
    is_warned_of: bool = True


def told(fit: Fit, findings: Iterable[Finding]) -> Fit:
    """The fit with what was found, of which the caller is warned."""
    found = list(findings)
    for finding in found:
        if finding.is_warned_of:
            warnings.warn(finding.text, stacklevel=level_of_caller())
    return dataclasses.replace(fit, findings=tuple(f.text for f in found))
