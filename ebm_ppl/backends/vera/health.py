"""Warnings of the VERA backend."""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array, random

from ebm_ppl.backends.vera.reach import MIN_LOG_RATIO, log_ratios
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.backends.vera.weighted import weighted_draws
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.errors import level_of_caller
from ebm_ppl.generators.scores.base import Score
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.own_draws import distance_from_maximum
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.optimizers import carries_on

# ESS fraction of the generator's draws, under which they do not stand for the model's.
MIN_ESS = 0.5
# Rows looked at, and the share of rows out of reach that is told.
MAX_ROWS = 128
MAX_UNREACHED = 0.05

REMEDIES = (
    "Check the fit with ebm_ppl.score_test(...); mend one of few parameters with "
    "ebm_ppl.polish(...), or train on with Jarzynski (init_params=fit.params), whose "
    "walkers are placed by the energy."
)


def standing_at_bounds(fit: Fit) -> Iterator[Finding]:
    """Generator parameters that stand at an end of their interval."""
    recent = (
        fit.history["at_bound"][-max(1, len(fit.history["at_bound"]) // 4) :]
        if fit.history
        else np.zeros(0)
    )
    if len(recent) < 50 or not np.mean(recent >= 0.5) > 0.5:
        return
    shares = fit.state.generator.at_bounds(fit.state.generator_params)

    for name, share in jax.device_get(shares).items():
        if abs(share) < 0.5:
            continue
        end, why = (
            (
                "lower",
                "the generator wants to be sharper than that, or is collapsing: "
                "widen the interval downwards, or ",
            )
            if share > 0
            else (
                "upper",
                "its net explains too little: take a larger net or more latents, ",
            )
        )

        yield Finding(
            f"Generator parameter '{name}' has stood at the {end} end of its interval "
            f"for most of the last quarter of the run: {why}raise the generator's "
            "learning rate."
        )


def falling_entropy(fit: Fit, init_state: VERAState) -> Iterator[Finding]:
    """Where the entropy still falls fast in the last third of a run."""
    if not fit.history:
        return
    (entropy,) = fit.history["entropy"].values()
    if len(entropy) < 300:
        return
    size = max(
        1, len(jax.tree.leaves(init_state.generator_params)) and _event_size(init_state)
    )
    parts = [np.mean(part) for part in np.array_split(np.asarray(entropy, float), 6)]
    middle, late = parts[2] - parts[3], parts[4] - parts[5]

    if late > 0.25 * size and late >= 0.5 * middle:
        yield Finding(
            f"The generator's entropy falls without end (by {late:.2g} nats over the "
            f"last sixth of the run, now {parts[5]:.3g}): it is collapsing onto few "
            "points. Raise entropy_weight or gradient_penalty, lower the model's "
            "learning rate, or take more num_generator_steps."
        )


def _event_size(state: VERAState) -> int:
    _, shape = jax.eval_shape(lambda s: s.draws(s.rng_key, 1), state)
    return int(np.prod(shape.shape[1:]))


def tempered_draws(entropy_weight: float, is_weighed: bool) -> Iterator[Finding]:
    """Where the generator's draws were not meant to be the model's."""
    if entropy_weight == 1 or is_weighed:
        return
    yield Finding(
        f"entropy_weight = {entropy_weight}: the generator was drawn to "
        "exp(-U / entropy_weight), and without importance_weights=True the fit took "
        "its draws for the model's: the parameters are not at a maximum of the "
        "likelihood."
    )


def draws_astray(
    fit: Fit, model: Model, arguments: Arguments, score: Score
) -> Iterator[Finding]:
    """What the draws miss, and parameters that are not at a maximum."""
    state: VERAState = fit.state
    name = state.generator.name
    key_model, key_rows, key_draws = random.split(state.rng_key, 3)
    bound = BoundModel(model, state.transforms, key_model, arguments)
    energy = bound.energies(state.params)[name]
    yield from _low_ess(fit)

    # Draws around rows reach what the generator's do not.
    is_defended = state.defence is not None
    if not is_defended:
        unreached = list(_unreached_rows(fit, bound, energy, score, key_rows))
        yield from unreached
        if unreached:
            return  # draws that miss a mode say nothing of a maximum

    draws = weighted_draws(key_draws, state, bound, score)
    why = (
        f"gradient_penalty = {state.gradient_penalty} makes this a penalised fit. "
        if state.gradient_penalty
        else ""
    )
    yield from distance_from_maximum(fit, model, arguments, {name: draws}, why)


def _low_ess(fit: Fit) -> Iterator[Finding]:
    """Where the draws that stood for the model's are not the model's."""
    is_defended = fit.state.defence is not None
    key = "gradient_ess" if is_defended else "generator_ess"
    ((name, ess),) = fit.history[key].items()
    recent = ess[-(len(ess) // 4) :]
    if np.mean(recent) >= MIN_ESS:
        return
    yield Finding(
        f"The draws for energy site '{name}' are not the model's: weighted by exp(-U) "
        f"over their density they count as {100 * np.mean(recent):.2g}% of their number over "
        "the last quarter of the run, and the gradient of log Z rests on them. A lower "
        "rate for the energy or a higher one for the generator, more "
        f"num_generator_steps or a larger generator bring them nearer. {REMEDIES}"
    )


def _unreached_rows(
    fit: Fit,
    bound: BoundModel,
    energy: EnergyDistribution,
    score: Score,
    rng_key: Array,
) -> Iterator[Finding]:
    """Where the energy has data and the generator no draws."""
    name = fit.state.generator.name
    rows = data_rows(bound, fit.params, MAX_ROWS).get(name)
    if rows is None:
        return
    ratios = log_ratios(rng_key, fit.state, energy, score, rows)
    if ratios is None:
        return

    share = float(np.mean(~(np.asarray(ratios) >= MIN_LOG_RATIO)))
    if share <= MAX_UNREACHED:
        return
    yield Finding(
        f"The generator does not reach {100 * share:.2g}% of the data rows at energy "
        f"site '{name}' ({len(rows)} were looked at): its density there is under "
        f"e^{MIN_LOG_RATIO:.0f} of the energy's. No draw pulls the energy there, so the "
        "parameters are not at a maximum of the likelihood, and log Z is larger than "
        "log_normalizer_bound. In few dimensions defensive=True draws there; or take a "
        f"wider generator. {REMEDIES}"
    )


def warn_of_momentum(option: str, optim: Any, params: Params) -> None:
    """Warn of an optimiser that goes on where the gradient has ended."""
    if carries_on(optim, params):
        warnings.warn(
            f"{option} has momentum: with it the two players circle each other, ever "
            "wider. Leave it out, as in optax.adam(1e-3, b1=0.0) or optax.rmsprop(1e-3).",
            stacklevel=level_of_caller(),
        )
