"""Certificates of log Z at draws of parameters."""

import jax.numpy as jnp
from scipy.stats import t as student_t

from ebm_ppl.energy.log_normalizer import SiteCertificate
from ebm_ppl.normalizer.certify import with_reference
from ebm_ppl.normalizer.findings import Bridge, Findings
from ebm_ppl.normalizer.flags import MORE_TEMPERATURES, flags_of_weights
from ebm_ppl.smc.passes import LIMIT_LEVEL
from ebm_ppl.smc.weights import jackknife_log_mean_exp


def certify_bridges(
    reference: SiteCertificate, bridge: Bridge, tolerance: float
) -> SiteCertificate:
    """Log Z at every draw: the reference's plus the log ratio, with both errors."""
    # Estimate
    ratios = jnp.moveaxis(bridge.log_ratios, 1, 0)
    # Ẑ_c and R_c come from the same walkers: each island's product Ẑ_c R_c is unbiased,
    # and the estimate is the mean of these products.
    at_reference = (reference.log_normalizers - reference.estimate)[:, None]
    islands = at_reference + ratios
    quantile = float(student_t.ppf(LIMIT_LEVEL, islands.shape[0] - 1))
    estimate, stderr = jackknife_log_mean_exp(islands)
    ratio, ratio_stderr = jackknife_log_mean_exp(
        ratios, jnp.broadcast_to(at_reference, ratios.shape)
    )

    # Limits
    lower = estimate - quantile * stderr
    upper = reference.upper - reference.estimate + ratio + quantile * ratio_stderr
    lower, upper = jnp.minimum(lower, upper), jnp.maximum(upper, lower)
    one_sided = bool(jnp.any(jnp.isinf(reference.upper)))
    width = 2.0 * (estimate - lower) if one_sided else upper - lower
    what = "95% interval" if one_sided else "bracket"

    # Flags
    ess, khat = (
        jnp.minimum(bridge.ess, reference.ess),
        jnp.maximum(bridge.khat, reference.khat),
    )
    flags = flags_of_weights(
        estimate + stderr,
        width,
        what,
        ess,
        khat,
        bridge.acceptance,
        tolerance,
        MORE_TEMPERATURES,
    )

    # The reference's flags hold at every draw.
    inherited = tuple(f"at the draw in the middle: {flag}" for flag in reference.flags)
    certificate = SiteCertificate(
        estimate, stderr, lower, upper, ess, khat, islands, inherited + flags
    )

    total = bridge.level - reference.estimate
    return with_reference(
        certificate, Findings(reference=total, magnitude=jnp.abs(total))
    )
