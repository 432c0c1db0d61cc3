"""Compiled pieces of a run: as many updates as are asked for, in one program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from ebm_ppl.model.program import Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.snapshot import Snapshot, snapshot
from ebm_ppl.training.diagnostics import Diagnostic

MAX_CHUNK = 1024


class Steps(Protocol):
    """The interface that the loop needs from a backend."""

    @property
    def parts(self) -> dict[str, str]:
        """Parts of a step that may fail to be finite, in words."""
        ...

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """The keys of the history, and how the progress bar shows them."""
        ...

    def update(
        self, state: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The state after one step, and its entries in the history."""
        ...

    def updates_until_upkeep(self, state: Any) -> int:
        """How many steps may be made before the state needs care."""
        ...

    def upkeep(self, state: Any, arguments: Arguments) -> Any:
        """The state with that care taken."""
        ...

    @property
    def callables(self) -> dict[str, Any]:
        """What it runs that may change between runs, such as the model."""
        ...

    def get_params(self, state: Any) -> Params:
        """Constrained parameters."""
        ...

    def finish(self, state: Any, arguments: Arguments) -> tuple[Params, Any]:
        """Constrained parameters, and the state that belongs to them."""
        ...


class Chunk(NamedTuple):
    """What a piece of a run gave.

    Attributes:
        state: After the last good step.
        history: By diagnostic, with a leading axis of :data:`MAX_CHUNK` steps.
        ran: Good steps.
        finite: Where the last step was finite.
    """

    state: Any
    history: dict[str, Any]
    ran: Array
    finite: Any


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=1)
def run_chunk(
    backend: Steps,
    state: Any,
    arguments: Arguments,
    num_steps: Array,
    programs: tuple[Snapshot, ...] = (),
) -> Chunk:
    """Run up to ``num_steps`` updates in one compiled loop; stop at a non-finite one.

    ``num_steps`` is dynamic: all lengths share one executable, so a short last chunk
    does not recompile.  ``programs`` are the backend's callables with their present
    content, so a changed closure does.
    """
    return _steps(backend, state, lambda step: arguments, num_steps)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
def run_batches(
    backend: Steps,
    state: Any,
    stack: Arguments,
    shared: Arguments,
    first: Array,
    num_steps: Array,
    programs: tuple[Snapshot, ...] = (),
) -> Chunk:
    """The same with a batch of data for every update.

    Args:
        backend: See :func:`run_chunk`.
        state: See there.
        stack: Batches, along a leading axis of every array.
        shared: Arguments of every update.
        first: The first update's batch.
        num_steps: Updates, at most as many as there are batches from there.
        programs: See :func:`run_chunk`.
    """

    def batch(step: Array) -> Arguments:
        return joined(jax.tree.map(lambda leaf: leaf[first + step], stack), shared)

    return _steps(backend, state, batch, num_steps)


def joined(batch: Arguments, shared: Arguments) -> Arguments:
    """A batch's arguments and those that all batches share, which come after them."""
    return Arguments(batch.args + shared.args, {**shared.kwargs, **batch.kwargs})


def _steps(
    backend: Steps,
    state: Any,
    arguments_of: Callable[[Array], Arguments],
    num_steps: Array,
) -> Chunk:
    def update(step: Array, state: Any) -> tuple[Any, dict[str, Any], Any]:
        arguments = arguments_of(step)
        state, info = backend.update(state, *arguments.args, **arguments.kwargs)
        info = dict(info)
        finite = info.pop("finite")
        return state, info, finite

    zero = jnp.zeros((), jnp.int32)
    _, info, finite = jax.eval_shape(update, zero, state)
    history = jax.tree.map(
        lambda leaf: jnp.zeros((MAX_CHUNK, *leaf.shape), leaf.dtype), info
    )

    def going_on(carry: tuple) -> Array:
        step, _, _, finite = carry
        return (step < num_steps) & finite.everywhere()

    def body(carry: tuple) -> tuple:
        step, state, history, _ = carry
        state, info, finite = update(step, state)
        good = finite.everywhere()
        history = jax.tree.map(lambda h, value: h.at[step].set(value), history, info)
        return step + good, state, history, finite

    all_finite = jax.tree.map(lambda _: jnp.ones((), bool), finite)
    step, state, history, finite = lax.while_loop(
        going_on, body, (zero, state, history, all_finite)
    )
    return Chunk(state, history, step, finite)


def programs_of(backend: Steps) -> tuple[Snapshot, ...]:
    """Snapshots of the backend's callables (model, generator) and their closures."""
    return tuple(snapshot(value) for value in backend.callables.values())
