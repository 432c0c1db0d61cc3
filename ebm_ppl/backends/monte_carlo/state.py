"""The state of Monte Carlo maximum likelihood."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.weighted_draws import weighted_draws
from ebm_ppl.model.program import Params
from ebm_ppl.training.state import Population, State

# Draws for an export: islands, and draws in each.
POPULATION = (16, 1000)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "transforms", "optim_state", "rng_key"],
    meta_fields=[],
)
@dataclass(frozen=True)
class MonteCarloMLEState(State):
    """Everything that the next update needs: there is no memory but the optimiser's.

    Attributes:
        params: Unconstrained parameters by site name.
        transforms: Unconstrained to constrained, by site name.
        optim_state: The optax state.
        rng_key: The key of the next update.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    rng_key: Array

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, EnergyDistribution],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """Fresh draws of every energy's start, with their weights."""
        found = {}
        for index, (name, energy) in enumerate(energies.items()):
            key = random.fold_in(rng_key, index)
            if name not in given:
                draws = weighted_draws(key, name, energy, POPULATION)
                found[name] = Population(
                    draws.values, "draws of the base", draws.log_weight
                )
        return found
