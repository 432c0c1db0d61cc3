"""Error messages and interrupts of the training loop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def non_finite_message(finite: Any, step: int, parts: dict[str, str]) -> str:
    """The message for a non-finite step: where it was, and remedies.

    Args:
        finite: A :class:`Finite`.
        step: Number of the step.
        parts: Descriptions of the backend's parts, by name.
    """
    where = ", ".join(
        [
            f"the walkers of energy site '{n}'"
            for n, ok in finite.sites.items()
            if not ok
        ]
        + [parts[name] for name, ok in finite.parts.items() if not ok]
    )

    return (
        f"Step {step} gave a NaN or an infinity in {where}; the state before it is "
        "kept in this error's .fit. Lower the learning rate or clip gradients "
        "(optax.chain(optax.clip_by_global_norm(...), ...)), lower the kernel's step "
        "size if it is ULA, and check that the energy is finite over the whole "
        "support and on the data (and that a generator's scale is positive, "
        "constraint=constraints.interval(0.01, 1.0), and its draws in the base's "
        "support: ebm_ppl.standardized_normal)."
    )


@contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into an entry of the yielded list.

    A chunk is then not interrupted while its state is donated.
    """
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
