"""What masks leave of an observed site."""

from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist


def unmasked(wrapped: Any) -> np.ndarray:
    """Which elements of a site count.

    A boolean array of its batch shape and, after it, what ``to_event`` declared.
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
    """Which rows of a site count, at least in part, as its batch shape."""
    elements = unmasked(wrapped)
    return elements.any(tuple(range(len(wrapped.batch_shape), elements.ndim)))
