"""The state of Monte Carlo maximum likelihood."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.base_draws import populations_of_starts
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.model.program import Params
from ebm_ppl.training.state import Population, State


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
        return populations_of_starts(rng_key, energies, given)
