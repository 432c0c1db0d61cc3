"""Reasons to doubt a log Z."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import t as student_t

from ebm_ppl.energy.log_normalizer import flag_where
from ebm_ppl.normalizer.findings import Findings

# Largest share of the density beyond the range of floating point that is only added to
# the upper limit; more is flagged.
MAX_BEYOND = 0.02

# Walkers come within about a thousandth of their spread of a point; at this power of
# the distance, 13% of the mass lies closer.
MIN_ROOM = 0.3

MAX_KHAT = 0.7

MIN_ESS = 0.05

MIN_ACCEPTANCE = 0.1

# Smallest turnover (see Moves) of walkers that resample: one spread along the path.
MIN_TURNOVER = 1.0

# False alarm rates of the drift test for walkers at equilibrium: in each of mean |u|²
# and mean |u|, and in all tail shares together.
MAX_DRIFT_PROBABILITY = 0.003

MAX_SHIFT_PROBABILITY = 0.005

MORE_TEMPERATURES = (
    "take more temperatures (or budget=) or walkers, or a base nearer to the energy"
)


def flags_of_one_direction(findings: Findings) -> tuple[str, ...]:
    """Flags where only one direction was run, which cannot detect missing mass alone.

    Ẑ misses modes that no walker has found; 1/Ẑ misses those that the reverse pass did
    not start from.
    """
    if findings.reverse is None:
        return (
            "a forward pass has no upper limit, so log Z may be larger, or infinite: "
            "use method='bracket'.",
        )
    if findings.forward is None:
        return (
            "a reverse pass has no lower limit, so log Z may be smaller: use "
            "method='bracket'.",
        )
    return ()


def flags_of_walkers(findings: Findings) -> tuple[str, ...]:
    """Flags where walkers are not at equilibrium or miss part of the mass."""
    flags: tuple[str, ...] = ()

    if findings.drift is not None:
        drifts, limits = _drifts(
            findings.drift, MAX_DRIFT_PROBABILITY, MAX_SHIFT_PROBABILITY
        )
        flags += flag_where(
            np.any(~(drifts <= limits), axis=0),
            f"walkers still drift at the energy itself (t = {worst_of(drifts):.1f} over "
            "islands){where}, so they had not reached equilibrium: take more "
            "temperatures, a base nearer to the "
            "energy, or other samples=.",
        )

    if findings.unreached is not None:
        share = 100.0 * worst_of(findings.unreached)
        flags += flag_where(
            ~(findings.unreached <= 0.0),
            f"{share:.{0 if share >= 1 else 1}f}% of the data rows lie where annealing "
            "from the base does not "
            "lead{where}, in repeated tries: a mode is missing from log Z. Take a base "
            "(or start=) that covers the "
            "data, or more temperatures.",
        )

    if findings.beyond is not None:
        share = 100.0 * worst_of(findings.beyond)
        flags += flag_where(
            ~(findings.beyond <= MAX_BEYOND),
            f"about {share:.0f}% of the density lie beyond the last numbers that "
            "floating point has at the support's "
            "ends{where}, or the integral diverges there: make sure that it converges, "
            "write the energy of the "
            "logarithm (or logit) of x over the whole line instead, or run in double "
            "precision "
            "(jax.config.update('jax_enable_x64', True)).",
        )

    if findings.room is not None:
        flags += flag_where(
            findings.room < MIN_ROOM,
            "the energy falls without end towards a point{where}, so fast that the "
            "integral diverges there, or has "
            "mass where walkers do not come (mass within r of it goes as r to the "
            "power of "
            f"{float(np.min(np.asarray(findings.room))):.2g}): bound the energy from "
            "below.",
        )

    return flags


def _drifts(drift: Array, means: float, shares: float) -> tuple[np.ndarray, np.ndarray]:
    """Absolute t statistics over islands, and their limits.

    The statistics are ``(num_statistics, *batch)``.  The limits are
    Bonferroni-corrected for all batch elements: each of the first two statistics
    exceeds its limit by chance with probability at most ``means``, and any of the
    others with at most ``shares``.
    """
    num_others = max(drift.shape[1] - 2, 1)
    probability = np.array([means] * 2 + [shares / num_others] * (drift.shape[1] - 2))
    limits = student_t.ppf(
        1.0 - 0.5 * probability / max(drift[0, 0].size, 1), drift.shape[0] - 1
    )
    drifts = np.abs(np.asarray(_t_statistic(drift)))
    return drifts, limits.reshape(-1, *(1,) * (drifts.ndim - 1))


def is_drift_suspicious(drift: Array, probability: float) -> bool:
    """Whether more moves are needed to tell if walkers drift.

    Args:
        drift: As in :class:`Findings`.
        probability: False alarm rate at equilibrium of each of three tests: of mean
            ``|u|²``, of mean ``|u|``, and of all tail shares together.
    """
    drifts, limits = _drifts(drift, probability, probability)
    return bool(np.any(~(drifts <= limits)))


def flags_of_weights(
    value: Array,
    width: Array,
    what: str,
    ess: Array,
    khat: Array,
    acceptance: Array,
    tolerance: float,
    remedy: str,
) -> tuple[str, ...]:
    """Flags of the bracket's width, of k̂ and of the effective sample size."""
    limits = flag_where(
        ~jnp.isfinite(value), "log Z is not finite{where}: check that the energy is."
    ) + flag_where(
        ~(width <= tolerance),
        f"the {what} is {worst_of(width):.2g} nats wide{{where}}, over the tolerance "
        f"of {tolerance:g}: {remedy}.",
    )

    weights = flag_where(
        ~(khat <= MAX_KHAT),
        f"Pareto k̂ = {worst_of(khat):.2f} > {MAX_KHAT}{{where}}, so a few walkers "
        f"carry the estimate: {remedy}.",
    ) + flag_where(
        ~(ess >= MIN_ESS),
        f"the effective sample size is {float(jnp.min(ess)):.1%} of the "
        f"walkers{{where}}: {remedy}.",
    )

    moves = flag_where(
        ~(acceptance >= MIN_ACCEPTANCE),
        f"only {float(jnp.min(acceptance)):.1%} of the moves were accepted{{where}}: "
        "lower the kernel's step_size, or let it adapt (MALA()).",
    )
    return limits + weights + moves


@jax.jit
def _t_statistic(values: Array) -> Array:
    """Mean over islands divided by its standard error; 0 where nothing moves."""
    error = jnp.std(values, axis=0, ddof=1) / jnp.sqrt(values.shape[0])
    return jnp.where(error == 0, 0.0, jnp.mean(values, axis=0) / error)


def largest_of(values: Array) -> float:
    """The number of largest absolute value."""
    flat = np.ravel(np.asarray(values))
    return float(flat[np.argmax(np.abs(flat))])


def worst_of(values: Array | np.ndarray) -> float:
    """The largest number."""
    return float(np.max(np.asarray(values)))
