"""Observed values of a model, with their plates and distributions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from ebm_ppl.energy.distribution import unwrap
from ebm_ppl.model.handlers import EnergySites
from ebm_ppl.model.parameters import run_once
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Model, Params
from ebm_ppl.programs.arguments import Arguments


@dataclass(frozen=True)
class Observation:
    """Data at one observed site: value, leading dimensions and distribution.

    A dimension is a plate's name, or its index among the distribution's own batch
    dimensions.
    """

    value: Array
    dims: tuple[str | int, ...]
    distribution: dist.Distribution


def observations(
    rng_key: Array,
    model: Model,
    params: Params,
    arguments: Arguments,
    *,
    full_plates: bool = True,
) -> dict[str, Observation]:
    """Data at the observed sample sites, without auxiliary sites.

    By default every plate has its full size.
    """
    return observed_in(
        trace_at(rng_key, model, params, arguments, full_plates=full_plates)
    )


def trace_at(
    rng_key: Array,
    model: Model,
    params: Params,
    arguments: Arguments,
    *,
    full_plates: bool = True,
    moved: str | None = None,
) -> dict[str, dict]:
    """The sites of one run at constrained parameters.

    ``moved`` names an energy site whose value is replaced by random points.
    """
    model = with_full_plates(model) if full_plates else model
    recorder = EnergySites(handlers.seed(model, rng_key), moved, rng_key)
    return run_once(
        handlers.substitute(recorder, data=params), arguments.args, arguments.kwargs
    )


def observed_in(trace: Mapping[str, dict]) -> dict[str, Observation]:
    """Data at the observed sample sites of a run, without auxiliary sites."""
    found = {}
    for name, site in trace.items():
        auxiliary = site["type"] != "sample" or site["infer"].get("is_auxiliary", False)
        if auxiliary or not site["is_observed"] or isinstance(site["fn"], dist.Unit):
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
        value = _in_full(name, site["value"], site["fn"])
        num_batch_dims = jnp.ndim(value) - len(site["fn"].event_shape)
        energy = unwrap(site["fn"])

        # The energy's own dimensions are counted as for the walkers.
        own = (
            0
            if energy is None
            else len((*energy.batch_shape, *energy.event_shape))
            - len(site["fn"].event_shape)
        )
        shared = num_batch_dims - own
        dims = tuple(
            plates.get(k - num_batch_dims, k - shared) for k in range(num_batch_dims)
        )
        found[name] = Observation(value, dims, site["fn"])
    return found


def _in_full(name: str, value: Any, distribution: dist.Distribution) -> Any:
    """The value of every row, where one stands for several of a plate.

    Raises:
        ValueError: The value and the plates have different numbers of rows.
    """
    try:
        shape = jnp.broadcast_shapes(jnp.shape(value), distribution.shape())
    except ValueError:
        raise ValueError(
            f"Data at site '{name}' has shape {jnp.shape(value)}; its plates and its "
            f"distribution have shape {distribution.shape()}. Give as many rows as the "
            "plates have, or take their size from the data: numpyro.plate(..., len(x))."
        ) from None
    return value if jnp.shape(value) == shape else jnp.broadcast_to(value, shape)
