"""Whether data and energies of a subsampled plate are of the same rows."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import jax
import numpy as np
from jax import Array, random
from numpyro import handlers

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import points_in_support
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.data import Observation, observations
from ebm_ppl.model.program import Params
from ebm_ppl.model.repeatable import energies_at_points, moved_a_little

# Draws of rows: few rows of few values may be alike in two or three of them.
NUM_DRAWS = 8


def check_same_rows(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    own_plates: Mapping[str, Collection[str]],
    plates: Mapping[str, Array],
) -> None:
    """Refuse data that follow a plate's rows where the energies do not, and the reverse.

    Args:
        rng_key: A JAX PRNG key.
        bound: The model, subsampled.
        params: Its unconstrained parameters.
        own_plates: By site, the subsampled plates of whose rows it has one log Z each.
            In other plates, data may have more rows for the same energies.
        plates: The rows that subsampled plates have chosen, by name.  Of several, each
            moves while the others stay.

    Raises:
        ValueError: The message names the site and the plate.
    """
    for plate in plates:
        others = {name: rows for name, rows in plates.items() if name != plate}
        held = handlers.substitute(bound.model, data=others) if others else bound.model
        _check_plate(rng_key, replace(bound, model=held), params, own_plates, plate)


def _check_plate(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    own_plates: Mapping[str, Collection[str]],
    plate: str,
) -> None:
    key_params, key_points, *keys = random.split(rng_key, NUM_DRAWS + 2)
    # A weight of zero hides the rows that it multiplies.
    params = moved_a_little(key_params, params)
    energies = bound.energies(params)
    runs = [replace(bound, rng_key=key) for key in keys]
    data = [
        observations(
            run.rng_key,
            run.model,
            run.constrain(params),
            run.arguments,
            full_plates=False,
        )
        for run in runs
    ]
    values = [energies_at_points(run, params, key_points)[0] for run in runs]

    for name, own in own_plates.items():
        if isinstance(data[0][name].value, jax.core.Tracer):
            continue
        data_move = not _are_equal([run[name].value for run in data])
        energies_move = not _are_equal([run[name] for run in values])
        if data_move == energies_move:
            continue
        # Rows that are all alike cannot be told from rows that stay.
        if energies_move and _are_alike(data[0][name], energies[name]):
            continue
        if data_move and (
            plate not in own or not _is_of_rows(energies[name], key_points)
        ):
            continue

        moving, staying = "data", "energies"
        if energies_move:
            moving, staying = staying, moving
        raise ValueError(
            f"Energy site '{name}' has one energy per row of a subsampled plate, and its "
            f"{moving} follow the rows of plate '{plate}' while its {staying} stay those "
            "of the same rows: rows of the one meet other rows of the other. Take both by "
            "numpyro.subsample(..., event_dim=...) in that plate, or both by its indices."
        )


def _are_equal(runs: list[Array]) -> bool:
    first, *others = (np.asarray(run) for run in runs)
    return all(np.array_equal(first, other, equal_nan=True) for other in others)


def _are_alike(observation: Observation, energy: EnergyDistribution) -> bool:
    """Whether all rows of the data are the same."""
    value = np.asarray(observation.value)
    rows = value.reshape(-1, *energy.event_shape)
    return bool(np.all(rows == rows[:1]))


def _is_of_rows(energy: EnergyDistribution, rng_key: Array) -> bool:
    """Whether elements of a batch have other energies at the same points."""
    points = points_in_support(energy.base, rng_key, 8)
    lead = 1 + len(energy.batch_shape)
    first = points.reshape(8, -1, *points.shape[lead:])[:, 0]
    shape = (8, *(1,) * len(energy.batch_shape), *points.shape[lead:])
    everywhere = np.broadcast_to(np.asarray(first).reshape(shape), points.shape)
    found = np.asarray(energy.potential(jax.numpy.asarray(everywhere)))
    of_first = found.reshape(8, -1)[:, :1]
    return not np.array_equal(
        found.reshape(8, -1),
        np.broadcast_to(of_first, (8, found[0].size)),
        equal_nan=True,
    )
