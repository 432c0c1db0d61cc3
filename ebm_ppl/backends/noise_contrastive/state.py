"""The state of noise-contrastive estimation."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.base_draws import populations_of_starts
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.program import Params
from ebm_ppl.training.state import Population, State

# Nats that a learned log Z may lie outside of a certified one's interval.
MAX_GAP = 0.2


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "log_normalizers",
        "log_normalizer_optim_state",
        "rng_key",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class NoiseContrastiveState(State):
    """Everything that the next update needs.

    Attributes:
        params: Unconstrained parameters by site name.
        transforms: Unconstrained to constrained, by site name.
        optim_state: The optax state.
        log_normalizers: The learned log Z by energy site, each of its batch shape.
        log_normalizer_optim_state: Their optax state.
        rng_key: The key of the next update.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    log_normalizers: dict[str, Array]
    log_normalizer_optim_state: Any
    rng_key: Array

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, EnergyDistribution],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """Fresh noise, weighted into draws of the model."""
        return populations_of_starts(rng_key, energies, given)

    def contradictions(self, log_normalizer: LogNormalizer) -> tuple[str, ...]:
        """A certified log Z away from the learned one."""
        found = []
        for name, learned in self.log_normalizers.items():
            value = np.asarray(learned, float)
            over = np.max(value - np.asarray(log_normalizer.upper[name]))
            under = np.max(np.asarray(log_normalizer.lower[name]) - value)
            if max(over, under) > MAX_GAP:
                found.append(
                    f"log Z of energy site '{name}' was learned {max(over, under):.2g} "
                    "nats away from what it is: noise and data did not tell it."
                )
        return tuple(found)
