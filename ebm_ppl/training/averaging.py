"""Parameters averaged over the updates of any backend."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ebm_ppl.model.program import Params, constrain
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.diagnostics import Diagnostic


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "average", "count"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Averaged:
    """A backend's state, the average of its unconstrained parameters, and updates."""

    state: Any
    average: Params
    count: Array


@dataclass(frozen=True)
class Averaging:
    """A backend and the average of its parameters: the mean, then exponential.

    Equal to another one of the same backend and decay, so that runs share programs.

    Attributes:
        backend: What trains.
        decay: Of the exponential average, which weighs about 1 / (1 − decay) updates.

    Source: Polyak and Juditsky (1992).
    """

    backend: Any
    decay: float

    @property
    def parts(self) -> dict[str, str]:
        """The backend's."""
        return self.backend.parts

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """The backend's."""
        return self.backend.diagnostics

    @property
    def callables(self) -> dict[str, Any]:
        """The backend's model and whatever else it runs."""
        return self.backend.callables

    def begin(self, state: Any) -> Averaged:
        """No update yet."""
        return Averaged(state, state.params, jnp.zeros((), jnp.int32))

    def update(
        self, state: Any, *args: Any, **kwargs: Any
    ) -> tuple[Averaged, dict[str, Any]]:
        """The backend's step, and its parameters in the average."""
        inner, info = self.backend.update(state.state, *args, **kwargs)
        # Means of the first updates, which the start would else be part of.
        share = jnp.maximum(1.0 - self.decay, 1.0 / (1.0 + state.count))
        average = optax.incremental_update(inner.params, state.average, share)
        return Averaged(inner, average, state.count + 1), info

    def updates_until_upkeep(self, state: Any) -> int:
        """The backend's."""
        return self.backend.updates_until_upkeep(state.state)

    def upkeep(self, state: Any, arguments: Arguments) -> Averaged:
        """The backend's."""
        return replace(state, state=self.backend.upkeep(state.state, arguments))

    def get_params(self, state: Any) -> Params:
        """Constrained averages."""
        return constrain(state.state.transforms, state.average)

    def finish(self, state: Any, arguments: Arguments) -> tuple[Params, Any]:
        """The averages, and the backend's state with them."""
        inner = self.backend.with_params(state.state, state.average, arguments)
        return self.backend.finish(inner, arguments)
