"""Warnings of Monte Carlo maximum likelihood."""

import warnings

import numpy as np

from ebm_ppl.errors import level_of_caller
from ebm_ppl.training.fit import Fit

# Runs too short to have settled.
MIN_UPDATES = 50
# Effective draws under which log Z, and its gradient, are biased: by half over their
# number, in nats.
MIN_DRAWS = 10.0


def warn_of_few_draws(fit: Fit, num_draws: int) -> None:
    """Warn where a few draws of the base carried the last tenth of a run."""
    history = fit.history
    if not history or len(history["loss"]) < MIN_UPDATES:
        return
    last = max(1, len(history["loss"]) // 10)
    for name, ess in history["ess"].items():
        count = num_draws * float(np.min(np.median(ess[-last:], axis=0)))
        if count >= MIN_DRAWS:
            continue
        warnings.warn(
            f"Of {num_draws:,} draws of the base of energy site '{name}' only "
            f"{count:.1f} counted (ESS) at the end: its log Z and the fit are biased. "
            "Take a base nearer to the data (ebm_ppl.from_sklearn, a flow), a lower bound "
            "(ebm_ppl.bounded), more draws (num_draws), or go on with "
            "Jarzynski (init_params=fit.params), whose walkers follow the energy.",
            stacklevel=level_of_caller(),
        )
