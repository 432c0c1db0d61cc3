"""A loss of every row in the place of an energy's log density."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax, random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import points_in_support
from ebm_ppl.kernels.base import with_event_dims


class RowLoss(dist.Distribution):
    """Stands in a joint density for an energy: a row counts minus a loss of it.

    Plates, scales, masks and priors then mean for the loss what they mean for a log
    density.

    Args:
        energy: The energy whose place it takes.
        loss: From values ``(num_rows, *batch_shape, *event_shape)``, all of them inside
            the support, to ``(num_rows, *batch_shape)``.  Rows outside, such as what
            fills those that are masked, have an infinite loss and no gradient.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        energy: EnergyDistribution,
        loss: Callable[[Array], Array],
    ) -> None:
        self.loss = loss
        inside = points_in_support(energy.base, random.key(0), 1)[0]
        self._inside = lax.stop_gradient(inside)
        self._support = energy.support
        super().__init__(energy.batch_shape, energy.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The energy's support."""
        return self._support

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Minus the loss, ``(..., *batch_shape)``."""
        own = self.batch_shape + self.event_shape
        leading = value.shape[: value.ndim - len(own)]
        rows = value.reshape(-1, *own)

        is_inside = jnp.broadcast_to(
            self._support(rows), (len(rows), *self.batch_shape)
        )
        chosen = with_event_dims(is_inside, len(self.event_shape))
        loss = self.loss(jnp.where(chosen, rows, self._inside))
        return jnp.where(is_inside, -loss, -jnp.inf).reshape(leading + self.batch_shape)
