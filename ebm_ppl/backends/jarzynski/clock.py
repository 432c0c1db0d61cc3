"""When islands are renewed, and along what."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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
        times: So many times as many temperatures are followed.
        reference: A level of the energy, ``batch``, which sums of weights leave out.
    """

    ladder: Ladder
    times: Array
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
    renew_every: int | None, kernel: Kernel, walkers: dict[str, Walkers]
) -> Clock | None:
    """The first renewal comes after some periods: all islands are fresh at the start.

    Ladders are shapes only: the first renewal chooses them.
    """
    if renew_every is None:
        return None

    lines = {}
    for name, site in walkers.items():
        like, batch_shape = site.ensemble.potential, site.ensemble.past.shape[1:]
        num_elements = math.prod(site.ensemble.position.shape[like.ndim :])
        tunings = jax.tree.map(
            lambda leaf, dtype=like.dtype: jnp.broadcast_to(
                leaf, (NUM_TEMPERATURES, *jnp.shape(leaf))
            ).astype(dtype),
            kernel.exactly().init_tuning(num_elements, batch_shape),
        )
        betas = jnp.ones(NUM_TEMPERATURES, like.dtype)
        ladder = Ladder(jnp.zeros((), like.dtype), betas, tunings)
        lines[name] = Line(ladder, count(1), jnp.zeros(batch_shape, like.dtype))
    return Clock(count(FIRST_PERIODS * renew_every), count(0), count(0), lines)


def count(number: int) -> Array:
    """A count of a fixed type, as the next update's program expects it."""
    return jnp.asarray(number, jnp.int32)
