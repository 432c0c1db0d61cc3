"""A certificate from findings: estimate, limits and flags."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import t as student_t

from ebm_ppl.energy.log_normalizer import SiteCertificate, flag_where
from ebm_ppl.energy.rounding import MAX_ERROR, not_normalized
from ebm_ppl.normalizer.findings import Findings
from ebm_ppl.normalizer.flags import (
    MAX_DRIFT_PROBABILITY,
    MIN_ACCEPTANCE,
    MIN_TURNOVER,
    MORE_TEMPERATURES,
    flags_of_one_direction,
    flags_of_walkers,
    flags_of_weights,
    largest_of,
    worst_of,
)

# Rounding error, in nats, that is only added to the standard error; more is flagged
# where it is also over half of the sampling error.
MAX_ROUNDING = 1e-3


def certify(
    findings: Findings,
    tolerance: float,
    remedy: str = MORE_TEMPERATURES,
    *,
    is_running: bool = False,
) -> SiteCertificate:
    """Estimate log Z, bound it, and flag every reason to doubt it.

    One body: estimate, limits and flags follow from one another.

    Args:
        findings: At least one of its two passes.
        tolerance: Widest acceptable bracket (or, with one direction only, two-sided 95%
            interval), in nats.
        remedy: What a user should do about noisy weights.
        is_running: Whether this is the running value of a fit, whose caller itself
            reports that one direction is not enough.
    """
    # Limits
    forward, reverse = findings.forward, findings.reverse
    passes = [p for p in (forward, reverse) if p is not None]
    shape = passes[0].log_ratios.shape[1:]
    lower, upper = jnp.full(shape, -jnp.inf), jnp.full(shape, jnp.inf)

    if reverse is not None:
        inverse, stderr, limit = reverse.limit()
        estimate, upper = -inverse, -limit
        log_normalizers = -reverse.log_ratios
    if forward is not None:
        estimate, stderr, lower = forward.limit()
        log_normalizers = forward.log_ratios

    # Diagnostics
    ess = jnp.min(jnp.stack([p.ess() for p in passes]), axis=0)
    khat = jnp.max(jnp.stack([p.khat() for p in passes]), axis=0)
    acceptance = jnp.min(jnp.stack([p.moves.acceptance for p in passes]), axis=0)

    # Width
    crossing = jnp.full(shape, -jnp.inf)
    if forward is None or reverse is None:
        width, what = (
            2.0 * jnp.abs(estimate - (lower if reverse is None else upper)),
            "95% interval",
        )
    else:
        crossed = lower > upper
        crossing = (
            lower
            - upper
            - jnp.hypot(stderr, reverse.limit()[1])
            - 2 * _rounding(findings, stderr)
        )

        # Limits that cross contradict each other: widen them to cover the interval of
        # either pass.
        lowest, highest = (
            jnp.minimum(lower, 2 * -inverse - upper),
            jnp.maximum(upper, 2 * estimate - lower),
        )
        lower, upper = (
            jnp.where(crossed, lowest, lower),
            jnp.where(crossed, highest, upper),
        )

        # An upper limit under the forward estimate is no better than the forward
        # pass's own.
        upper = jnp.where(upper < estimate, 2 * estimate - lower, upper)
        width, what = upper - lower, "bracket"

    # Flags
    flags = flags_of_weights(
        estimate + stderr, width, what, ess, khat, acceptance, tolerance, remedy
    )

    stuck = jnp.stack(
        [p.resampled & ~(p.moves.turnover >= MIN_TURNOVER) for p in passes]
    )
    flags += flag_where(
        jnp.any(stuck, axis=0) & (acceptance >= MIN_ACCEPTANCE),
        "resampled walkers hardly moved{where}, so their copies are counted as if they "
        "were independent and neither "
        "error nor k̂ can be read: take larger steps (or let them adapt, MALA()), more "
        "temperatures or "
        "num_kernel_steps.",
    )

    flags += flag_where(
        crossing > 0,
        "the forward pass's lower limit lies above the reverse pass's upper "
        "one{where}: the draws that the reverse "
        "pass started from are not the model's. Take more temperatures, or other "
        "samples=.",
    )

    flags += (
        () if is_running else flags_of_one_direction(findings)
    ) + flags_of_walkers(findings)

    certificate = SiteCertificate(
        estimate, stderr, lower, upper, ess, khat, log_normalizers, flags
    )
    return with_reference(certificate, findings)


def with_reference(certificate: SiteCertificate, findings: Findings) -> SiteCertificate:
    """Add back the energy's reference, and widen the limits by floating-point error."""
    estimate, stderr, lower, upper = (
        certificate.estimate,
        certificate.stderr,
        certificate.lower,
        certificate.upper,
    )
    flags, log_normalizers = certificate.flags, certificate.log_normalizers

    if findings.beyond is not None:
        upper = upper - jnp.log1p(-jnp.minimum(findings.beyond, 0.99))

    if findings.normalization is not None:
        off = jnp.abs(jnp.asarray(findings.normalization, stderr.dtype))
        flags += flag_where(
            off > jnp.maximum(MAX_ERROR, 0.5 * stderr),
            not_normalized(worst_of(off)),
        )

    if findings.reference is not None and findings.magnitude is not None:
        rounding = _rounding(findings, estimate)
        flags += flag_where(
            rounding > jnp.maximum(MAX_ROUNDING, 0.5 * stderr),
            f"the energy's values, of size {worst_of(findings.magnitude):.2g}, are "
            f"rounded by {worst_of(rounding):.2g} nats{{where}}, beside a standard "
            f"error of {worst_of(stderr):.2g}: subtract a constant of about "
            f"{largest_of(findings.reference):.6g} from the energy, or run in double "
            "precision (jax.config.update('jax_enable_x64', True)).",
        )

        stderr = jnp.hypot(stderr, rounding)
        estimate, lower, upper = (
            value - findings.reference for value in (estimate, lower, upper)
        )
        lower, upper = lower - rounding, upper + rounding
        log_normalizers = log_normalizers - findings.reference

    return certificate._replace(
        estimate=estimate,
        stderr=stderr,
        lower=lower,
        upper=upper,
        log_normalizers=log_normalizers,
        flags=flags,
    )


