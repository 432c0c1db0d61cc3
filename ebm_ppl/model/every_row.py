"""Energies with one log Z per row, of every row."""

from collections.abc import Mapping
from dataclasses import replace

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Params


def with_every_row(
    bound: BoundModel, params: Params, energies: Mapping[str, EnergyDistribution]
) -> BoundModel:
    """The model without subsampling, where that leaves rows and their log Z's out.

    Elsewhere a subsampled plate changes no energy, and the model comes back as it is; so
    it does where the rows that it was given are a batch themselves.

    Args:
        bound: A model.
        params: Its parameters, as the model takes them.
        energies: Its energies there.
    """
    if not any(energy.batch_shape for energy in energies.values()):
        return bound

    full = replace(bound, model=with_full_plates(bound.model))
    try:
        rows = full.energies(params)
    except (TypeError, ValueError):  # the rows that were given are a batch
        return bound
    if all(rows[n].batch_shape == e.batch_shape for n, e in energies.items()):
        return bound
    return full
