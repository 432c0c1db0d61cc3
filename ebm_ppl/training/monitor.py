"""A number of one's own by which a run is watched."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ebm_ppl.model.program import Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding

MONITOR = "monitor"


class Monitor:
    """A number that says how good parameters are, looked at as a run goes on.

    The accuracy of a classifier on rows that are set aside, say; for their certified
    density there is :class:`Validation`.  The number goes to the history as
    ``monitor``, and the fit is the one with the largest.

    Args:
        function: Of constrained parameters by site name; larger is better, NaN is no
            number.  It is called outside of compiled code.
        every: Updates between two looks.
        patience: Looks without a better one after which the run ends; None goes on.

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: ``every`` or ``patience`` is under 1.
    """

    watched = MONITOR
    keys: tuple[str, ...] = (MONITOR,)

    def __init__(
        self,
        function: Callable[[Params], Any],
        *,
        every: int = 100,
        patience: int | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"function is a {type(function).__name__}; expected a function of the "
                "parameters that returns a number: ebm_ppl.Monitor(lambda params: ...)."
            )
        require_counts(every, patience)
        self.function = function
        self.every = every
        self.patience = patience

    def bound_to(self, model: Any, params: Params, arguments: Arguments) -> "Monitor":
        """What a run watches: any model's parameters."""
        return self

    def look(self, params: Params) -> dict[str, float]:
        """The number at constrained parameters.

        Raises:
            TypeError: It is not one number.
        """
        found = self.function(params)
        if np.shape(found) != ():
            raise TypeError(
                f"The monitor returned a value of shape {np.shape(found)}; expected one "
                "number, of which larger is better."
            )
        return {MONITOR: float(found)}

    def findings(self, history: Mapping[str, Any]) -> Iterator[Finding]:
        """That no look gave a number, so that the last state was kept."""
        values = history.get(MONITOR, ())
        if len(values) and not np.any(np.isfinite(values)):
            yield Finding(
                "The monitor gave no finite number, so the last parameters were kept."
            )


def require_counts(every: int, patience: int | None) -> None:
    """Refuse intervals that cannot be.

    Raises:
        ValueError: One is under 1.
    """
    for name, value in (("every", every), ("patience", patience)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1.")