def _rounding(findings: Findings, like: Array) -> Array:
    """Largest error of log Z from rounding of the energy's values, in nats."""
    return (
        jnp.zeros_like(like)
        if findings.magnitude is None
        else jnp.finfo(like.dtype).eps * findings.magnitude
    )


def disagreement(
    bridged: SiteCertificate,
    index: int,
    alone: SiteCertificate,
    num_comparisons: int,
    how: str,
) -> tuple[str, ...]:
    """Flags where a draw's bridged log Z disagrees with annealing to that draw alone.

    The flags of the second certificate are included.

    Args:
        bridged: Certificate of all draws.
        index: Index of the draw that was annealed to on its own.
        alone: Certificate of that draw.
        num_comparisons: Number of draws compared; the test is corrected for it.
        how: Why this draw was chosen, for the message.
    """
    # Test
    estimate, stderr = bridged.estimate[index], bridged.stderr[index]
    gap, error = jnp.abs(estimate - alone.estimate), jnp.hypot(stderr, alone.stderr)
    probability = MAX_DRIFT_PROBABILITY / (num_comparisons * max(gap.size, 1))
    limit = float(
        student_t.ppf(1.0 - 0.5 * probability, alone.log_normalizers.shape[0] - 1)
    )

    # Message
    worst = int(np.argmax(np.ravel(np.asarray(gap / error))))
    found, told = (
        float(np.ravel(np.asarray(values))[worst])
        for values in (alone.estimate, estimate)
    )
    where = f"at draw {index} ({how})"
    flags = flag_where(
        ~(gap <= limit * error),
        f"{where} annealing finds log Z = {found:.3f}, and the bridge from the draw "
        f"in the middle {told:.3f}{{where}}: the walkers of the draw in the middle "
        "miss part of the energy there. Estimate log Z at such draws on their own "
        "(without batch_ndims), in groups of draws that are alike, or fit closer "
        "draws.",
    )

    return flags + tuple(
        f"{where}, annealed on its own: {flag}" for flag in alone.flags
    )
