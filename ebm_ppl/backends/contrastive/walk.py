"""A few moves under one energy."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.start import target_of
from ebm_ppl.kernels.base import Kernel, Tuning, move, with_event_dims
from ebm_ppl.walkers.site import draw_start


class Walked(NamedTuple):
    """Where walkers are after their moves.

    Attributes:
        position: In coordinates u.
        values: The same as values, ``(num_walkers, *batch_shape, *event_shape)``.
        acceptance: Their mean acceptance, of the batch shape.
    """

    position: Array
    values: Array
    acceptance: Array


@dataclass(frozen=True)
class Walk:
    """Moves under one energy at fixed parameters.

    Attributes:
        name: Its site.
        energy: The energy.
        transform: The map from coordinates u to values.
        kernel: What moves walkers.
        tuning: Its tuning.
        num_steps: Moves.
        rng_key: For the moves.
        key_begin: For draws at which walkers begin: with the other one, the noise of a
            move would be that of the draws.
    """

    name: str
    energy: EnergyDistribution
    transform: Transform
    kernel: Kernel
    tuning: Tuning
    num_steps: int
    rng_key: Array
    key_begin: Array

    def from_rows(self, rows: Array) -> Walked:
        """Walkers that begin at values ``(num_walkers, *batch_shape, *event_shape)``."""
        return self.from_positions(self.transform.inv(rows))

    def from_positions(self, position: Array) -> Walked:
        """Walkers that begin in coordinates u."""
        target = target_of(self.energy, self.transform)
        before = self.kernel.evaluate(target, position)
        after, info = move(
            self.kernel, self.rng_key, before, target, self.tuning, self.num_steps
        )
        acceptance = jnp.mean(info.acceptance, axis=0)
        return Walked(after.position, self.transform(after.position), acceptance)

    def draws(self, num: int) -> Array:
        """Draws of the energy's start, in coordinates u."""
        return draw_start(
            random.fold_in(self.key_begin, 0),
            self.name,
            self.energy,
            self.transform,
            (num,),
        )

    def some_reset(self, position: Array, rate: float) -> Array:
        """Positions of which a share begins again in draws of the start."""
        shape = (len(position), *self.energy.batch_shape)
        key = random.fold_in(self.key_begin, 1)
        is_reset = random.bernoulli(key, rate, shape)
        is_reset = with_event_dims(is_reset, position.ndim - len(shape))
        return jnp.where(is_reset, self.draws(len(position)), position)
