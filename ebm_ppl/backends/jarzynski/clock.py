"""When islands are renewed, and along what."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.smc.path import Ladder
from ebm_ppl.walkers.state import Walkers

# Temperatures of a renewal.
NUM_TEMPERATURES = 96
# Periods before the first one.
FIRST_PERIODS = 4


class Line(NamedTuple):
    """How fresh islands of one site come about.

    Attributes:
        ladder: From the start to the energy as it was when the ladder was chosen.
        num_moves: Moves at each temperature.
        reference: A level of the energy, ``batch``, which sums of weights leave out.
    """

    ladder: Ladder
    num_moves: Array
    reference: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "until_pilot", "num_pilots", "lines"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Clock:
    """The clock of a fit, part of its state.

    Attributes:
        left: Updates until islands are renewed.
        until_pilot: Renewals until the ladders are chosen anew.
        num_pilots: How often they were.
        lines: By site.
    """

    left: Array
    until_pilot: Array
    num_pilots: Array
    lines: dict[str, Line]

    def tick(self) -> "Clock":
        """After one update."""
        return replace(self, left=jnp.maximum(self.left - 1, 0))


def begin_clock(
    renew_every: int | None,
    kernel: Kernel,
    energies: dict[str, EnergyDistribution],
    walkers: dict[str, Walkers],
) -> Clock | None:
    """The first renewal comes after some periods: all islands are fresh at the start."""
    if renew_every is None:
        return None

    lines = {}
    for name, energy in energies.items():
        dtype = walkers[name].ensemble.potential.dtype
        tuning = kernel.exactly().init_tuning(
            math.prod(energy.event_shape), energy.batch_shape
        )
        tunings = jax.tree.map(
            lambda leaf, dtype=dtype: jnp.broadcast_to(
                leaf, (NUM_TEMPERATURES, *jnp.shape(leaf))
            ).astype(dtype),
            tuning,
        )
        betas = jnp.ones(NUM_TEMPERATURES, dtype)
        ladder = Ladder(jnp.zeros((), dtype), betas, tunings)
        reference = jnp.zeros(energy.batch_shape, dtype)
        lines[name] = Line(ladder, count(1), reference)
    return Clock(count(FIRST_PERIODS * renew_every), count(0), count(0), lines)


def count(number: int) -> Array:
    """A count of a fixed type, as the next update's program expects it."""
    return jnp.asarray(number, jnp.int32)
