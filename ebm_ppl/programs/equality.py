"""Comparison of arguments by content: when two calls share an executable."""

import hashlib
import types
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from ebm_ppl.programs.content import content_of

# Types compared by value.
_PLAIN = (bool, int, complex, str, bytes, type(None), type(Ellipsis), range, np.dtype)

# Types compared by identity.
_NAMED = (type, types.BuiltinFunctionType, types.ModuleType)


def content(value: Any) -> Hashable:
    """A hashable summary of a value, for comparison.

    It includes the type: 1, 1.0 and True differ.
    """
    return _content(value, {})


def _content(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """Recursive part of :func:`content`.

    ``seen`` numbers the visited objects, for cycles, and keeps them alive.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, float):
        return type(value), value.hex()  # -0.0 differs from 0.0; NaN equals NaN
    if isinstance(value, types.FunctionType):
        return _Identity(value), content_of(value)
    if isinstance(value, types.MethodType):
        # Each access makes another method of the same function and object.
        parts = (_Identity(value.__func__), _Identity(value.__self__))
        return *parts, content_of(value)
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
    """Comparison by identity.

    It keeps the object alive, so that its ``id`` is not reused.
    """

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
    """Labels, types and values of a frame, series or index; not its memory layout."""
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
    # Codes depend on the order of the categories, which equal dtypes may differ in.
    categories = getattr(column.dtype, "categories", None)
    return str(column.dtype), () if categories is None else tuple(map(repr, categories))


def _compares_by_value(value: Any) -> bool:
    """Whether the class defines ``__eq__`` and ``__hash__``, so equality is stable."""
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
    """Content of an object: its ``__array__`` and its pickled state.

    The state covers labels, for example.  An object with neither is compared by
    identity.
    """
    array: Hashable = None
    if hasattr(value, "__array__"):
        try:
            array = _content_of_array(np.asarray(value), seen)
        except Exception:
            array = None  # for example a tensor that must be detached first
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
    # Constructor, its arguments, attributes, then items as iterators.
    return tuple(
        _content(list(part) if index > 2 and part is not None else part, seen)
        for index, part in enumerate(state)
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
