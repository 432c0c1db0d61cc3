"""Errors that name the site, what was found and what to write instead."""

import inspect
import sys
from typing import Any


class UnknownNormalizerError(NotImplementedError):
    """A normalised quantity was asked of an energy with an unknown normaliser.

    Subclasses :class:`NotImplementedError`, so NumPyro's initialisation strategies fall
    back as they do for any distribution that cannot be sampled.
    """


class UncertifiedNormalizerError(ValueError):
    """A log Z was to be used as known, but its checks say that it may be wrong."""


class NonFiniteError(FloatingPointError):
    """A training step gave a NaN or an infinity; ``fit`` holds the last good state.

    Attributes:
        step: Index of the first bad step, counted from the start of this run.
        fit: The :class:`~ebm_ppl.Fit` up to the step before it.
    """

    def __init__(self, message: str, step: int, fit: Any) -> None:
        super().__init__(message)
        self.step = step
        self.fit = fit


def find_site_name(distribution: Any, unwrap: Any) -> str | None:
    """Name of the sample site of an (unwrapped) distribution, from the callers' frames.

    ``Distribution.log_prob`` does not know its site, but NumPyro's loops hold the
    site's message in a local variable when they call it, and this package's loops hold
    a dict of distributions by site name.  Used only for error messages, never to
    compute.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if not isinstance(value, dict):
                continue
            if (
                isinstance(value.get("name"), str)
                and unwrap(value.get("fn")) is distribution
            ):
                return value["name"]

            for name, candidate in value.items():
                if candidate is distribution and isinstance(name, str):
                    return name

        frame = frame.f_back  # type: ignore[assignment]
    return None


def at_site(name: str | None) -> str:
    """``" at site 'x'"``, or nothing where the name is unknown."""
    return f" at site '{name}'" if name else ""


def level_of_caller() -> int:
    """The ``stacklevel`` with which a warning points outside of this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        f"{__package__}."
    ):
        frame, level = frame.f_back, level + 1
    return level
