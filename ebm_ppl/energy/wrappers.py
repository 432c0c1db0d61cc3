"""NumPyro's wrappers around a distribution: expand, mask and to_event."""

import numpyro.distributions as dist

WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


def innermost(fn: dist.Distribution) -> dist.Distribution:
    """The distribution inside all wrappers."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def rewrap(fn: dist.Distribution, replacement: dist.Distribution) -> dist.Distribution:
    """The same wrappers around another distribution."""
    if isinstance(fn, dist.ExpandedDistribution):
        return rewrap(fn.base_dist, replacement).expand(fn.batch_shape)
    if isinstance(fn, dist.MaskedDistribution):
        return rewrap(fn.base_dist, replacement).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return rewrap(fn.base_dist, replacement).to_event(fn.reinterpreted_batch_ndims)
    return replacement
