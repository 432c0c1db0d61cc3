"""One energy site of a model at fixed parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import annealing_path, starting_distribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.smc.path import Path

Progress = Callable[[int, int], object]
"""Told how many temperatures were just done, and how many the whole pass has."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bound", "params", "transform", "reference"],
    meta_fields=["name"],
)
@dataclass(frozen=True)
class SiteAtParams:
    """One energy site of a model at fixed unconstrained parameters.

    ``transform`` maps positions to values.  ``reference``, of the batch shape, is
    subtracted from the energy along the path: sums of log weights are then as small as
    the energy's variation, whatever constant it contains.
    """

    name: str
    bound: BoundModel
    params: Params
    transform: Transform
    reference: Array | None = None

    @property
    def distribution(self) -> EnergyDistribution:
        """The energy distribution, rebuilt in the current trace."""
        return self.bound.energies(self.params)[self.name]

    @property
    def dimension(self) -> int:
        """Number of elements of an event."""
        return math.prod(self.distribution.event_shape)

    def path(self) -> Path:
        """The path from the starting distribution to the energy."""
        distribution, reference = self.distribution, self.reference
        path = annealing_path(
            distribution, starting_distribution(distribution, self.name), self.transform
        )
        if reference is None:
            return path

        return path._replace(
            difference=lambda position: path.difference(position) - reference
        )

    def draw(self, rng_key: Array, shape: tuple[int, int]) -> Array:
        """Exact draws from the starting distribution, as positions."""
        return self.transform.inv(
            starting_distribution(self.distribution, self.name).sample(rng_key, shape)
        )
