"""One energy site of a model at fixed parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import (
    annealing_path,
    starting_coordinates,
    starting_distribution,
)
from ebm_ppl.energy.states import needs_continuous
from ebm_ppl.kernels.base import Kernel, Space, Tuning
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

    def init_tuning(self, kernel: Kernel) -> Tuning:
        """The first tuning of a kernel that is to move this site's walkers."""
        return kernel.init_tuning(self.dimension, self.distribution.batch_shape)

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

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> Array:
        """Exact draws from the starting distribution, as positions."""
        return draw_start(rng_key, self.name, self.distribution, self.transform, shape)


def draw_start(
    rng_key: Array,
    name: str,
    distribution: EnergyDistribution,
    transform: Transform,
    shape: tuple[int, ...],
) -> Array:
    """Exact draws from an energy's starting distribution, as positions."""
    return transform.inv(
        starting_distribution(distribution, name).sample(rng_key, shape)
    )


def coordinates_for(
    kernel: Kernel, distribution: EnergyDistribution, name: str, what: str
) -> Transform:
    """The map from coordinates in which a site's start is standard, for its walkers.

    Args:
        kernel: The kernel that is to move the site's walkers.
        distribution: The energy at the site.
        name: The site's name.
        what: What the walkers are for, in words.

    Raises:
        ValueError: The site's support is discrete, or the kernel's space finite.
        UnknownNormalizerError: The base is improper and no start is named.
    """
    if distribution.support.is_discrete:
        raise ValueError(needs_continuous(distribution.base, name, what))
    if kernel.space is not Space.REAL:
        raise ValueError(
            f"The energy of site '{name}' has a continuous support "
            f"({distribution.support}), and {type(kernel).__name__} moves in "
            f"{kernel.space.value}. Take MALA() or another kernel of real coordinates."
        )
    return starting_coordinates(distribution, name)
