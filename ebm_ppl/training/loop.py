"""The training loop: compiled chunks of updates, one host sync per chunk."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from ebm_ppl.errors import NonFiniteError
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.chunk import MAX_CHUNK, Steps, programs_of
from ebm_ppl.training.data import Data
from ebm_ppl.training.diagnostics import progress_text
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.messages import deferred_interrupt, non_finite_message
from ebm_ppl.training.watch import Best, Watch, columns

SECONDS_PER_CHUNK = 0.5


def run(
    backend: Steps,
    init_state: Any,
    num_steps: int,
    data: Data,
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
        Exception: What reading the data, or a batch that the model refuses, raised; its
            ``fit`` holds what was reached.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}; expected at least 1.")

    state, programs = jax.tree.map(jnp.array, init_state), programs_of(backend)
    done, length = 0, 1
    pieces: list[dict[str, Any]] = []
    best = Best()
    every = num_steps if watch is None else watch.every

    with (
        tqdm(total=num_steps, disable=not progress_bar) as bar,
        deferred_interrupt() as interrupted,
    ):
        while done < num_steps and data.num_ready and not interrupted:
            # Care
            until_upkeep = backend.updates_until_upkeep(state)
            if until_upkeep == 0:
                state = backend.upkeep(state, data.arguments)
                until_upkeep = backend.updates_until_upkeep(state)

            # Step
            length = min(
                length,
                num_steps - done,
                every - done % every,
                until_upkeep,
                data.num_ready,
            )
            began = time.perf_counter()
            try:
                chunk = data.run(backend, state, length, programs)
            except Exception as error:  # a batch that the model refuses
                if done and not _is_lost(state):
                    fit = _fit(backend, state, pieces, data.arguments)
                    _add_fit(error, fit, f"in update {done} by its batch")
                raise

            state, history, num, finite = chunk
            data.prepare()  # while the device works
            ran = int(num)  # the chunk's one sync
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
                fit = _fit(backend, state, pieces, data.arguments)
                message = non_finite_message(finite, done, backend.parts)
                raise NonFiniteError(message, done, fit)

            # Look
            if watch is not None and (done % every == 0 or done == num_steps):
                seen = watch.look(backend.get_params(state))
                for key, value in seen.items():
                    pieces[-1][key][-1] = value
                best.see(seen.get(watch.watched, np.nan), state)
                if best.is_past(watch):
                    break

            # The first chunk includes compilation, so its time is not used.
            text = progress_text(backend.diagnostics, pieces[-1])
            bar.set_postfix_str(text, refresh=False)
            target = 16 if done == 1 else int(ran * SECONDS_PER_CHUNK / elapsed)
            length = max(1, min(target, MAX_CHUNK))

    kept = state if best.state is None else best.state
    fit = _fit(backend, kept, pieces, data.arguments)
    if data.failure is not None and not data.num_ready and done < num_steps:
        _add_fit(data.failure, fit, "while batches were read")
        raise data.failure
    return fit


def _is_lost(state: Any) -> bool:
    """Whether a program that failed has taken the state's memory."""
    leaves = (leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    return any(leaf.is_deleted() for leaf in leaves)


def _add_fit(error: Any, fit: Fit, where: str) -> None:
    """Add to what the data raised what was reached before."""
    error.fit = fit
    error.add_note(
        f"Raised {where}. The fit up to there is this error's .fit; go on with "
        "init_state=error.fit.state."
    )


def _fit(
    backend: Steps, state: Any, pieces: list[dict[str, Any]], arguments: Arguments
) -> Fit:
    history = (
        jax.tree.map(lambda *parts: np.concatenate(parts), *pieces) if pieces else {}
    )
    params, state = backend.finish(state, arguments)
    return Fit(params=params, state=state, history=history)
