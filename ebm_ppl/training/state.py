"""What the state of any backend can tell an export."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from ebm_ppl.energy.log_normalizer import LogNormalizer


class Population(NamedTuple):
    """Draws of one energy site that a state holds.

    Attributes:
        values: ``(num_chains, num_draws, *batch_shape, *event_shape)``.
        what: What they are, in words.
        log_weight: Log weights A, ``(num_chains, num_draws, *batch_shape)``; None where
            draws count equally.
        held_out: Whether each chain is held out of the training, ``(num_chains,)``.
    """

    values: Array
    what: str
    log_weight: Array | None = None
    held_out: Array | None = None


class State:
    """Base of the states of backends; a state without walkers overrides nothing."""

    @property
    def backend(self) -> str:
        """Name of the backend that it is of."""
        return type(self).__name__.removesuffix("State")

    def layout(self) -> dict[str, int]:
        """What its arrays do not tell, and a file must, by name."""
        return {}

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, Any],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """Draws by energy site.

        Args:
            rng_key: For states that make theirs.
            energies: The energies at the state's parameters, by site.
            given: Sites whose draws come from elsewhere, and need not be made.
        """
        return {}

    def attributes(self) -> dict[str, float]:
        """Numbers that describe the fit, by attribute name."""
        return {}

    def running_log_normalizer(self) -> LogNormalizer | None:
        """Log Z as the run estimates it; never certified."""
        return None

    def contradictions(self, log_normalizer: LogNormalizer) -> tuple[str, ...]:
        """What a certified log Z at the fit's parameters shows to be wrong with it."""
        return ()


@partial(
    jax.tree_util.register_dataclass, data_fields=["rng_key"], meta_fields=["name"]
)
@dataclass(frozen=True)
class OnlyParameters(State):
    """Stands for the state of a fit that was read for its parameters alone.

    Attributes:
        rng_key: For what an export draws.
        name: The backend that made the fit.
    """

    rng_key: Array
    name: str

    @property
    def backend(self) -> str:
        """Name of the backend that it was of."""
        return self.name
