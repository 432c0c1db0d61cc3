"""Whether the loss still moved when a run ended."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student_t

from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.density import counts_of
from ebm_ppl.normalizer.own_draws import at_full_size
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit

# Runs too short to have settled.
MIN_UPDATES = 200
# Blocks of the last fifth of a run, between which the loss's noise is measured.
NUM_BLOCKS = 10
# Probability that noise alone passes for a change.
FALSE_ALARM = 0.005
# Nats of all rows together, under which no change matters.
MIN_CHANGE = 1.0


def still_moving(
    fit: Fit,
    model: Model,
    arguments: Arguments,
    log_z_errors: Mapping[str, Any] | None = None,
    unit: str = "nats",
) -> Iterator[Finding]:
    """That the loss moved as the run ended.

    Args:
        fit: The run.
        model: The model.
        arguments: Its data.
        log_z_errors: History of the standard errors of log Z by site, where an error
            lasts from update to update, so that the loss's own noise does not show it.
        unit: What the loss is counted in.
    """
    losses = np.asarray(fit.history["loss"], float) if fit.history else np.zeros(0)
    if len(losses) < MIN_UPDATES:
        return
    change, error = change_of(losses)
    quantile = float(student_t.ppf(1 - 0.5 * FALSE_ALARM, NUM_BLOCKS - 2))
    if abs(change) <= max(MIN_CHANGE, quantile * error):
        return

    if log_z_errors:
        last = -(len(losses) // 10)
        recent = {name: np.mean(e[last:], axis=0) for name, e in log_z_errors.items()}
        error = float(np.hypot(error, _of_all_rows(fit, model, arguments, recent)))
        if abs(change) <= quantile * error:
            return
    how = "fell" if change < 0 else "rose"
    yield Finding(
        f"The loss still {how} by {abs(change):.3g} ± {error:.1g}{unit and ' ' + unit}, "
        "all rows together, over the last tenth of the run: it has not settled. Train "
        "on (init_state=fit.state), or let the learning rate fall.",
        is_warned_of=False,
    )


def change_of(losses: np.ndarray) -> tuple[float, float]:
    """What a line through the last fifth of a run falls in a tenth, and its error.

    The line goes through means of blocks, which are longer than what noise remembers.
    """
    last = losses[-(len(losses) // 5) :]
    blocks = np.array([np.mean(block) for block in np.array_split(last, NUM_BLOCKS)])
    times = np.arange(NUM_BLOCKS) - 0.5 * (NUM_BLOCKS - 1)
    slope = times @ blocks / (times @ times)
    residual = blocks - np.mean(blocks) - slope * times
    error = np.sqrt(residual @ residual / (NUM_BLOCKS - 2) / (times @ times))
    return float(slope * NUM_BLOCKS / 2), float(error * NUM_BLOCKS / 2)


def _of_all_rows(
    fit: Fit, model: Model, arguments: Arguments, errors: Mapping[str, Any]
) -> float:
    """What errors of log Z make in the loss, where each enters as often as it does."""
    bound = at_full_size(fit.state, model, arguments)
    estimates = {name: jnp.zeros(np.shape(error)) for name, error in errors.items()}
    counts = counts_of(bound, fit.state.params, estimates)
    # Elements of a batch have walkers of their own.
    parts = [
        counts[name] / max(np.size(error), 1) * np.sqrt(np.sum(np.square(error)))
        for name, error in errors.items()
    ]
    return float(np.sqrt(np.sum(np.square(parts))))
