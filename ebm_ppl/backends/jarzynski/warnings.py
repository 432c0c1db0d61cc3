"""Warnings of the Jarzynski backend."""

import warnings
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student_t

from ebm_ppl.errors import level_of_caller
from ebm_ppl.normalizer.own_draws import OwnDraws
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.smc.weights import jackknife_log_mean_exp
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit
from ebm_ppl.walkers.state import Walkers

# Runs too short to have drifted.
MIN_UPDATES = 200
# How far training islands may be from held-out ones, in nats and in standard errors.
MAX_GAP = 0.2
MAX_ERRORS = 5.0


def warn_where_islands_disagree(name: str, ensemble: Ensemble) -> None:
    """Warn where annealing did not lead all islands to the same log Z."""
    stderr = float(jnp.max(jackknife_log_mean_exp(ensemble.log_normalizers)[1]))
    if not stderr < 1.0:
        warnings.warn(
            f"Annealing to energy site '{name}': its islands disagree about log Z "
            f"(standard error {stderr:.2g} nats), so no number that rests on it can "
            "be trusted. Take more temperatures or walkers, or a base nearer to the "
            "energy; if nothing helps, the energy may not be bounded below.",
            stacklevel=level_of_caller(),
        )


def warn_where_log_z_drifted(name: str, old: Walkers, fresh: Walkers) -> None:
    """Warn where the running log Z had left what fresh islands find."""
    (was, was_error), (now, now_error) = old.log_normalizer(), fresh.log_normalizer()
    ratios = jnp.abs(was - now) / jnp.hypot(was_error, now_error)
    worst = float(jnp.nanmax(ratios))
    if worst > student_t.ppf(1.0 - 0.005 / ratios.size, old.num_holdout_chains - 1):
        gap = float(jnp.ravel(was - now)[jnp.nanargmax(ratios)])
        warnings.warn(
            f"The running log Z of energy site '{name}' had drifted by {gap:+.2g} "
            f"nats, {worst:.1f} standard errors: do not use what the history says of "
            "the steps before. Refresh more often, or lower the learning rate.",
            stacklevel=level_of_caller(),
        )


def training_left_held_out(fit: Fit, is_renewed: bool) -> Iterator[Finding]:
    """Where training islands contradict held-out ones about log Z.

    An update moves the parameters by the noise of the training islands' gradient, and
    the same walkers are then reweighted by that very move: they count log Z too small,
    a little more at every update, and the parameters follow.
    """
    history = fit.history
    if not history or len(history["loss"]) < MIN_UPDATES:
        return
    last = max(1, len(history["loss"]) // 10)
    remedy = "more walkers or a lower learning rate"
    if not is_renewed:
        remedy = f"renew_every=50, {remedy}"

    for name, claimed in history["log_normalizer_training"].items():
        held_out, stderr = (
            np.asarray(history[key][name][-last:], float)
            for key in ("log_normalizer", "log_normalizer_stderr")
        )
        # Averages over the last tenth, whose errors are as one update's: they follow
        # one another.
        gap = np.mean(np.asarray(claimed[-last:], float) - held_out, axis=0)
        error = np.mean(stderr, axis=0)
        is_off = (np.abs(gap) > MAX_GAP) & (np.abs(gap) > MAX_ERRORS * error)
        if not np.any(is_off):
            continue

        worst = np.argmax(np.where(is_off, np.abs(gap), 0.0))
        here, sigma = float(np.ravel(gap)[worst]), float(np.ravel(error)[worst])
        level = float(np.ravel(np.mean(held_out, axis=0))[worst])
        yield Finding(
            f"The training walkers of energy site '{name}' put log Z at "
            f"{level + here:.3g}, the held-out ones at {level:.3g} ± {sigma:.2g}: "
            "learning from its own walkers has biased this fit's parameters. Check it "
            "with ebm_ppl.score_test(...), mend a fit of few parameters with "
            "ebm_ppl.polish(...), or train again from here (init_params=fit.params, "
            f"which places fresh walkers) with {remedy}."
        )


def held_out_draws(walkers: Mapping[str, Walkers]) -> dict[str, OwnDraws]:
    """Weighted draws by which a run is judged; training ones follow their own noise."""
    held = {}
    for name, site in walkers.items():
        split, ensemble = site.num_training_chains, site.ensemble
        log_weight = ensemble.past[:, None] + ensemble.log_weight
        held[name] = OwnDraws(site.values[split:], log_weight[split:])
    return held
