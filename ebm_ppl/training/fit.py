"""A finished run."""

from dataclasses import dataclass
from typing import Any

from ebm_ppl.model.program import Params


@dataclass(frozen=True)
class Fit:
    """A finished run: parameters, state and history, up to the same step.

    Attributes:
        params: Constrained values by site name.
        state: The backend's state; give it as ``init_state`` to continue.
        history: One NumPy array per diagnostic with a leading step axis; a dict by site
            name where it is per energy site.
    """

    params: Params
    state: Any
    history: dict[str, Any]
