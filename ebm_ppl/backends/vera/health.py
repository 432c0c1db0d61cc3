"""Warnings of the VERA backend."""

import warnings

import jax
import numpy as np

from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.errors import level_of_caller
from ebm_ppl.training.fit import Fit


def warn_of_bounds(fit: Fit) -> None:
    """Warn of generator parameters that stand at an end of their interval."""
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

        warnings.warn(
            f"Generator parameter '{name}' has stood at the {end} end of its interval "
            f"for most of the last quarter of the run: {why}raise the generator's "
            "learning rate.",
            stacklevel=level_of_caller(),
        )


def warn_of_collapse(fit: Fit, init_state: VERAState) -> None:
    """Warn where the entropy still falls fast in the last third of a run."""
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
        warnings.warn(
            f"The generator's entropy falls without end (by {late:.2g} nats over the "
            f"last sixth of the run, now {parts[5]:.3g}): it is collapsing onto few "
            "points. Raise entropy_weight or gradient_penalty, lower the model's "
            "learning rate, or take more num_generator_steps.",
            stacklevel=level_of_caller(),
        )


def _event_size(state: VERAState) -> int:
    _, shape = jax.eval_shape(lambda s: s.draws(s.rng_key, 1), state)
    return int(np.prod(shape.shape[1:]))


def warn_of_tempering(entropy_weight: float, importance_weights: bool) -> None:
    """Warn where the generator's draws were not meant to be the model's."""
    if entropy_weight == 1 or importance_weights:
        return
    warnings.warn(
        f"entropy_weight = {entropy_weight}: the generator was drawn to "
        "exp(-U / entropy_weight), and without importance_weights=True the fit took "
        "its draws for the model's: the parameters are not at a maximum of the "
        "likelihood.",
        stacklevel=level_of_caller(),
    )
