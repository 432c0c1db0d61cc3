"""What an energy distribution referred to when it was built."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.errors import at_site


class Origin:
    """What a distribution's arrays were when it was built.

    Pytree operations may change them later.  All origins compare equal, so that they
    neither distinguish pytrees nor trigger recompilation.
    """

    def __init__(
        self, shapes: tuple[tuple, ...], leaves: tuple[list, ...] | None
    ) -> None:
        self.shapes = shapes
        self.leaves = leaves

    @classmethod
    def of(cls, parts: tuple, *, keep: bool) -> "Origin":
        """Record the arrays' shapes and, with ``keep``, the untraced arrays."""
        leaves = tuple(jax.tree.leaves(part) for part in parts)
        kept = tuple(
            [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in part]
            for part in leaves
        )
        return cls(tuple(_shapes(part) for part in leaves), kept if keep else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def require_shapes(self, parts: tuple, site_name: Callable[[], str | None]) -> None:
        """Refuse arrays whose shapes differ from those at construction.

        Raises:
            ValueError: A shape differs; the message says how to call a distribution
                that ``jax.vmap`` returned.
        """
        for part, shapes in zip(parts, self.shapes, strict=True):
            found = _shapes(jax.tree.leaves(part))
            # Their number changes when a lazy property of the base is computed.
            if found == shapes or len(found) != len(shapes):
                continue

            here, there = next(
                (a, b) for a, b in zip(found, shapes, strict=True) if a != b
            )
            raise ValueError(
                f"The energy distribution{at_site(site_name())} holds an array of "
                f"shape {here} that had shape {there} when it was built: it came out "
                "of jax.vmap (or lax.scan, or jax.tree.map stacked several), and its "
                "batch shape does not know of the new axis. Call its methods inside "
                "jax.vmap: jax.vmap(lambda d, v: d.log_prob(v))(distributions, "
                "values); or build one distribution whose base has that batch shape, "
                "base.expand([n])."
            )

    def require_values(self, parts: tuple, name: str | None) -> None:
        """Refuse arrays that differ from those that a constant log Z was given with.

        Raises:
            ValueError: An operation on the pytree changed them.
        """
        if self.leaves is None:
            return

        for part, leaves in zip(parts, self.leaves, strict=True):
            found = jax.tree.leaves(part)
            if len(found) == len(leaves) and not all(
                map(_same_or_unknown, found, leaves)
            ):
                raise ValueError(
                    f"The arrays inside the energy{at_site(name)} were changed "
                    "(jax.tree.map, an optimiser's update) after its constant "
                    "log_normalizer was given, which belongs to the arrays before. "
                    "Build it anew with the log_normalizer of the new ones."
                )


def _shapes(leaves: list) -> tuple:
    # Pytree operations turn Python numbers into arrays; other leaves (functions of
    # Equinox modules) have no shape.
    return tuple(
        () if isinstance(leaf, int | float) else getattr(leaf, "shape", None)
        for leaf in leaves
    )


def _same_or_unknown(found: Any, kept: Any) -> bool:
    if found is kept or kept is None or isinstance(found, jax.core.Tracer):
        return True
    if not isinstance(kept, int | float):
        dtype = getattr(kept, "dtype", object)
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
            return True  # random keys, functions
    return bool(np.array_equal(np.asarray(found), np.asarray(kept), equal_nan=True))
