"""Arguments of a model: arrays are traced, everything else is static.

NumPy and JAX arrays of numbers may change without recompilation.  Anything else (flags,
sizes, strings, data frames, tensors of other libraries, objects) is passed to the model
unchanged, and two calls share an executable only where its *content* is the same: an
equal copy does not recompile, and an object that was changed in place does.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.programs.equality import content


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Arguments:
    """Arguments of a model: a pytree with arrays as leaves and static other values."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Arrays are leaves; the rest is structure, compared by content."""
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        is_array = [_is_traced(leaf) for leaf in leaves]
        arrays = tuple(
            _unmasked(leaf) if yes else None
            for leaf, yes in zip(leaves, is_array, strict=True)
        )
        static = tuple(
            None if yes else _Static(leaf)
            for leaf, yes in zip(leaves, is_array, strict=True)
        )
        return arrays, (treedef, static)

    @classmethod
    def tree_unflatten(cls, aux: tuple, arrays: tuple) -> "Arguments":
        """Inverse of :meth:`tree_flatten`."""
        treedef, static = aux
        leaves = [
            array if fixed is None else fixed.value
            for array, fixed in zip(arrays, static, strict=True)
        ]
        return cls(*jax.tree.unflatten(treedef, leaves))


class _Static:
    """A static value, compared by its content at the time of the call."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.content = content(value)

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.content == other.content

    def __repr__(self) -> str:
        return f"{type(self.value).__name__}"


def _unmasked(leaf: Any) -> Any:
    return (
        leaf.data if isinstance(leaf, np.ma.MaskedArray) else leaf
    )  # JAX refuses the type, even without a mask


def _is_traced(leaf: Any) -> bool:
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError(
            f"A NumPy masked array of shape {leaf.shape} is among the model's "
            "arguments; JAX drops its mask, and what lies under it would become data. "
            "Pass x.filled(0.0) and ~np.ma.getmaskarray(x), and leave rows out with "
            "numpyro.handlers.mask(mask=...)."
        )
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray | np.generic) and is_numeric(leaf.dtype)
    )


def is_numeric(dtype: Any) -> bool:
    """Whether NumPy arrays of this dtype convert to JAX arrays."""
    dtype = np.dtype(dtype)
    if dtype.kind in "biufc":
        return dtype.itemsize <= (16 if dtype.kind == "c" else 8)
    # bfloat16, float8 and int4 are extension types, of kind V.
    return dtype.kind == "V" and jax.dtypes.issubdtype(dtype, np.number)


def as_numbers(place: str, value: Any) -> Any:
    """Data as an array of numbers; arrays of numbers are returned as they are.

    Args:
        place: Such as ``"site 'x'"``, for messages.
        value: An array, a list, an array of objects, a column of a frame, or any other
            array-like.

    Raises:
        ValueError: It does not hold numbers, or carries a mask that JAX drops.
    """
    if isinstance(value, jax.Array) or value is None:
        return value
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"Data at {place} is a NumPy masked array, whose mask JAX drops. Give "
            "obs=x.filled(0.0) under "
            "numpyro.handlers.mask(mask=~np.ma.getmaskarray(x))."
        )

    try:
        is_traced = any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)
        )
        array = jnp.asarray(value) if is_traced else np.asarray(value)
    except Exception as error:
        raise ValueError(
            f"Data at {place} is a {type(value).__name__} that is no array ({error}). "
            "Give numbers of one shape: obs=jnp.asarray(...)."
        ) from error

    if isinstance(array, jax.Array):
        return array
    if is_numeric(array.dtype):
        is_plain = isinstance(
            value, np.ndarray | np.generic | float | int
        ) and not isinstance(value, np.ma.MaskedArray)
        return value if is_plain else array

    odd: Any = next(
        (item for item in array.ravel().tolist() if isinstance(item, str | bytes)), None
    )
    if odd is None and array.dtype.kind in "Of":
        try:
            return array.astype(float)
        except (TypeError, ValueError) as error:
            odd = error
    raise ValueError(
        f"Data at {place} is a {type(value).__name__} of type {array.dtype}, which "
        f"does not hold numbers alone ({odd!r}). Turn it into floats before, "
        "np.asarray(x, float), and leave missing rows out with numpyro.handlers.mask."
    )
