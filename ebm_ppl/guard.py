"""A constant log Z stays constant: what refuses one whose energy varies.

Leaving ``−∇log Z`` out of a gradient, or one value's log Z under another's energy,
gives a fit or a posterior that looks healthy and is wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from ebm_ppl.errors import UnknownNormalizerError, at_site


class Constant:
    """A log Z that belongs to fixed parameters: a hashable array, part of a pytree's
    structure and no leaf of it.

    As a leaf it would have a tangent of its own, which a derivative with respect to the
    whole distribution would take for that of log Z, and ``jax.tree.map`` could scale
    it.
    """

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def _content(self) -> tuple:
        return self.value.shape, self.value.dtype.str, self.value.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"Constant({self.value})"


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_constant(
    name: str | None, closure: list[Array], log_normalizer: Array
) -> tuple[list[Array], Array]:
    """Identity; its derivative raises where the closure is differentiated and log Z is constant."""
    return closure, log_normalizer


@partial(refuse_constant.defjvp, symbolic_zeros=True)
def _refuse_constant_jvp(name: str | None, primals: tuple, tangents: tuple) -> tuple:
    closure_tangents, log_normalizer_tangent = tangents
    learning = any(
        not isinstance(t, SymbolicZero)
        for t in jax.tree.leaves(closure_tangents, is_leaf=_is_zero)
    )

    if learning and isinstance(log_normalizer_tangent, SymbolicZero):
        raise UnknownNormalizerError(
            f"The energy{at_site(name)} is being differentiated with respect to "
            "parameters inside it, but its "
            "log_normalizer is a constant: the term −∇log Z would be dropped and the "
            "fit or posterior would be wrong. "
            "Give log_normalizer as a function of the same parameters, or fit with "
            "ebm_ppl.Jarzynski(model, ...)."
        )
    return primals, tangents


def _is_zero(value: Any) -> bool:
    return isinstance(value, SymbolicZero)


def traced_sites() -> tuple[str, ...]:
    """Names of the sample sites whose values are traced in the run of a model that is
    under way.

    A sampler's latents are: NUTS, a Gibbs step (which conditions on the others) or
    vmapped posterior draws put tracers at them.
    """
    return tuple(
        name
        for handler in _PYRO_STACK
        if isinstance(handler, handlers.trace)
        for name, site in handler.trace.items()
        if site["type"] == "sample"
        and any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(site["value"])
        )
    )


def depends_on_traced(fn: Callable[[Array], Array], value: Array) -> bool:
    """Whether a function closes over traced values, of any type."""
    constants = jax.make_jaxpr(lambda v: fn(v))(
        jax.ShapeDtypeStruct(value.shape, value.dtype)
    ).consts
    return any(isinstance(constant, jax.core.Tracer) for constant in constants)


def varying_energy_error(
    name: str | None, sites: tuple[str, ...]
) -> UnknownNormalizerError:
    """What to say where an energy varies with sites of the run and its log Z does not."""
    found = ", ".join(f"'{site}'" for site in sites)
    return UnknownNormalizerError(
        f"The energy{at_site(name)} varies while sites {found} are sampled (or mapped "
        "over draws), but its "
        "log_normalizer is a constant, which belongs to one value of them: the "
        "posterior or likelihood would be "
        "wrong without a word. Give log_normalizer as a function of the same values "
        "(an array with one entry per "
        "state of a discrete latent); where the energy is smooth in them, "
        "ebm_ppl.normalized(model) does it."
    )


class Origin:
    """What a distribution's arrays were when it was built: pytree operations may change
    them behind its back.

    All origins are equal, so that they neither tell pytrees apart nor compile programs
    anew.
    """

    def __init__(
        self, shapes: tuple[tuple, ...], leaves: tuple[list, ...] | None
    ) -> None:
        self.shapes = shapes
        self.leaves = leaves

    @classmethod
    def of(cls, parts: tuple, *, keep: bool) -> "Origin":
        """The shapes of the arrays in every part and, to ``keep``, those arrays that are not traced."""
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
        """Refuse arrays with axes that the distribution was not built with.

        Raises:
            ValueError: The message says how to call a distribution that ``jax.vmap``
                returned.
        """
        for part, shapes in zip(parts, self.shapes, strict=True):
            found = _shapes(jax.tree.leaves(part))
            # Other numbers of arrays: a lazy property of the base was computed since.
            if found == shapes or len(found) != len(shapes):
                continue
            here, there = next(
                (a, b) for a, b in zip(found, shapes, strict=True) if a != b
            )
            raise ValueError(
                f"The energy distribution{at_site(site_name())} holds an array of "
                f"shape {here} that had shape "
                f"{there} when it was built: it came out of jax.vmap (or lax.scan, or "
                "jax.tree.map stacked several), "
                "and its batch shape does not know of the new axis. Call its methods "
                "inside jax.vmap: "
                "jax.vmap(lambda d, v: d.log_prob(v))(distributions, values); or build "
                "one distribution whose base "
                "has that batch shape, base.expand([n])."
            )

    def require_values(self, parts: tuple, name: str | None) -> None:
        """Refuse arrays that are not those that a constant log Z was given with.

        Raises:
            ValueError: They were changed by an operation on the pytree.
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
                    "(jax.tree.map, an optimiser's update) "
                    "after its constant log_normalizer was given, which belongs to the "
                    "arrays before. Build it anew "
                    "with the log_normalizer of the new ones."
                )


def _shapes(leaves: list) -> tuple:
    # Python's numbers become arrays on the way; other leaves (functions of equinox
    # modules) have no shape.
    return tuple(
        () if isinstance(leaf, int | float) else getattr(leaf, "shape", None)
        for leaf in leaves
    )


def _same_or_unknown(found: Any, kept: Any) -> bool:
    if found is kept or kept is None or isinstance(found, jax.core.Tracer):
        return True
    if not isinstance(kept, int | float) and not jnp.issubdtype(
        getattr(kept, "dtype", object), jnp.number
    ):
        return True  # random keys, functions
    return bool(np.array_equal(np.asarray(found), np.asarray(kept), equal_nan=True))
