"""NumPyro's wrappers around distributions (expand, mask, to_event) and constraints."""

from collections.abc import Callable
from typing import Any

import numpyro.distributions as dist
from numpyro.distributions import constraints

WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


def innermost(fn: dist.Distribution) -> dist.Distribution:
    """The distribution inside all wrappers."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def path_to(found: Any, is_wanted: Callable[[Any], bool]) -> list[str] | None:
    """Types from a distribution down to a wanted one inside it, or None."""
    if isinstance(found, dist.Distribution):
        if is_wanted(found):
            return [type(found).__name__]
        parts, step = list(vars(found).values()), [type(found).__name__]
    elif isinstance(found, list | tuple | dict):
        parts, step = list(found.values() if isinstance(found, dict) else found), []
    else:
        return None

    for part in parts:
        path = path_to(part, is_wanted)
        if path is not None:
            return step + path
    return None


def elementwise(support: constraints.Constraint) -> constraints.Constraint:
    """A constraint without what makes events of its elements."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def rewrap(fn: dist.Distribution, replacement: dist.Distribution) -> dist.Distribution:
    """The same wrappers around another distribution."""
    if isinstance(fn, dist.ExpandedDistribution):
        return rewrap(fn.base_dist, replacement).expand(fn.batch_shape)
    if isinstance(fn, dist.MaskedDistribution):
        return rewrap(fn.base_dist, replacement).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return rewrap(fn.base_dist, replacement).to_event(fn.reinterpreted_batch_ndims)
    return replacement
