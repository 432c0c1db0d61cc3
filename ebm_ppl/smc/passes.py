"""One pass of annealing and what it says about log Z."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from scipy.stats import t as student_t

from ebm_ppl.smc.ensemble import Ensemble, Moves
from ebm_ppl.smc.weights import ess_fraction, jackknife_log_mean_exp, pareto_khat

# Each limit is one-sided at 97.5%, so that both hold jointly with probability 95%.
LIMIT_LEVEL = 0.975


class Pass(NamedTuple):
    """One direction of annealing.

    Attributes:
        log_ratios: Every island's log Ẑ (forward) or log of an estimate of 1/Z
            (reverse), ``(num_chains, *batch)``.
        log_weights: The terms whose log-mean-exp over walkers is ``log_ratios``, past
            resamplings included, ``(num_chains, num_walkers, *batch)``.
        moves: Statistics of the moves.
        resampled: Whether any island resampled on the way, ``batch``.
        log_island_weights: Log weights of the islands, shaped like ``log_ratios``; None
            for equal weights.  Islands that start from a forward pass's endpoints are
            weighted by its Ẑ_c, since E[Ẑ_c f(x_c)] = Z E[f] holds for each.
    """

    log_ratios: Array
    log_weights: Array
    moves: Moves
    resampled: Array
    log_island_weights: Array | None = None

    def limit(self) -> tuple[Array, Array, Array]:
        """Jackknifed log mean, its standard error, and its lower limit.

        The limit is one-sided at :data:`LIMIT_LEVEL`.
        """
        estimate, stderr = jackknife_log_mean_exp(
            self.log_ratios, self.log_island_weights
        )
        quantile = float(student_t.ppf(LIMIT_LEVEL, self.log_ratios.shape[0] - 1))
        return estimate, stderr, estimate - quantile * stderr

    def ess(self) -> Array:
        """ESS fraction of all terms together."""
        return ess_fraction(self._terms(), axis=0)

    def khat(self) -> Array:
        """Pareto k̂ of all terms together."""
        return pareto_khat(self._terms())

    def _terms(self) -> Array:
        terms = self.log_weights
        if self.log_island_weights is not None:
            terms = terms + self.log_island_weights[:, None]
        return terms.reshape(-1, *terms.shape[2:])


def pass_of(
    ensemble: Ensemble, moves: Moves, log_island_weights: Array | None = None
) -> Pass:
    """The :class:`Pass` of an ensemble at the end of a ladder."""
    log_weights = ensemble.past[:, None] + ensemble.log_weight
    resampled = jnp.any(ensemble.past != 0, axis=0)
    return Pass(
        ensemble.log_normalizers, log_weights, moves, resampled, log_island_weights
    )
