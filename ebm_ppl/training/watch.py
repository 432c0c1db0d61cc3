"""What a run watches while it trains, and the best state that it saw."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.model.program import Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding


class Watch(Protocol):
    """The interface that the loop needs from what is watched."""

    @property
    def every(self) -> int:
        """Updates between two looks."""
        ...

    @property
    def patience(self) -> int | None:
        """Looks without a better one after which the run ends."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the history's entries."""
        ...

    @property
    def watched(self) -> str:
        """The one of them by which states are compared."""
        ...

    def look(self, params: Params) -> dict[str, float]:
        """Those entries at constrained parameters; NaN where a number is not known."""
        ...

    def findings(self, history: dict[str, Any]) -> Iterator[Finding]:
        """What a finished run's history lacks."""
        ...


class Watchable(Protocol):
    """The interface that a backend's run needs from its ``validation``."""

    def bound_to(self, model: Any, params: Params, arguments: Arguments) -> Watch:
        """What a run watches that begins at constrained parameters, on these rows."""
        ...


@dataclass
class Best:
    """The best state that was seen so far.

    Attributes:
        value: Its entry by which states are compared; −inf before there is one.
        state: A copy of it.
        looks: Looks since then.
    """

    value: float = -np.inf
    state: Any = None
    looks: int = 0

    def see(self, value: float, state: Any) -> None:
        """Keep a better state; NaN is none."""
        self.looks += 1
        if value > self.value:
            self.value, self.looks = value, 0
            self.state = jax.tree.map(jnp.array, state)

    def is_past(self, watch: Watch) -> bool:
        """Whether there was no better one for too long."""
        return watch.patience is not None and self.looks > watch.patience


def columns(num_steps: int, watch: Watch) -> dict[str, np.ndarray]:
    """Entries of the history for a chunk's steps, before any look."""
    return {key: np.full(num_steps, np.nan) for key in watch.keys}
