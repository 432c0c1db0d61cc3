"""The state of contrastive divergence."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.kernels.base import Tuning
from ebm_ppl.model.program import Params
from ebm_ppl.training.state import Population, State

# Chains of an export, over which walkers are spread where their number allows it.
NUM_CHAINS = 4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "position",
        "coordinates",
        "tuning",
        "rng_key",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class ContrastiveDivergenceState(State):
    """Everything that the next update needs.

    Attributes:
        params: Unconstrained parameters by site name.
        transforms: Unconstrained to constrained, by site name.
        optim_state: The optax state.
        position: Walkers that stay from update to update, in base-standard coordinates,
            ``(num_walkers, *batch_shape, ...)`` by energy site; empty where every
            update has walkers of its own.
        coordinates: The maps from these coordinates to values, by energy site.
        tuning: The kernel's tuning, by energy site.
        rng_key: The key of the next update.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    position: dict[str, Array]
    coordinates: dict[str, Transform]
    tuning: dict[str, Tuning]
    rng_key: Array

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, EnergyDistribution],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """Walkers that stay, which count equally."""
        found = {}
        for name, position in self.position.items():
            values = self.coordinates[name](position)
            chains = NUM_CHAINS if len(values) % NUM_CHAINS == 0 else 1
            values = values.reshape(chains, -1, *values.shape[1:])
            found[name] = Population(values, "walkers, without weights")
        return found
