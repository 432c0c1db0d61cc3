"""What a run trains on: the same data in every update, or a batch for each."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.programs.arguments import Arguments, as_numbers
from ebm_ppl.programs.snapshot import Snapshot
from ebm_ppl.training.chunk import (
    MAX_CHUNK,
    Chunk,
    Steps,
    joined,
    run_batches,
    run_chunk,
)

# Batches that are on the device at once, twice: while some are used, others are read.
MAX_STACK = 64
MAX_BYTES = 2**25


class Data(Protocol):
    """The interface that the loop needs from data."""

    @property
    def arguments(self) -> Arguments:
        """The model's arguments in the latest update."""
        ...

    @property
    def num_ready(self) -> int:
        """Updates that can be made in one piece; 0 at the end of the data."""
        ...

    def run(
        self,
        backend: Steps,
        state: Any,
        length: int,
        programs: tuple[Snapshot, ...],
    ) -> Chunk:
        """Make so many updates; returns before they are done."""
        ...

    def prepare(self) -> None:
        """Read ahead."""
        ...

    @property
    def failure(self) -> Exception | None:
        """What reading raised, after which there are no more data."""
        ...


class SameData:
    """The same arguments in every update."""

    num_ready = MAX_CHUNK
    failure = None

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments

    def run(
        self,
        backend: Steps,
        state: Any,
        length: int,
        programs: tuple[Snapshot, ...],
    ) -> Chunk:
        """See :class:`Data`."""
        return run_chunk(backend, state, self.arguments, length, programs)

    def prepare(self) -> None:
        """See :class:`Data`."""


class Batches:
    """A batch of arguments for every update, from any iterable.

    Batches of one shape are stacked, so that a compiled piece of the run takes several;
    a batch of another shape, such as the last of an epoch, makes a piece of its own.

    Args:
        batches: Tuples of positional arguments, single arrays, or dicts of keyword
            arguments.
        shared: Arguments that all batches have: after the batch's positional ones.
        num_steps: Batches that are read at most.

    Raises:
        TypeError: It is an array, or not iterable, or a batch holds what is no array of
            numbers.
        ValueError: There is no batch.
    """

    def __init__(self, batches: Iterable, shared: Arguments, num_steps: int) -> None:
        is_one = hasattr(batches, "__array__") or isinstance(batches, Mapping)
        if is_one or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches is a {type(batches).__name__}; expected an iterable of batches, "
                "such as a generator, a data loader, or a list of them. All rows at once "
                "are the model's arguments."
            )
        self.source, self.shared = iter(batches), shared
        self.num_read, self.num_steps = 0, num_steps
        self.failure: Exception | None = None
        self.waiting: list[Arguments] = []
        self._require_any()
        self.latest = self.waiting[0]
        self.stack, self.num_ready = self._next_stack()
        self.first = 0
        self.ahead: tuple[Any, int] | None = None

    def _require_any(self) -> None:
        if not self._is_waiting():
            raise self.failure or ValueError(
                "batches holds none: the iterable ended at once."
            )

    @property
    def arguments(self) -> Arguments:
        """See :class:`Data`."""
        return joined(self.latest, self.shared)

    def run(
        self,
        backend: Steps,
        state: Any,
        length: int,
        programs: tuple[Snapshot, ...],
    ) -> Chunk:
        """See :class:`Data`."""
        first, last = self.first, self.first + length - 1
        chunk = run_batches(
            backend, state, self.stack, self.shared, first, length, programs
        )
        self.latest = jax.tree.map(lambda leaf: leaf[last], self.stack)
        self.first += length
        self.num_ready -= length
        return chunk

    def prepare(self) -> None:
        """See :class:`Data`."""
        if self.ahead is None:
            self.ahead = self._next_stack()
        if not self.num_ready:
            (self.stack, self.num_ready), self.first = self.ahead, 0
            self.ahead = None

    def _next_stack(self) -> tuple[Any, int]:
        """Batches of one shape on the device, and their number."""
        if not self._is_waiting():
            return None, 0
        kind, size = _kind(self.waiting[0]), _num_bytes(self.waiting[0])
        capacity = max(1, min(MAX_STACK, MAX_BYTES // max(1, size)))

        found: list[Arguments] = []
        while (
            len(found) < capacity
            and self._is_waiting()
            and _kind(self.waiting[0]) == kind
        ):
            found.append(self.waiting.pop())

        # One length for every stack, so that one program serves them.
        filled = found + [found[-1]] * (capacity - len(found))
        stack = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *filled)
        return stack, len(found)

    def _is_waiting(self) -> bool:
        """Whether there is another batch for this run, which is then read."""
        if not self.waiting and not self.failure and self.num_read < self.num_steps:
            try:
                for batch in self.source:
                    self.waiting.append(self._arguments(batch))
                    self.num_read += 1
                    break
            except Exception as error:  # told when the batches before are used up
                self.failure = error
        return bool(self.waiting)

    def _arguments(self, batch: Any) -> Arguments:
        if isinstance(batch, Mapping):
            twice = sorted(set(batch) & set(self.shared.kwargs))
            if twice:
                raise TypeError(
                    f"Batch {self.num_read} of batches holds {twice}, which run was given "
                    "too; expected every argument once."
                )
            return Arguments((), jax.tree.map(self._numbers, dict(batch)))
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return Arguments(jax.tree.map(self._numbers, args))

    def _numbers(self, leaf: Any) -> np.ndarray:
        """An array of numbers, from any library's."""
        # A copy: loaders fill the same memory again.
        array = np.array(as_numbers(f"batch {self.num_read} of batches", leaf))
        if array.dtype.kind not in "biufV":
            raise TypeError(
                f"Batch {self.num_read} of batches holds a {type(leaf).__name__} of type "
                f"{array.dtype}; expected arrays of numbers. What is the same in every "
                "batch is an argument of run."
            )
        return array


def _kind(arguments: Arguments) -> Any:
    """What batches must share to be stacked."""
    leaves, treedef = jax.tree.flatten(arguments)
    return treedef, [(np.shape(leaf), np.result_type(leaf)) for leaf in leaves]


def _num_bytes(arguments: Arguments) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(arguments))
