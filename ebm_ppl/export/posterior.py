"""The groups of posterior draws."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer import log_likelihood

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.errors import level_of_caller
from ebm_ppl.export.attributes import attributes_of
from ebm_ppl.export.contents import GIVEN, Contents
from ebm_ppl.export.groups import Group, masks_differ, rows_that_count
from ebm_ppl.model.data import observations
from ebm_ppl.model.masks import masks_of
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.known import normalized
from ebm_ppl.programs.arguments import Arguments


def draws_groups(
    model: Model,
    arguments: Arguments,
    held: Contents,
    log_normalizer: LogNormalizer | None,
    usable: bool,
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Groups and attributes of posterior draws, without data and draws of x."""
    groups = {"posterior": Group(held.parameters)}
    if usable:
        assert log_normalizer is not None
        groups["log_likelihood"] = _log_likelihood(
            model, arguments, log_normalizer, held
        )
    return groups, attributes_of(log_normalizer, held.naming.ends)


def add_draws(group: Group, held: Contents) -> None:
    """Add the user's draws of x, replacing any others."""
    for name, values in held.draws.items():
        leading = held.naming.batch(
            name, np.ndim(values) - 2 - len(held.event_dims[name])
        )
        dims = ("chain", "draw", *leading, *held.event_dims[name])
        group.variables[held.naming.variables[name]] = (dims, np.array(values))
        group.attrs |= {"draws": GIVEN, "draws_are_weighted": 0}


def _log_likelihood(
    model: Model, arguments: Arguments, log_normalizer: LogNormalizer, held: Contents
) -> Group:
    """Log densities of every unmasked row, at every draw."""
    if log_normalizer.batch_ndims != 2:
        raise ValueError(
            f"log_normalizer has {log_normalizer.batch_ndims} axes of draws; expected "
            "2, one log Z for every (chain, draw): ebm_ppl.log_normalizer(..., "
            "batch_ndims=2)."
        )

    _require_same_masks(model, arguments, log_normalizer.params, held)
    # As in a fit: rows are picked by a plate's indices, which are traced here.
    arguments = jax.tree.map(jnp.asarray, arguments)

    # Only keys that the model requests itself (initial values of a net) are seeded;
    # sample sites must not be drawn here.
    keyed = handlers.seed(
        normalized(model, log_normalizer, allow_uncertified=True),
        held.rng_key,
        hide_types=["sample", "plate"],
    )
    found = log_likelihood(
        keyed,
        log_normalizer.samples,
        *arguments.args,
        batch_ndims=2,
        **arguments.kwargs,
    )

    found = {name: np.array(value) for name, value in found.items()}
    _warn_of_rows_without_density(found, held)
    return rows_that_count(
        {name: value for name, value in found.items() if name in held.data},
        held.data,
        held.naming,
    )


def _require_same_masks(
    model: Model, arguments: Arguments, draws: Params, held: Contents
) -> None:
    """Refuse a mask that differs from draw to draw.

    Raises:
        ValueError: The message names the site.
    """
    masked = {
        name: firsts
        for name, found in held.data.items()
        if (firsts := list(masks_of(found.distribution)))
    }
    if not masked:
        return

    def differs(draw: Params) -> dict[str, Array]:
        found = observations(held.rng_key, model, draw, arguments)
        pairs = {
            name: zip(masks_of(found[name].distribution), firsts, strict=True)
            for name, firsts in masked.items()
        }
        return {
            name: jnp.stack([jnp.any(mask != first) for mask, first in masks])
            for name, masks in pairs.items()
        }

    for name, anywhere in jax.vmap(jax.vmap(differs))(draws).items():
        if bool(jnp.any(anywhere)):
            raise ValueError(masks_differ(name))


def _warn_of_rows_without_density(found: dict[str, np.ndarray], held: Contents) -> None:
    for name, value in found.items():
        bad = ~np.isfinite(value)
        if name in held.data and bad.any():
            rows = bad.any((0, 1))
            warnings.warn(
                f"The log likelihood at site '{name}' is NaN or infinite at "
                f"{int(rows.sum())} of {rows.size} rows, where LOO has no meaning: "
                "look for missing or impossible values in the data, and leave such "
                "rows out with numpyro.handlers.mask.",
                stacklevel=level_of_caller(),
            )
