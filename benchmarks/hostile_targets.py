"""What a target of the battery is, and all of them (see hostile.py); their energies lie
in the files beside it."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Target:
    """One energy whose log Z is known.

    Its model is ``model(p, data)``, a function of a module, so that the programs that
    JAX compiles for it serve every target and seed with arrays of the same shapes.

    Attributes:
        name: Unlike that of any other target.
        model: A NumPyro model with an energy at site 'x', called with ``p`` and, where
            there are any, ``data``.
        p: What the energy depends on, arrays by name.
        truth: log Z, a number or one per batch element or draw; inf where the integral
            diverges, NaN where there is none to be had.  Either must be refused.
        benign: Whether a competent method at default settings should certify it.  Of
            the others nothing is asked but not to be wrong.
        data: Rows observed at the site.
        method: As in ``log_normalizer``.
        invisible: Why no method could know better without being told; empty for nearly
            all.
        params: Parameters of the model, draws where ``options`` has ``batch_ndims``.
        options: More arguments of ``log_normalizer``.
        quick: Whether it is cheap enough, and of use, in the quick form.
    """

    name: str
    model: Callable[..., None]
    p: dict[str, np.ndarray]
    truth: Any
    benign: bool
    data: np.ndarray | None = None
    method: str = "bracket"
    invisible: str = ""
    params: dict[str, np.ndarray] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @cached_property
    def version(self) -> str:
        """A digest of all that defines it: another one, and results that were kept no
        longer count."""
        parts = [
            inspect.getsource(self.model),
            self.method,
            repr(sorted(self.options.items())),
        ]
        arrays = [
            np.asarray(self.truth, float),
            *(np.asarray(v) for _, v in sorted((self.p | self.params).items())),
        ]
        arrays += [] if self.data is None else [self.data]
        # Truths come from SciPy and may differ in the last digits.
        parts += [f"{a.shape}{[float(f'{x:.5g}') for x in a.ravel()]}" for a in arrays]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def arrays(**values) -> dict[str, np.ndarray]:
    """Arguments of a model in single precision: traced by JAX, so that other values
    need no other program."""
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def families() -> dict[str, Callable[[], Iterator[Target]]]:
    """Every family's targets, by name."""
    import hostile_draws
    import hostile_shapes
    import hostile_supports
    import hostile_wells

    found = {}
    for module in (hostile_wells, hostile_shapes, hostile_supports, hostile_draws):
        found |= module.FAMILIES
    return found


def check_names(targets: dict[str, list[Target]]) -> None:
    """Two targets of one name would share their results.

    Raises:
        ValueError: Which names are taken twice.
    """
    names = [target.name for target in chain(*targets.values())]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Targets share the names {twice}.")
