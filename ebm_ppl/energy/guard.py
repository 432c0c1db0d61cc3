"""Guards against a constant log Z whose energy varies.

Leaving ``−∇log Z`` out of a gradient, or using log Z of other parameter values, gives a
fit or a posterior that looks healthy and is wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from ebm_ppl.errors import UnknownNormalizerError, at_site


class Constant:
    """A constant log Z: a hashable array in a pytree's structure, not a leaf.

    It belongs to fixed parameters.  As a leaf it would have its own tangent, which a
    derivative with respect to the whole distribution would take for that of log Z, and
    ``jax.tree.map`` could scale it.
    """

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def _content(self) -> tuple:
        return self.value.shape, self.value.dtype.str, self.value.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"Constant({self.value})"


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_constant(
    name: str | None, closure: list[Array], log_normalizer: Array
) -> tuple[list[Array], Array]:
    """Identity whose derivative raises if only the closure, not log Z, has tangents."""
    return closure, log_normalizer


@partial(refuse_constant.defjvp, symbolic_zeros=True)
def _refuse_constant_jvp(name: str | None, primals: tuple, tangents: tuple) -> tuple:
    closure_tangents, log_normalizer_tangent = tangents
    learning = any(
        not isinstance(t, SymbolicZero)
        for t in jax.tree.leaves(closure_tangents, is_leaf=_is_zero)
    )

    if learning and isinstance(log_normalizer_tangent, SymbolicZero):
        raise UnknownNormalizerError(
            f"The energy{at_site(name)} is being differentiated with respect to "
            "parameters inside it, but its log_normalizer is a constant: the term "
            "−∇log Z would be dropped and the fit or posterior would be wrong. Give "
            "log_normalizer as a function of the same parameters, or fit with "
            "ebm_ppl.Jarzynski(model, ...)."
        )
    return primals, tangents


def _is_zero(value: Any) -> bool:
    return isinstance(value, SymbolicZero)


def traced_sites() -> tuple[str, ...]:
    """Names of the sample sites with traced values in the current run of a model.

    NUTS, a Gibbs step (which conditions on the other sites) and vmapped posterior draws
    put tracers at latent sites.
    """
    return tuple(
        name
        for handler in _PYRO_STACK
        if isinstance(handler, handlers.trace)
        for name, site in handler.trace.items()
        if site["type"] == "sample"
        and any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(site["value"])
        )
    )


def depends_on_traced(
    fn: Callable[[Array], Array], value: Array | jax.ShapeDtypeStruct
) -> bool:
    """Whether a function closes over traced values, of any type."""
    constants = jax.make_jaxpr(lambda v: fn(v))(
        jax.ShapeDtypeStruct(value.shape, value.dtype)
    ).consts
    return any(isinstance(constant, jax.core.Tracer) for constant in constants)


def varying_energy_error(
    name: str | None, sites: tuple[str, ...]
) -> UnknownNormalizerError:
    """Error for an energy that varies with traced sites while its log Z does not."""
    found = ", ".join(f"'{site}'" for site in sites)
    return UnknownNormalizerError(
        f"The energy{at_site(name)} varies while sites {found} are sampled (or mapped "
        "over draws), but its log_normalizer is a constant, which belongs to one "
        "value of them: the posterior or likelihood would be wrong without a word. "
        "Give log_normalizer as a function of the same values (an array with one "
        "entry per state of a discrete latent); where the energy is smooth in them, "
        "ebm_ppl.normalized(model) does it."
    )
