"""The training loop: compiled chunks of updates, one host sync per chunk."""

import time
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm.auto import tqdm

from ebm_ppl.errors import NonFiniteError
from ebm_ppl.model.program import Params
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.snapshot import Snapshot, snapshot
from ebm_ppl.training.diagnostics import Diagnostic, progress_text
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.messages import (
    deferred_interrupt,
    non_finite_message,
)
from ebm_ppl.training.watch import WATCHED, Best, Watch, columns

MAX_CHUNK = 1024

SECONDS_PER_CHUNK = 0.5


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


def run(
    backend: Steps,
    init_state: Any,
    num_steps: int,
    arguments: Arguments,
    *,
    progress_bar: bool,
    watch: Watch | None = None,
) -> Fit:
    """Run ``num_steps`` updates from ``init_state``.

    ``init_state`` is copied once; later buffers are donated.  Ctrl-C ends the run after
    the current chunk and returns the steps so far; a second Ctrl-C interrupts at once.
    With ``watch`` the state is the best one that it saw, and the history is whole.

    One body: a chunk, its record, and reasons to stop.

    Raises:
        NonFiniteError: A step was not finite.  Its ``fit`` holds the state before that
            step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}; expected at least 1.")

    state, programs = jax.tree.map(jnp.array, init_state), _programs_of(backend)
    done, length, pieces = 0, 1, []
    best = Best()
    every = num_steps if watch is None else watch.every

    with (
        tqdm(total=num_steps, disable=not progress_bar) as bar,
        deferred_interrupt() as interrupted,
    ):
        while done < num_steps and not interrupted:
            # Care
            until_upkeep = backend.updates_until_upkeep(state)
            if until_upkeep == 0:
                state = backend.upkeep(state, arguments)
                until_upkeep = backend.updates_until_upkeep(state)

            # Step
            length = min(length, num_steps - done, every - done % every, until_upkeep)
            began = time.perf_counter()
            state, history, ran, finite = run_chunk(
                backend, state, arguments, length, programs
            )
            ran = int(ran)  # the chunk's one sync
            elapsed = time.perf_counter() - began

            # Record
            history = jax.device_get(history)
            pieces.append(jax.tree.map(lambda h, ran=ran: np.asarray(h)[:ran], history))
            if watch is not None:
                pieces[-1] |= columns(ran, watch)
            done += ran
            bar.update(ran)

            # Stop
            finite = jax.device_get(finite)
            if not finite.everywhere():
                fit = _fit(backend, state, pieces, arguments)
                message = non_finite_message(finite, done, backend.parts)
                raise NonFiniteError(message, done, fit)

            # Look
            if watch is not None and (done % every == 0 or done == num_steps):
                seen = watch.look(backend.get_params(state))
                for key, value in seen.items():
                    pieces[-1][key][-1] = value
                best.see(seen.get(WATCHED, np.nan), state)
                if best.is_past(watch):
                    break

            # The first chunk includes compilation, so its time is not used.
            text = progress_text(backend.diagnostics, pieces[-1])
            bar.set_postfix_str(text, refresh=False)
            target = 16 if done == 1 else int(ran * SECONDS_PER_CHUNK / elapsed)
            length = max(1, min(target, MAX_CHUNK))

    kept = state if best.state is None else best.state
    return _fit(backend, kept, pieces, arguments)


def _programs_of(backend: Steps) -> tuple[Snapshot, ...]:
    """Snapshots of the backend's callables (model, generator) and their closures."""
    return tuple(snapshot(value) for value in backend.callables.values())


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=1)
def run_chunk(
    backend: Steps,
    state: Any,
    arguments: Arguments,
    num_steps: Array,
    programs: tuple[Snapshot, ...] = (),
) -> tuple[Any, dict[str, Any], Array, Any]:
    """Run up to ``num_steps`` updates in one compiled loop; stop at a non-finite one.

    ``num_steps`` is dynamic: all lengths share one executable, so a short last chunk
    does not recompile.  ``programs`` are the backend's callables with their present
    content, so a changed closure does.
    """

    def update(state: Any) -> tuple[Any, dict[str, Any], Any]:
        state, info = backend.update(state, *arguments.args, **arguments.kwargs)
        info = dict(info)
        finite = info.pop("finite")
        return state, info, finite

    _, info, finite = jax.eval_shape(update, state)
    history = jax.tree.map(
        lambda leaf: jnp.zeros((MAX_CHUNK, *leaf.shape), leaf.dtype), info
    )

    def going_on(carry: tuple) -> Array:
        step, _, _, finite = carry
        return (step < num_steps) & finite.everywhere()

    def body(carry: tuple) -> tuple:
        step, state, history, _ = carry
        state, info, finite = update(state)
        good = finite.everywhere()
        history = jax.tree.map(lambda h, value: h.at[step].set(value), history, info)
        return step + good, state, history, finite

    all_finite = jax.tree.map(lambda _: jnp.ones((), bool), finite)
    step, state, history, finite = lax.while_loop(
        going_on, body, (jnp.zeros((), jnp.int32), state, history, all_finite)
    )
    return state, history, step, finite


def _fit(
    backend: Steps, state: Any, pieces: list[dict[str, Any]], arguments: Arguments
) -> Fit:
    history = (
        jax.tree.map(lambda *parts: np.concatenate(parts), *pieces) if pieces else {}
    )
    params, state = backend.finish(state, arguments)
    return Fit(params=params, state=state, history=history)
