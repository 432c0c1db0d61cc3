"""The data rows, and the draws, that a user gave for one site."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import unwrap
from ebm_ppl.energy.start import energy_beyond, starting_distribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.data import Observation, observations
from ebm_ppl.model.masks import unmasked
from ebm_ppl.model.program import Params
from ebm_ppl.walkers.site import SiteAtParams

# Share of rows that may weigh more than every draw, chance aside; and of log Z that one
# draw there would have brought.
MAX_BEYOND = 0.05


def given_samples(
    site: SiteAtParams,
    samples: Mapping[str, ArrayLike],
    num_chains: int,
    num_walkers: int,
) -> Array:
    """A user's draws of the model for one site, checked.

    Raises:
        ValueError: The site is missing, or the shape is not ``(num_chains, num_walkers,
            *batch, *event)``.
    """
    if site.name not in samples:
        raise ValueError(
            f"samples has sites {sorted(samples)}; expected energy site '{site.name}' "
            "among them."
        )

    distribution = site.distribution
    given = jnp.asarray(samples[site.name], float)
    expected = (
        num_chains,
        num_walkers,
        *distribution.batch_shape,
        *distribution.event_shape,
    )
    if given.shape != expected:
        raise ValueError(
            f"samples['{site.name}'] has shape {given.shape}; expected (num_chains, "
            f"num_walkers, *batch_shape, *event_shape) = {expected}. Pass num_chains= "
            "and num_walkers=, or reshape the draws."
        )

    return given


def observed_rows(
    bound: BoundModel, params: Params, *, full_plates: bool = True
) -> dict[str, Observation]:
    """Data with every plate at full size, or as given if the caller passed a batch."""
    arguments = (bound.rng_key, bound.model, params, bound.arguments)
    if not full_plates:
        return observations(*arguments, full_plates=False)
    try:
        full = observations(*arguments)
        for found in full.values():
            np.broadcast_shapes(jnp.shape(found.value), found.distribution.shape())
    except ValueError:
        return observations(*arguments, full_plates=False)
    return full


def data_rows(
    bound: BoundModel,
    params: Params,
    max_rows: int | None = None,
    *,
    full_plates: bool = True,
) -> dict[str, Array]:
    """The usable data rows of every observed energy site.

    Rows are ``(num_rows, *batch, *event)``; of more than ``max_rows``, evenly spaced
    ones are kept.
    """
    rows = {}
    seen = observed_rows(bound, params, full_plates=full_plates)
    for name, found in seen.items():
        energy = unwrap(found.distribution)
        if (
            energy is None
            or isinstance(found.value, jax.core.Tracer)
            or energy.support.is_discrete
        ):
            continue

        # Rows
        own_shape = energy.batch_shape + energy.event_shape
        values = np.broadcast_to(
            np.asarray(found.value), found.distribution.shape()
        ).reshape(-1, *own_shape)
        num_rows = len(values)

        # Usable ones
        checks = (
            np.isfinite(values),
            np.asarray(energy.support(values)),
            unmasked(found.distribution),
        )
        values = values[
            np.all([check.reshape(num_rows, -1).all(1) for check in checks], axis=0)
        ]

        # Thin
        if max_rows is not None and len(values) > max_rows:
            values = values[
                np.unique(np.linspace(0, len(values) - 1, max_rows).astype(int))
            ]
        if len(values):
            rows[name] = jnp.asarray(values, float)

    return rows


def rows_of_batch(
    bound: BoundModel, energies: Mapping[str, Any], params: Params, max_rows: int
) -> dict[str, Array]:
    """The data rows at unconstrained parameters, of all plates at full size.

    Where an energy has a log Z for each row, they are those of the batch that the
    energies are of.
    """
    is_shared = not any(energy.batch_shape for energy in energies.values())
    params = bound.constrain(params)
    return data_rows(bound, params, max_rows, full_plates=is_shared)


def share_beyond_draws(
    bound: BoundModel,
    params: Params,
    name: str,
    rows: Array,
    largest: Array,
    log_z: Array,
    num_draws: int,
) -> float:
    """Share of data rows that weigh more than every draw of the start did.

    And so much more that one draw there would have changed log Z: the model may have
    that share of its mass there, and the draws' mean weight lacks it.

    Args:
        bound: The model, of these parameters.
        params: The parameters.
        name: The site.
        rows: ``(num_rows, *batch, *event)``.
        largest: Largest log weight of the draws, ``batch``.
        log_z: Log of their mean weight, ``batch``.
        num_draws: Their number.

    Returns:
        The share; 0 where chance explains it.
    """
    log_weight = _log_weights(bound, params, name, rows)
    enough = log_z + np.log(MAX_BEYOND * num_draws)
    beyond = np.asarray(log_weight > jnp.maximum(largest, enough))
    share, size = float(np.mean(beyond)), beyond.size
    chance = 3.0 * np.sqrt(MAX_BEYOND * (1 - MAX_BEYOND) / size)
    return share if share > MAX_BEYOND + chance else 0.0


@partial(jax.jit, static_argnames="name")
def _log_weights(bound: BoundModel, params: Params, name: str, rows: Array) -> Array:
    energy = bound.energies(params)[name]
    return -energy_beyond(energy, starting_distribution(energy, name), rows)
