"""The state of score matching."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.model.program import Params
from ebm_ppl.training.state import State


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "transforms", "optim_state", "rng_key"],
    meta_fields=[],
)
@dataclass(frozen=True)
class ScoreMatchingState(State):
    """Everything that the next update needs: there are no draws.

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
