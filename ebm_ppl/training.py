"""The one training loop: compiled chunks of updates, progress without a sync per step."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm.auto import tqdm

from ebm_ppl.errors import NonFiniteError
from ebm_ppl.model import Arguments, Params
from ebm_ppl.snapshot import Snapshot, snapshot

MAX_CHUNK = 1024
SECONDS_PER_CHUNK = 0.5


class Backend(Protocol):
    """What the loop needs of a backend: a pure update and the parameters of a state."""

    def update(
        self, state: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The state after one step, and what the history records of it."""
        ...

    def get_params(self, state: Any) -> Params:
        """Parameters as users see them, on their own supports."""
        ...


@dataclass(frozen=True)
class Fit:
    """A finished run; parameters, state and the last entry of the history belong to one
    step.

    Attributes:
        params: Constrained values by site name.
        state: The backend's state; give it as ``init_state`` to continue.
        history: One NumPy array per diagnostic with a leading step axis; a dict by site
            name where it is per energy site.
    """

    params: Params
    state: Any
    history: dict[str, Any]


def as_strong_array(leaf: Any) -> Array:
    """Arrays of fixed type throughout, so that the second update finds the first one's executable."""
    if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return lax.convert_element_type(leaf, jnp.result_type(leaf))


def run(
    backend: Backend,
    init_state: Any,
    num_steps: int,
    arguments: Arguments,
    *,
    progress_bar: bool,
) -> Fit:
    """Run ``num_steps`` updates from ``init_state``, which is copied once; later
    buffers are donated.

    Ctrl-C ends the run at the next chunk's end and returns what was reached; a second
    one interrupts at once.

    Raises:
        NonFiniteError: A step was not finite.  Its ``fit`` holds the state before that
            step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}; expected at least 1.")
    state, programs = jax.tree.map(jnp.array, init_state), _programs_of(backend)
    done, length, pieces = 0, 1, []
    with (
        tqdm(total=num_steps, disable=not progress_bar) as bar,
        _deferred_interrupt() as interrupted,
    ):
        while done < num_steps and not interrupted:
            length = min(length, num_steps - done)
            began = time.perf_counter()
            state, history, ran, finite = _chunk(
                backend, state, arguments, length, programs
            )
            ran = int(ran)  # the chunk's one sync
            elapsed = time.perf_counter() - began
            pieces.append(
                jax.tree.map(
                    lambda h, ran=ran: np.asarray(h)[:ran], jax.device_get(history)
                )
            )
            done += ran
            bar.update(ran)
            bad = [name for name, ok in jax.device_get(finite).items() if not ok]
            if bad:
                fit = _fit(backend, state, pieces)
                raise NonFiniteError(_non_finite_message(bad, done), done, fit)
            bar.set_postfix_str(_progress(pieces[-1]), refresh=False)
            # The first chunk compiles and says nothing about speed.
            target = 16 if done == 1 else int(ran * SECONDS_PER_CHUNK / elapsed)
            length = max(1, min(target, MAX_CHUNK))
    return _fit(backend, state, pieces)


def _programs_of(backend: Backend) -> tuple[Snapshot, ...]:
    """The model, a generator: whatever the backend calls that may close over something."""
    return tuple(snapshot(value) for value in vars(backend).values() if callable(value))


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=1)
def _chunk(
    backend: Backend,
    state: Any,
    arguments: Arguments,
    num_steps: Array,
    programs: tuple[Snapshot, ...] = (),
) -> tuple[Any, dict[str, Any], Array, dict[str, Array]]:
    """Up to ``num_steps`` updates in one compiled loop of dynamic length; stops at the
    first that is not finite.

    Every length shares one executable, so the last short chunk does not compile again.
    ``programs`` are the backend's callables with their present content: where a model's
    closure has changed, the executable is another.
    """

    def update(state: Any) -> tuple[Any, dict[str, Any], dict[str, Array]]:
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
        return (step < num_steps) & jnp.all(jnp.stack(list(finite.values())))

    def body(carry: tuple) -> tuple:
        step, state, history, _ = carry
        state, info, finite = update(state)
        good = jnp.all(jnp.stack(list(finite.values())))
        history = jax.tree.map(lambda h, value: h.at[step].set(value), history, info)
        return step + good, state, history, finite

    all_finite = {name: jnp.ones((), bool) for name in finite}
    step, state, history, finite = lax.while_loop(
        going_on, body, (jnp.zeros((), jnp.int32), state, history, all_finite)
    )
    return state, history, step, finite


def _fit(backend: Backend, state: Any, pieces: list[dict[str, Any]]) -> Fit:
    history = (
        jax.tree.map(lambda *parts: np.concatenate(parts), *pieces) if pieces else {}
    )
    return Fit(params=backend.get_params(state), state=state, history=history)


def _non_finite_message(bad: list[str], step: int) -> str:
    where = ", ".join(
        {
            "loss": "the loss over the data",
            "gradient": "the gradient",
            "generator": "the generator",
        }.get(name, f"the walkers of energy site '{name}'")
        for name in bad
    )
    return (
        f"Step {step} gave a NaN or an infinity in {where}; the state before it is "
        "kept in this error's .fit. "
        "Lower the learning rate or clip gradients "
        "(optax.chain(optax.clip_by_global_norm(...), ...)), lower the "
        "kernel's step size if it is ULA, and check that the energy is finite over the "
        "whole support and on the data "
        "(and that a generator's scale is positive, "
        "constraint=constraints.interval(0.01, 1.0), and its draws in the "
        "base's support: ebm_ppl.standardized_normal)."
    )


def _progress(history: dict[str, Any]) -> str:
    parts = [f"loss {history['loss'][-1]:.4g}"]
    if "ess" in history:
        parts.append(
            "ESS "
            + ", ".join(f"{np.min(ess[-1]):.2f}" for ess in history["ess"].values())
        )
    if "log_normalizer" in history:
        for name, value in history["log_normalizer"].items():
            error = history["log_normalizer_stderr"][name][-1]
            if np.ndim(error) == 0:
                parts.append(f"log Z[{name}] {value[-1]:.3f} ± {error:.3f}")
    return ", ".join(parts)


@contextmanager
def _deferred_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into an entry of the list yielded, so that no donated state is lost half-way."""
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:
        yield pressed
        return

    def on_interrupt(signum: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
