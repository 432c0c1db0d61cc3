"""Content of functions and objects: closures, globals and attributes."""

import contextvars
import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_ATOMS = (bool, int, complex, str, bytes, type(None), type(Ellipsis), np.dtype)

# With a separator: the neighbour of a library is none.
_LIBRARIES = tuple(
    str(path) + os.sep
    for path in (
        *(
            pathlib.Path(sysconfig.get_paths()[name])
            for name in ("stdlib", "platstdlib", "purelib", "platlib")
        ),
        pathlib.Path(__file__).parents[1],
    )
)


CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
CONTAINERS = (types.MappingProxyType, dict, list, tuple, set, frozenset)


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that an object refers to.

    Attributes, closures, defaults, and globals of functions outside libraries.
    """

    tokens: tuple
    digest: int = dataclasses.field(compare=False)

    def __hash__(self) -> int:
        return self.digest


def content_of(value: Any) -> Content:
    """Everything that an object refers to.

    Attributes, closures, defaults, and globals of functions outside libraries.

    JAX arrays are immutable and compared by identity, NumPy arrays by value.  Objects
    without readable state are compared by identity.
    """
    tokens = tuple(_Reader().read(value))
    return Content(tokens, hash(tokens))


class Same:
    """An object compared by identity, kept alive so that its ``id`` is not reused."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Reader:
    """One traversal of an object's references; repeated objects yield their number."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []

    def read(self, value: Any) -> Iterable[Any]:
        if isinstance(value, _ATOMS):
            yield type(value), value
            return
        if isinstance(value, float):
            yield float, repr(value)  # NaN equals NaN
            return
        if isinstance(value, weakref.ref):
            # A cache that comes and goes, such as a transform's inverse in NumPyro.
            yield (weakref.ref,)
            return
        if isinstance(
            value, jax.Array | type | types.ModuleType | types.BuiltinFunctionType
        ):
            yield Same(value)
            if isinstance(value, type) and not _is_library_class(value):
                yield from self._once(value, self._class)
            return
        yield from self._once(value, self._compound)

    def _once(self, value: Any, read: Callable[[Any], Iterable[Any]]) -> Iterable[Any]:
        if id(value) in self.seen:
            yield "met", self.seen[id(value)]
            return
        self.seen[id(value)] = len(self.seen)
        self.held.append(value)
        yield from read(value)

    def _compound(self, value: Any) -> Iterable[Any]:
        if isinstance(value, np.ndarray):
            yield from self._array(value)
        elif isinstance(value, CALLABLES):
            yield from self._callable(value)
        elif isinstance(value, CONTAINERS):
            yield from self._container(value)
        elif isinstance(value, bytearray | memoryview):
            yield type(value), bytes(value)
        elif isinstance(value, contextvars.ContextVar):
            yield from self._children(contextvars.ContextVar, (value.get(None),))
        else:
            yield from self._object(value)

    def _array(self, value: np.ndarray) -> Iterable[Any]:
        if isinstance(value, np.ma.MaskedArray):
            parts = (np.ma.getdata(value), np.ma.getmaskarray(value))
            yield from self._children(np.ma.MaskedArray, parts)
        elif value.dtype.hasobject:
            yield from self._children(type(value), np.ravel(value))
        else:
            numbers = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            digest = hashlib.sha256(numbers.data).digest()
            yield np.ndarray, value.shape, value.dtype.str, digest

    def _callable(self, value: Any) -> Iterable[Any]:
        if isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from self._children("method", (value.__func__, value.__self__))
        else:
            parts = (value.func, value.args, value.keywords)
            yield from self._children("partial", parts)

    def _container(self, value: Any) -> Iterable[Any]:
        if isinstance(value, types.MappingProxyType):
            yield from self._children(types.MappingProxyType, (dict(value),))
        elif isinstance(value, dict):
            yield from self._children(type(value), (*value.keys(), *value.values()))
        elif isinstance(value, set | frozenset):
            yield from self._children(type(value), sorted(value, key=repr))
        else:
            yield from self._children(type(value), value)

    def _children(self, kind: Any, children: Iterable[Any]) -> Iterable[Any]:
        children = tuple(children)
        yield kind, len(children)
        for child in children:
            yield from self.read(child)

    def _function(self, fn: types.FunctionType) -> Iterable[Any]:
        yield fn.__code__
        cells = [_contents(cell) for cell in fn.__closure__ or ()]
        yield from self._children(
            "defaults", (fn.__defaults__, fn.__kwdefaults__, *cells)
        )
        if hasattr(fn, "__wrapped__"):
            yield from self.read(fn.__wrapped__)
        if not fn.__code__.co_filename.startswith(_LIBRARIES):
            yield from self._children("globals", _globals_of(fn))

    def _class(self, kind: type) -> Iterable[Any]:
        members = {
            name: value
            for name, value in vars(kind).items()
            if not name.startswith("__") or isinstance(value, types.FunctionType)
        }
        parts = (*members, *members.values(), *kind.__bases__)
        yield from self._children(kind.__qualname__, parts)

    def _object(self, value: Any) -> Iterable[Any]:
        yield from self.read(type(value))
        state = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                is_private = slot.startswith("__") and not slot.endswith("__")
                name = f"_{kind.__name__.lstrip('_')}{slot}" if is_private else slot
                if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                    state[name] = getattr(value, name)
        state |= _given_away(value, has_state=bool(state))
        if not state:
            yield Same(value)
        if hasattr(value, "__wrapped__"):
            state["__wrapped__"] = value.__wrapped__
        yield from self._children("state", (*state, *state.values()))


def _given_away(value: Any, *, has_state: bool) -> dict[str, Any]:
    """The state that an object of a C type exposes to ``pickle``.

    Examples are the items of a ``deque`` and the numbers of an ``array``.
    """
    if has_state and not isinstance(value, Sequence | Mapping):
        return {}
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return {}
    if isinstance(reduced, str):
        return {}
    # Constructor arguments, then items as iterators.
    return {
        "arguments": reduced[1],
        "items": [list(part) for part in reduced[3:5] if part is not None],
    }


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _globals_of(fn: types.FunctionType) -> list[Any]:
    """Values of the global names that a function uses.

    For modules outside libraries, also the attributes that it may use.
    """
    found: list[Any] = []
    names = list(_names(fn.__code__))
    for name in names:
        if name not in fn.__globals__:
            continue
        value = fn.__globals__[name]
        found += [name, value]
        if isinstance(value, types.ModuleType):
            found += _attributes_of(value, names, {id(value)})
    return found


def _attributes_of(
    module: types.ModuleType, names: list[str], seen: set[int]
) -> list[Any]:
    """Attributes of a module outside libraries that a function may use.

    Nested modules are included.
    """
    found: list[Any] = []
    if _is_library_module(module):
        return found
    for name in names:
        value = vars(module).get(name)
        if value is None or id(value) in seen:
            continue
        found += [name, value]
        if isinstance(value, types.ModuleType):
            found += _attributes_of(value, names, seen | {id(value)})
    return found


def _names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library_module(module: types.ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    return path is None or path.startswith(_LIBRARIES)


def _is_library_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return kind.__module__ != "__main__" and (
        module is None or _is_library_module(module)
    )
