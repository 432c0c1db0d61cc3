"""Plates at their full size."""

from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from ebm_ppl.model.program import Model


class FullPlates(Messenger):
    """Switch subsampling off: every plate has all its rows.

    A batch passed in by the user stays a batch: its site has the size of its data.
    """

    def __init__(self, fn: Model | None = None) -> None:
        super().__init__(fn)
        self.switched: set[str] = set()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "plate" and msg["value"] is None:
            size = msg["args"][0]
            msg["args"] = (size, size)
            msg["value"] = jnp.arange(size)
            self.switched.add(msg["name"])

        elif (
            msg["type"] == "sample"
            and msg["is_observed"]
            and isinstance(msg["fn"], dist.ExpandedDistribution)
        ):
            fn, shape = msg["fn"], np.shape(msg["value"])
            rows = shape[: len(shape) - fn.event_dim]
            is_switched = any(
                frame.name in self.switched for frame in msg["cond_indep_stack"]
            )

            if (
                is_switched
                and len(rows) == len(fn.batch_shape)
                and rows != fn.batch_shape
            ):
                msg["fn"] = fn.base_dist.expand(rows)


@lru_cache(maxsize=16)
def with_full_plates(model: Model) -> Model:
    """The model without subsampling; one object, so that calls share programs."""

    def full(*args: Any, **kwargs: Any) -> Any:
        with FullPlates():
            return model(*args, **kwargs)

    return full
