"""What a callable computes with now: the part of a compiled program's key that its
identity does not tell.

JAX caches compiled programs by the identity of the callables in their keys.  A model
that closes over an object that changes (a flax.nnx module after a training step, an
attribute, a global, a NumPy array) would meet the program of what it was.  A
:class:`Snapshot` compares by identity *and* by content, so changed content is compiled
anew.
"""

import contextvars
import dataclasses
import functools
import hashlib
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_ATOMS = (bool, int, complex, str, bytes, type(None), type(Ellipsis), np.dtype)
_LIBRARIES = tuple(
    {
        str(pathlib.Path(sysconfig.get_paths()[name]))
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    | {str(pathlib.Path(__file__).parent)}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A callable that equals another one where both are the same callable with the same
    content.

    Attributes:
        fn: What it calls.
        content: A hashable account of everything that ``fn`` refers to.
    """

    fn: Callable[..., Any]
    content: "Content"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``fn``; what it changes itself, such as a counter of its own, does not make it another."""
        is_known = _present(self.fn) is self
        result = self.fn(*args, **kwargs)
        if is_known:
            _keep(self, content_of(self.fn))
        return result

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Snapshot)
            and self.fn is other.fn
            and self.content == other.content
        )

    def __hash__(self) -> int:
        return hash((id(self.fn), self.content))


# The last snapshot of callables, by their identity, and the content that its last run
# left behind.
_LAST: dict[int, tuple[Snapshot, "Content"]] = {}
_MAX_KEPT = 128


def snapshot(fn: Callable[..., Any]) -> Snapshot:
    """``fn`` with its present content; a snapshot stays what it is."""
    if isinstance(fn, Snapshot):
        return fn
    present = _present(fn)
    if present is None:
        present = Snapshot(fn, content_of(fn))
        _keep(present, present.content)
    return present


def _present(fn: Callable[..., Any]) -> Snapshot | None:
    """The last snapshot of ``fn``, if nothing but its own runs has changed it since."""
    if id(fn) not in _LAST:
        return None
    last, left = _LAST[id(fn)]
    return last if last.fn is fn and left == content_of(fn) else None


def _keep(made: Snapshot, left: "Content") -> None:
    _LAST.pop(id(made.fn), None)
    _LAST[id(made.fn)] = made, left
    if len(_LAST) > _MAX_KEPT:
        del _LAST[next(iter(_LAST))]


@dataclasses.dataclass(frozen=True)
class Content:
    """A hashable account of an object and what it refers to."""

    tokens: tuple
    digest: int = dataclasses.field(compare=False)

    def __hash__(self) -> int:
        return self.digest


def content_of(value: Any) -> Content:
    """Everything that an object refers to: attributes, closures, defaults, and globals
    of functions outside libraries.

    JAX's arrays cannot change and count by identity; NumPy's count by their numbers.
    Objects that tell nothing of themselves count by identity.
    """
    tokens = tuple(_Reader().read(value))
    return Content(tokens, hash(tokens))


class _Same:
    """An object that counts by identity, held so that nothing else can take its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Reader:
    """One walk over an object's references; an object met again counts by the order in which it was met."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []

    def read(self, value: Any) -> Iterable[Any]:
        if isinstance(value, _ATOMS):
            yield type(value), value
            return
        if isinstance(value, float):
            yield float, repr(value)  # NaN equals itself here
            return
        if isinstance(
            value, jax.Array | type | types.ModuleType | types.BuiltinFunctionType
        ):
            yield _Same(value)
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
        if isinstance(value, np.ma.MaskedArray):
            yield from self._children(
                np.ma.MaskedArray, (np.ma.getdata(value), np.ma.getmaskarray(value))
            )
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            numbers = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            yield (
                np.ndarray,
                value.shape,
                value.dtype.str,
                hashlib.sha256(numbers.data).digest(),
            )
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from self._children("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            yield from self._children(
                "partial", (value.func, value.args, value.keywords)
            )
        elif isinstance(value, bytearray | memoryview):
            yield type(value), bytes(value)
        elif isinstance(value, contextvars.ContextVar):
            yield from self._children(contextvars.ContextVar, (value.get(None),))
        elif isinstance(value, types.MappingProxyType):
            yield from self._children(types.MappingProxyType, (dict(value),))
        elif isinstance(value, dict):
            yield from self._children(type(value), (*value.keys(), *value.values()))
        elif isinstance(value, list | tuple | np.ndarray):
            yield from self._children(
                type(value), np.ravel(value) if isinstance(value, np.ndarray) else value
            )
        elif isinstance(value, set | frozenset):
            yield from self._children(type(value), sorted(value, key=repr))
        else:
            yield from self._object(value)

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
            if not name.startswith("__")
        }
        yield from self._children(kind.__qualname__, (*members, *members.values()))

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
            yield _Same(value)
        if hasattr(value, "__wrapped__"):
            state["__wrapped__"] = value.__wrapped__
        yield from self._children("state", (*state, *state.values()))


def _given_away(value: Any, *, has_state: bool) -> dict[str, Any]:
    """What an object of a type written in C gives away to be copied: a deque's items, an array's numbers."""
    if has_state and not isinstance(value, Sequence | Mapping):
        return {}
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return {}
    if isinstance(reduced, str):
        return {}
    # Its constructor's arguments, then its items as iterators.
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
    """Values of the global names that a function uses, and attributes of modules that do not belong to a library."""
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
    """Those attributes of a module outside libraries that a function may mean, modules inside it included."""
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
