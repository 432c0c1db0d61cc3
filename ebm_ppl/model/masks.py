"""Unmasked elements and rows of an observed site."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist


def unmasked(wrapped: Any) -> np.ndarray:
    """Which elements of a site are unmasked.

    Returns a boolean array of the batch shape, followed by the dimensions that
    ``to_event`` moved into the event.
    """
    if isinstance(wrapped, dist.Independent):
        return unmasked(wrapped.base_dist)
    if not isinstance(wrapped, dist.ExpandedDistribution | dist.MaskedDistribution):
        return np.ones(wrapped.batch_shape, bool)
    inside = unmasked(wrapped.base_dist)
    declared = inside.shape[len(wrapped.base_dist.batch_shape) :]
    if isinstance(wrapped, dist.MaskedDistribution) and not isinstance(
        wrapped._mask, jax.core.Tracer
    ):
        mask = np.asarray(wrapped._mask)
        inside = inside & mask.reshape(mask.shape + (1,) * len(declared))
    return np.broadcast_to(inside, wrapped.batch_shape + declared)


def unmasked_rows(wrapped: Any) -> np.ndarray:
    """Rows with any unmasked element, a boolean array of the batch shape."""
    elements = unmasked(wrapped)
    return elements.any(tuple(range(len(wrapped.batch_shape), elements.ndim)))


def masks_of(wrapped: Any) -> Iterator[Any]:
    """The arrays that mask a site, traced ones too, from the outside in."""
    while hasattr(wrapped, "base_dist"):
        if isinstance(wrapped, dist.MaskedDistribution):
            mask = wrapped._mask
            if not isinstance(mask, bool):
                yield jnp.asarray(mask)
        wrapped = wrapped.base_dist
