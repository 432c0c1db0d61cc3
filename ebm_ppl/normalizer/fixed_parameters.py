"""A handler that holds parameters at the values that log Z belongs to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from ebm_ppl.model.handlers import KnownNormalizers, Normalize
from ebm_ppl.model.program import Model, Params


class FixedParameters(KnownNormalizers):
    """Known log Z, with parameters fixed at the values that it belongs to.

    Sample sites become deterministic, without a prior.
    """

    def __init__(self, fn: Model, normalize: Normalize, params: Params) -> None:
        super().__init__(fn, normalize)
        self.params = params
        self.doubts: list[Array] = []

    def __enter__(self) -> "FixedParameters":
        self.doubts = []
        return super().__enter__()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "control_flow":
            # Sites in the body of a loop or a branch see only the handlers in this
            # stack.
            msg["kwargs"]["substitute_stack"].append(
                ("substitute", jax.tree.map(jnp.asarray, self.params))
            )
        if msg["type"] in ("param", "sample") and msg["name"] in self.params:
            if msg["type"] == "sample":
                self._require_own_value(msg)
            msg["value"] = self.params[msg["name"]]
            if msg["type"] == "sample":
                msg["type"] = "deterministic"
        super().process_message(msg)

    def postprocess_message(self, msg: dict) -> None:
        """Called by NumPyro after every site."""
        # Subsamples, keys and control flow have no name.
        fixed = self.params.get(msg.get("name", ""))
        if fixed is not None and msg["value"] is not fixed:
            # An outer handler set the value; it must equal the one that log Z belongs
            # to.
            msg["value"] = self._own_value(msg, fixed)

    def _require_own_value(self, msg: dict) -> None:
        """Refuse ``do`` and ``condition`` around this handler with another value.

        They act on sample sites alone, and would find a deterministic one.
        """
        for handler in _PYRO_STACK:
            if handler is self:
                return
            value = None
            if isinstance(handler, handlers.do | handlers.condition):
                value = (handler.data or {}).get(msg["name"])
            if isinstance(handler, handlers.condition) and handler.condition_fn:
                value = handler.condition_fn(msg)
            if value is not None:
                self._own_value(msg | {"value": value}, self.params[msg["name"]])

    def _own_value(self, msg: dict, fixed: Any) -> Any:
        """The value that log Z belongs to.

        Another value is an error; where it is traced, the result is NaN.
        """
        given = msg["value"]
        expected, found = (str(jax.tree.structure(tree)) for tree in (fixed, given))
        if expected != found:
            raise ValueError(
                f"Site '{msg['name']}' was given a value of structure {found}; log Z "
                f"belongs to one of structure {expected}. Estimate it at the value "
                "that you give."
            )

        leaves = list(zip(jax.tree.leaves(fixed), jax.tree.leaves(given), strict=True))
        if any(isinstance(leaf, jax.core.Tracer) for pair in leaves for leaf in pair):
            if msg["type"] != "param":
                return jax.tree.map(
                    lambda own, other: jnp.where(own == other, own, jnp.nan),
                    fixed,
                    given,
                )

            # SVI traces every parameter: the energy keeps the fixed values, and log Z
            # is NaN if the given ones differ.
            self.doubts += [
                jnp.where(jnp.all(own == other), 0.0, jnp.nan) for own, other in leaves
            ]
            return fixed

        if not all(_are_equal(own, other) for own, other in leaves):
            raise ValueError(
                f"Site '{msg['name']}' was given another value than that which "
                "log_normalizer belongs to. Estimate it there: "
                "ebm_ppl.log_normalizer(rng_key, model, params, ...); for draws give "
                "log_normalizer.samples, from batch_ndims=1 or 2."
            )
        return fixed


def _are_equal(own: Any, other: Any) -> bool:
    """Whether values agree, floats in the precision of the parameter."""
    own, other = np.asarray(own), np.asarray(other)
    if np.issubdtype(own.dtype, np.floating):
        other = other.astype(own.dtype)
    return np.array_equal(own, other)
