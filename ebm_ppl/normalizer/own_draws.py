"""Whether a run ended at a maximum of its likelihood, by the draws that it holds itself."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree

from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.likelihood import (
    Draws,
    LikelihoodSurface,
    num_params,
    site_potential,
)
from ebm_ppl.normalizer.newton import climb_to_maximum
from ebm_ppl.normalizer.verdict import distances_of, judgement
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit

# Parameters, and log Z's, up to which this costs little beside the run.
MAX_PARAMETERS = 100
MAX_NORMALIZERS = 64
# Numbers of data up to which all rows are looked at at once.
MAX_DATA = 10_000_000
# Runs too short to have arrived anywhere.
MIN_UPDATES = 200
# A distance from the maximum, in standard errors, that is told: learning rates that do
# not fall leave one or two.
MAX_DISTANCE = 3.0


class OwnDraws(NamedTuple):
    """Weighted draws of one site that a run holds.

    Attributes:
        values: ``(num_chains, num_draws, *batch, *event)``.
        log_weight: ``(num_chains, num_draws, *batch)``.
    """

    values: Array
    log_weight: Array


def is_checked(fit: Fit) -> bool:
    """Whether a run is long enough, and its model small enough, for the check."""
    num_updates = len(fit.history["loss"]) if fit.history else 0
    return num_updates >= MIN_UPDATES and num_params(fit.params) <= MAX_PARAMETERS


def distance_from_maximum(
    fit: Fit, model: Model, arguments: Arguments, held: Mapping[str, OwnDraws], why: str
) -> Iterator[Finding]:
    """Where a score test by the run's own draws finds the maximum far away.

    It is no substitute for :func:`score_test`: draws that miss a mode miss it here too.

    Args:
        fit: The run.
        model: The model.
        arguments: Its data.
        held: The run's weighted draws, of every energy site.
        why: A sentence on what may be the cause; may be empty.
    """
    sizes = [draws.log_weight[0, 0].size for draws in held.values()]
    num_data = sum(np.size(leaf) for leaf in jax.tree.leaves(arguments))
    num_chains = min(len(draws.log_weight) for draws in held.values())
    if num_chains < 2 or sum(sizes) > MAX_NORMALIZERS or num_data > MAX_DATA:
        return
    state = fit.state
    bound = at_full_size(state, model, arguments)
    energies = bound.energies(state.params)
    # Of one log Z per row, a subsampled plate leaves draws for a batch of rows alone.
    if any(e.batch_shape != held[n].log_weight.shape[2:] for n, e in energies.items()):
        return
    draws = {
        name: Draws(values, weight, site_potential(bound, state.params, name, values))
        for name, (values, weight) in held.items()
    }

    # A score test
    directions = jnp.eye(ravel_pytree(state.params)[0].size)
    surface = LikelihoodSurface(bound, state.params, directions, draws)
    maximum = climb_to_maximum(surface)
    found = distances_of(surface, maximum, num_chains)
    is_judged, reasons = judgement(found, MAX_DISTANCE)

    if is_judged and reasons:
        reason = reasons[0][0].upper() + reasons[0][1:]
        yield Finding(
            f"{reason} {why}(By the run's own draws; "
            "ebm_ppl.score_test(...) looks with fresh ones, and ebm_ppl.polish(...) "
            "goes to the maximum.)"
        )
    if not is_judged:
        worst = np.argmax(found.limit)
        yield Finding(
            "Whether this is a maximum was not told: the run's own draws judge parameter "
            f"'{found.site(worst)}' to {found.limit[worst]:.0f} of its standard errors "
            "only. Ask ebm_ppl.score_test(...).",
            is_warned_of=False,
        )


def at_full_size(state: Any, model: Model, arguments: Arguments) -> BoundModel:
    """The model with every plate at its full size, or as given if rows are a batch."""
    key = random.fold_in(state.rng_key, 1)
    full = BoundModel(with_full_plates(model), state.transforms, key, arguments)
    try:
        jax.eval_shape(
            lambda params, zero: full.negative_log_joint(
                params, lambda _, energy: energy.with_log_normalizer(zero)
            ),
            state.params,
            jnp.zeros(()),
        )
    except (TypeError, ValueError):
        return BoundModel(model, state.transforms, key, arguments)
    return full
