"""Fresh draws of energies' starts, where a backend has no walkers of its own."""

from collections.abc import Container, Mapping

import jax
from jax import Array, random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.weighted_draws import weighted_draws
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.own_draws import OwnDraws
from ebm_ppl.training.state import Population

# Draws for an export, and those by which a run judges itself: islands, draws in each.
SHAPE, OWN_SHAPE = (16, 1000), (16, 1024)


def populations_of_starts(
    rng_key: Array,
    energies: Mapping[str, EnergyDistribution],
    given: Container[str] = (),
) -> dict[str, Population]:
    """Draws of every energy's start with their weights; see :meth:`State.populations`."""
    found = {}
    for index, (name, energy) in enumerate(energies.items()):
        key = random.fold_in(rng_key, index)
        if name not in given:
            draws = weighted_draws(key, name, energy, SHAPE)
            found[name] = Population(
                draws.values, "draws of the base", draws.log_weight
            )
    return found


@jax.jit
def own_draws(bound: BoundModel, params: Params, rng_key: Array) -> dict[str, OwnDraws]:
    """Draws of every energy at these parameters, by which a run is judged."""
    return {
        name: OwnDraws(
            *weighted_draws(random.fold_in(rng_key, index), name, energy, OWN_SHAPE)
        )
        for index, (name, energy) in enumerate(bound.energies(params).items())
    }
