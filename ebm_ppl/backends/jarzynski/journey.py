"""Walkers led from their parameters to others, such as averages."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.walkers.moves import move_walkers, resample_or_return
from ebm_ppl.walkers.switch import switch

# Steps of a journey, each a switch, moves and a look at the ESS: one switch all the way
# would leave the weights to a few walkers.
NUM_STEPS = 64


def led_to(
    backend: Any, state: JarzynskiState, params: Params, arguments: Arguments
) -> JarzynskiState:
    """The state at ``params``, its weights those of the way there.

    Args:
        backend: A :class:`Jarzynski`.
        state: The state.
        params: Unconstrained parameters.
        arguments: The model's arguments.
    """
    bound = BoundModel(backend.model, state.transforms, state.rng_key, arguments)
    settings = (
        backend.kernel,
        backend.num_kernel_steps,
        backend.ess_threshold,
        backend.resampling,
    )
    return _journey(settings, bound, state, params)


@partial(jax.jit, static_argnums=0)
def _journey(
    settings: tuple, bound: BoundModel, state: JarzynskiState, params: Params
) -> JarzynskiState:
    kernel, num_kernel_steps, ess_threshold, resampling = settings
    key_journey, key_next = random.split(state.rng_key)

    def step(walkers: dict, beta_and_key: tuple[Array, Array]) -> tuple[dict, None]:
        beta, key = beta_and_key
        key_move, key_resample = random.split(key)
        here = jax.tree.map(
            lambda old, new: old + beta * (new - old), state.params, params
        )

        # Switch, move, resample
        switched = {
            name: switch(kernel, bound, name, here, site)
            for name, site in walkers.items()
        }

        moved, _ = move_walkers(
            kernel,
            key_move,
            bound.energies(here),
            {name: site for name, (site, _, _) in switched.items()},
            {name: evaluated for name, (_, evaluated, _) in switched.items()},
            num_kernel_steps,
        )
        kept, _ = resample_or_return(
            key_resample,
            jnp.ones((), bool),
            moved,
            walkers,
            ess_threshold,
            resampling,
        )
        return kept, None

    betas = jnp.arange(1, NUM_STEPS + 1) / NUM_STEPS
    walkers, _ = lax.scan(
        step, state.walkers, (betas, random.split(key_journey, NUM_STEPS))
    )
    return replace(state, params=params, walkers=walkers, rng_key=key_next)
