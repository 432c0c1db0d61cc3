"""A finished run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ebm_ppl.model.program import Estimate, Params

# Values of a parameter that are printed; of larger ones, the shape.
MAX_PRINTED = 8

# What is typed after a fit's dot, and the function that does it.
FUNCTIONS = {
    "fitted": "ebm_ppl.fitted(fit, model, *args)",
    "log_density": "ebm_ppl.log_density(fit, model, *args, log_normalizer=log_z)",
    "log_normalizer": "ebm_ppl.log_normalizer(rng_key, model, fit, *args)",
    "log_prob": "ebm_ppl.log_density(fit, model, *args, log_normalizer=log_z)",
    "plot": "ebm_ppl.plot_training(fit)",
    "polish": "ebm_ppl.polish(rng_key, fit, model, *args)",
    "sample": "ebm_ppl.sample(rng_key, model, fit, *args)",
    "save": "ebm_ppl.save(path, fit)",
    "score_test": "ebm_ppl.score_test(rng_key, fit, model, *args)",
    "to_arviz": "ebm_ppl.to_arviz(fit, model, *args)",
}


@dataclass(frozen=True, repr=False)
class Fit(Estimate):
    """A finished run: parameters, state and history, up to the same step.

    What is done with it are functions, each of which takes it: :func:`log_normalizer`,
    :func:`log_density`, :func:`sample`, :func:`fitted`, :func:`score_test`,
    :func:`to_arviz`, :func:`save`.

    Attributes:
        params: Constrained values by site name.
        state: The backend's state; give it as ``init_state`` to continue.
        history: One NumPy array per diagnostic with a leading step axis; a dict by site
            name where it is per energy site.
        findings: What the run warned of when it ended, and what it could not tell of
            itself; of all its parts, the last.
    """

    params: Params
    state: Any
    history: dict[str, Any]
    findings: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Name the function for what is no attribute."""
        wanted = FUNCTIONS.get(name)
        instead = f"; write {wanted}" if wanted else ""
        raise AttributeError(f"A Fit has no attribute '{name}'{instead}.")

    def __repr__(self) -> str:
        """How the run ended, every parameter, and what the state says of itself."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        losses = np.asarray(self.history["loss"], float) if self.history else ()
        yield f"Fit by {self.state.backend} after {len(losses):,} updates"
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
        for finding in self.findings:
            yield f"  - {finding}"
