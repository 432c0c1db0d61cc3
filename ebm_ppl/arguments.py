"""What a model is called with: arrays are traced, everything else belongs to the
compiled program.

One rule.  NumPy and JAX arrays of numbers may change without compiling again.  Anything
else (flags, sizes, strings, data frames, tensors of other libraries, objects) reaches
the model as it is, and two calls share a program only where its *content* is the same:
an equal copy compiles nothing, and an object that was changed in place never meets the
program of before.
"""

import hashlib
import types
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.snapshot import content_of

# Of these the value is the content.
_PLAIN = (bool, int, complex, str, bytes, type(None), type(Ellipsis), range, np.dtype)

# Of these the identity is.
_NAMED = (type, types.BuiltinFunctionType, types.ModuleType)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Arguments:
    """What a model is called with; a pytree whose arrays are leaves and whose other values are static."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Arrays are traced; whatever else there is belongs to the structure, told apart by content."""
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
    """A value that is compared by its content, read once, when the call is made."""

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
    )  # JAX takes none, even without a mask


def _is_traced(leaf: Any) -> bool:
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError(
            f"A NumPy masked array of shape {leaf.shape} is among the model's "
            "arguments; JAX drops its mask, and what "
            "lies under it would become data. Pass x.filled(0.0) and "
            "~np.ma.getmaskarray(x), and leave rows out with "
            "numpyro.handlers.mask(mask=...)."
        )
    return isinstance(leaf, jax.Array) or (
        isinstance(leaf, np.ndarray | np.generic) and is_numeric(leaf.dtype)
    )


def is_numeric(dtype: Any) -> bool:
    """Whether arrays of a NumPy type can become JAX's."""
    dtype = np.dtype(dtype)
    if dtype.kind in "biufc":
        return dtype.itemsize <= (16 if dtype.kind == "c" else 8)
    # bfloat16, float8 and int4 are no types of NumPy's own.
    return dtype.kind == "V" and jax.dtypes.issubdtype(dtype, np.number)


def content(value: Any) -> Hashable:
    """What a value holds, as something small to compare and hash; its type belongs to it (1, 1.0 and True differ)."""
    return _content(value, {})


def _content(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """``seen`` numbers the objects on the way here, for those that hold themselves, and keeps them alive."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, float):
        return type(value), value.hex()  # tells -0.0 from 0.0, and takes NaN for itself
    if isinstance(value, types.FunctionType):
        return _Identity(value), content_of(value)
    if isinstance(value, jax.core.Tracer) or isinstance(value, _NAMED):
        return _Identity(value)

    if id(value) in seen:
        return "seen", seen[id(value)][0]
    seen[id(value)] = (len(seen), value)

    if isinstance(value, np.ndarray | np.generic):
        return type(value), _content_of_array(np.asarray(value), seen)
    if isinstance(value, list | tuple):
        return type(value), tuple(_content(item, seen) for item in value)
    if isinstance(value, dict):
        return type(value), tuple(
            (_content(key, seen), _content(item, seen)) for key, item in value.items()
        )
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_content(item, {}) for item in value)
    if _is_pandas(value):
        return type(value), _content_of_pandas(value, seen)
    if _compares_by_value(value):
        return type(value), value
    return type(value), _content_of_object(value, seen)


class _Identity:
    """Equal to itself alone; it keeps the object alive, so that no other one takes its place in memory."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def _content_of_array(array: np.ndarray, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if array.dtype.hasobject:
        return (
            str(array.dtype),
            array.shape,
            tuple(_content(item, seen) for item in array.ravel().tolist()),
        )
    return str(array.dtype), array.shape, _digest(np.ascontiguousarray(array).tobytes())


def _is_pandas(value: Any) -> bool:
    is_table = hasattr(value, "columns") or hasattr(value, "dtype")
    return (
        type(value).__module__.split(".")[0] == "pandas"
        and is_table
        and hasattr(value, "to_numpy")
    )


def _content_of_pandas(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """Labels, types and values of a frame, a series or an index; not how its memory is laid out."""
    attrs = _content(getattr(value, "attrs", None), seen)
    if hasattr(value, "columns"):
        columns = [value.iloc[:, k] for k in range(value.shape[1])]
        values = tuple(
            (_content_of_type(column), _content(column.to_numpy(), seen))
            for column in columns
        )
        return (
            attrs,
            _content_of_pandas(value.columns, seen),
            _content_of_pandas(value.index, seen),
            values,
        )

    labels = _content_of_pandas(value.index, seen) if hasattr(value, "index") else None
    names = _content(
        getattr(value, "names", None) or getattr(value, "name", None), seen
    )
    return (
        attrs,
        labels,
        names,
        _content_of_type(value),
        _content(value.to_numpy(), seen),
    )


def _content_of_type(column: Any) -> Hashable:
    # Codes follow the order of the categories, which equal types may have differently.
    categories = getattr(column.dtype, "categories", None)
    return str(column.dtype), () if categories is None else tuple(map(repr, categories))


def _compares_by_value(value: Any) -> bool:
    """Whether its class says what equality means, and that it holds for good: Python's convention for ``__hash__``."""
    cls = type(value)
    if getattr(cls, "__eq__", None) is object.__eq__ or getattr(
        cls, "__hash__", None
    ) in (None, object.__hash__):
        return False
    try:
        hash(value)
        return isinstance(value == value, bool)
    except Exception:
        return False


def _content_of_object(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """By the array that it says it is, and by the state that it gives away to be copied
    (labels, say).

    One that gives neither is itself alone.
    """
    array: Hashable = None
    if hasattr(value, "__array__"):
        try:
            array = _content_of_array(np.asarray(value), seen)
        except Exception:
            array = None  # a tensor that must be detached first, say
    state = _content_of_state(value, seen)
    return (
        array if array is not None and isinstance(state, _Identity) else (array, state)
    )


def _content_of_state(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    try:
        state = value.__reduce_ex__(4)
    except Exception:
        return _Identity(value)
    if isinstance(state, str):
        return _Identity(value)
    # Its constructor, that one's arguments, its attributes, then its items as
    # iterators.
    return tuple(
        _content(list(part) if index > 2 and part is not None else part, seen)
        for index, part in enumerate(state)
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


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
            "Give numbers of one shape: "
            "obs=jnp.asarray(...)."
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
        "does not hold numbers alone "
        f"({odd!r}). Turn it into floats before, np.asarray(x, float), and leave "
        "missing rows out with "
        "numpyro.handlers.mask."
    )
