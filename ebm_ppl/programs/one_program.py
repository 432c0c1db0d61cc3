"""Functions of distributions and transforms as one program each.

Called on concrete values outside of any program, every operation of NumPyro's would be a
program of its own, compiled anew for each shape.
"""

from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.interpreters.ad import JVPTracer
from jax.tree_util import PyTreeDef

Function = TypeVar("Function", bound=Callable[..., Any])

# Whose classes tell JAX of all that they hold; a user's own may keep some to itself.
KNOWN = ("numpyro.", "ebm_ppl.")


def one_program(static_argnums: tuple[int, ...] = ()) -> Callable[[Function], Function]:
    """Compile a function where its arguments can be handed to a program.

    It runs as it is on traced values, which are in a program already, and on objects of
    classes that JAX may not see whole.
    """

    def decorate(function: Function) -> Function:
        compiled = partial(jax.jit, static_argnums=static_argnums)(function)

        @wraps(function)
        def run(*args: Any) -> Any:
            return (compiled if can_be_handed_over(args) else function)(*args)

        return run  # type: ignore[return-value]

    return decorate


def can_be_handed_over(args: Any) -> bool:
    """Whether arguments are values, and objects that consist of nothing else."""
    leaves, structure = jax.tree.flatten(args)
    return all(map(_is_value, leaves)) and _is_known(structure)


def _is_value(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        # Outside of a program, a derivative is taken of one operation after the other.
        return isinstance(leaf, JVPTracer)
    return isinstance(leaf, Array | np.ndarray | np.generic | float | int)


def _is_known(structure: PyTreeDef) -> bool:
    node: Any = structure.node_data()
    if node is None:
        return True
    kind, fixed = node
    is_plain = kind in (tuple, list, dict, type(None))
    return (
        (is_plain or kind.__module__.startswith(KNOWN))
        and _can_be_compared(fixed)
        and all(map(_is_known, structure.children()))
    )


def _can_be_compared(fixed: Any) -> bool:
    """Whether what an object keeps outside of its leaves can tell two of them apart.

    NumPyro keeps arrays there (the counts of a ``Multinomial``), and functions, which are
    other ones whenever a model runs.
    """
    if isinstance(fixed, dict):
        return all(map(_can_be_compared, fixed.values()))
    if isinstance(fixed, tuple | list):
        return all(map(_can_be_compared, fixed))
    return not isinstance(fixed, Array | np.ndarray | FunctionType)
