"""A finished run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ebm_ppl.model.program import Params

# Values of a parameter that are printed; of larger ones, the shape.
MAX_PRINTED = 8


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """How the run ended, every parameter, and what the state says of itself."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        losses = np.asarray(self.history["loss"], float) if self.history else ()
        who = type(self.state).__name__.removesuffix("State")
        yield f"Fit by {who} after {len(losses):,} updates"
        if len(losses):
            recent = losses[-max(1, len(losses) // 10) :]
            yield f"  loss {np.mean(recent):.6g}, mean of the last {len(recent):,}"

        for name, value in self.params.items():
            leaves = jax.tree.leaves(value)
            size = sum(np.size(leaf) for leaf in leaves)
            if len(leaves) == 1 and size <= MAX_PRINTED:
                yield f"  {name} = {np.array2string(np.asarray(value), precision=4)}"
            else:
                yield f"  {name}: {size:,} numbers in {len(leaves)} arrays"

        for name, value in self.state.attributes().items():
            yield f"  {name} = {value:.4g}"
