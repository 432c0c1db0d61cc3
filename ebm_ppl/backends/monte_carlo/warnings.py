"""Warnings of Monte Carlo maximum likelihood."""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from ebm_ppl.energy.bounded import bound_of
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.by_base import chernoff_limits
from ebm_ppl.normalizer.flags import MAX_KHAT
from ebm_ppl.normalizer.look_by_base import ROOM
from ebm_ppl.normalizer.own_draws import OwnDraws
from ebm_ppl.normalizer.rows import rows_of_batch, share_beyond_draws
from ebm_ppl.smc.weights import log_mean_exp, pareto_khat
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit

# Runs too short to have settled.
MIN_UPDATES = 50
# Effective draws under which log Z, and its gradient, are biased: by half over their
# number, in nats.
MIN_DRAWS = 10.0
MAX_ROWS = 1024

REMEDIES = (
    "Take a base nearer to the data, or wider than they are (ebm_ppl.from_sklearn, a "
    "flow), a lower bound (ebm_ppl.bounded), more draws (num_draws), or go on with "
    "Jarzynski (init_params=fit.params), whose walkers follow the energy."
)


def few_draws(fit: Fit, num_draws: int) -> Iterator[Finding]:
    """Where a few draws of the base carried the last tenth of a run."""
    history = fit.history
    last = max(1, len(history["loss"]) // 10)
    for name, ess in history["ess"].items():
        count = num_draws * float(np.min(np.median(ess[-last:], axis=0)))
        if count < MIN_DRAWS:
            yield _finding(
                name,
                f"of {num_draws:,} draws of the base only {count:.1f} counted (ESS) at "
                "the end: its log Z and the fit are biased.",
            )


def draws_astray(
    bound: BoundModel, params: Params, held: Mapping[str, OwnDraws]
) -> Iterator[Finding]:
    """Where the base's draws do not stand for the model's.

    Weights whose tail has no variance, or data rows where no draw came, give a log Z that
    is too small by more than its standard error says.

    Args:
        bound: The model.
        params: Unconstrained parameters.
        held: Weighted draws at these parameters.
    """
    energies = bound.energies(params)
    rows = rows_of_batch(bound, energies, params, MAX_ROWS)
    for name, draws in held.items():
        flat = draws.log_weight.reshape(-1, *draws.log_weight.shape[2:])
        largest, share = jnp.max(flat, axis=0), 0.0
        log_z = log_mean_exp(flat, axis=0)
        limit = (
            bound_of(energies[name].factors) if energies[name].start is None else None
        )
        if limit is not None:
            _, upper = chernoff_limits(np.asarray(log_z, float), limit, len(flat))
            if np.all(upper - np.asarray(log_z) <= ROOM):
                continue

        if name in rows:
            share = share_beyond_draws(
                bound, params, name, rows[name], largest, log_z, len(flat)
            )
        if share > 0:
            yield _finding(
                name,
                f"{100 * share:.0f}% of the data rows lie where none of {len(flat):,} "
                "draws of the base came, so that log Z and the fit lack that mass.",
            )
            continue

        khat = float(jnp.max(pareto_khat(flat)))
        if limit is None and khat > MAX_KHAT:
            yield _finding(
                name,
                f"the weights of the base's draws have a tail so heavy (Pareto k̂ = "
                f"{khat:.2f} > {MAX_KHAT}) that log Z is not known from them, and the fit "
                "may have run off.",
            )


def _finding(name: str, text: str) -> Finding:
    return Finding(f"Energy site '{name}': {text} {REMEDIES}")
