"""Energies with one log Z per row, of every row."""

from dataclasses import replace

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Params


def with_every_row(
    bound: BoundModel, params: Params, energies: dict[str, EnergyDistribution]
) -> tuple[BoundModel, dict[str, EnergyDistribution]]:
    """The model without subsampling, where that leaves log Z's out, and its energies.

    Elsewhere a subsampled plate changes no energy, and both come back as they are; so
    they do where the rows that the model was given are a batch themselves.

    Args:
        bound: A model.
        params: Its parameters, as the model takes them.
        energies: Its energies there.
    """
    if not any(energy.batch_shape for energy in energies.values()):
        return bound, energies

    full = replace(bound, model=with_full_plates(bound.model))
    try:
        rows = full.energies(params)
    except (TypeError, ValueError):  # the rows that were given are a batch
        return bound, energies
    if all(rows[n].batch_shape == e.batch_shape for n, e in energies.items()):
        return bound, energies
    return full, rows
