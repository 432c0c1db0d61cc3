"""What the modules below the energy distribution need to know of one."""

from typing import Any, Protocol

import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike


class Unnormalized(Protocol):
    """An energy over a base: ``U = E − log base``.

    Attributes:
        base: The reference measure.
        start: Where walkers start; None for the base itself.
    """

    base: dist.Distribution
    start: dist.Distribution | None

    @property
    def support(self) -> Any:
        """The base's support."""
        ...

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the elements that have a log Z each."""
        ...

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one point."""
        ...

    def energy(self, value: ArrayLike) -> Array:
        """E(x), of shape ``(..., *batch_shape)``."""
        ...

    def unchecked_potential(self, value: ArrayLike) -> Array:
        """U(x) for values known to be in the support."""
        ...
