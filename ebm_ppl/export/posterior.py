"""The groups of posterior draws."""

from typing import Any

import numpy as np
from numpyro import handlers
from numpyro.infer import log_likelihood

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.export.attributes import attributes_of
from ebm_ppl.export.contents import GIVEN, Contents
from ebm_ppl.export.groups import Group, rows_that_count
from ebm_ppl.model.program import Model
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

    return rows_that_count(
        {name: np.array(value) for name, value in found.items() if name in held.data},
        held.data,
        held.naming,
    )
