"""Held-out islands replaced at a user's wish, to anchor log Z anew."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.backends.jarzynski.placement import place_walkers
from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.backends.jarzynski.warnings import warn_where_log_z_drifted
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments


def with_fresh_log_z(
    backend: Any,
    rng_key: Array,
    state: JarzynskiState,
    arguments: Arguments,
    num_temperatures: int,
) -> JarzynskiState:
    """The state with all held-out islands replaced, along a ladder as long as asked."""
    bound = BoundModel(backend.model, state.transforms, rng_key, arguments)
    walkers = {}
    for index, (name, old) in enumerate(state.walkers.items()):
        fresh = place_walkers(
            backend,
            random.fold_in(rng_key, index),
            name,
            bound,
            state.params,
            num_chains=backend.num_holdout_chains,
            num_temperatures=num_temperatures,
            transform=old.transform,
        )

        split = old.num_training_chains
        ensemble = jax.tree.map(
            lambda kept, new, split=split: jnp.concatenate([kept[:split], new]),
            old.ensemble,
            fresh.ensemble,
        )
        walkers[name] = replace(old, ensemble=ensemble)
        warn_where_log_z_drifted(name, old, walkers[name])
    return replace(state, walkers=walkers)
