"""Certificates of log Z: an estimate, lower and upper limits, and warning flags."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy.stats import t as student_t

from ebm_ppl.annealing import Ensemble, Moves
from ebm_ppl.errors import UncertifiedNormalizerError
from ebm_ppl.fingerprint import Fingerprint
from ebm_ppl.weights import (
    ess_fraction,
    jackknife_log_mean_exp,
    log_mean_exp,
    pareto_khat,
)

# Each limit is one-sided at 97.5%, so that both hold jointly with probability 95%.
LIMIT_LEVEL = 0.975
MAX_KHAT = 0.7
MIN_ESS = 0.05
MIN_ACCEPTANCE = 0.1
# Smallest turnover (see Moves) of walkers that resample: one spread along the path.
MIN_TURNOVER = 1.0
# False alarm rates of the drift test for walkers at equilibrium: in each of mean |u|²
# and mean |u|, and in all tail shares together.
MAX_DRIFT_PROBABILITY = 0.003
MAX_SHIFT_PROBABILITY = 0.005
# Largest share of the density beyond the range of floating point that is only added to
# the upper limit; more is flagged.
MAX_BEYOND = 0.02
# Walkers come within about a thousandth of their spread of a point; at this power of
# the distance, 13% of the mass lies closer.
MIN_ROOM = 0.3
# Rounding error, in nats, that is only added to the standard error; more is flagged
# where it is also over half of the sampling error.
MAX_ROUNDING = 1e-3
EXACT_METHODS = ("quadrature", "enumeration", "closed form")
MORE_TEMPERATURES = (
    "take more temperatures (or budget=) or walkers, or a base nearer to the energy"
)


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
    log_weights = ensemble.log_normalizer[:, None] + ensemble.log_weight
    resampled = jnp.any(ensemble.log_normalizer != 0, axis=0)
    return Pass(
        ensemble.log_normalizers, log_weights, moves, resampled, log_island_weights
    )


class Bridge(NamedTuple):
    """Annealing from reference parameters to parameter draws.

    Every array's leading axis is that of the draws.

    Attributes:
        log_ratios: Every island's log Ẑ_θ/Z_reference, ``(num_draws, num_chains,
            *batch)``.
        ess: ESS fraction of the terms, ``(num_draws, *batch)``.
        khat: Pareto k̂ of the terms, same shape.
        acceptance: Mean acceptance, same shape.
        level: Constant subtracted from the difference of the energies before summation,
            same shape.
    """

    log_ratios: Array
    ess: Array
    khat: Array
    acceptance: Array
    level: Array


class Evidence(NamedTuple):
    """Input of :func:`certify` for one energy site.

    Attributes:
        forward: Annealing from the start to the energy, if it was run.
        reverse: Annealing from the energy to the start, if it was run.
        drift: Changes in every island while the reverse pass's starting points moved
            under the energy itself, ``(num_chains, num_statistics, *batch)``: those of
            mean ``|u|²`` and ``|u|``, then those of the shares of walkers in tails.
        unreached: Share of data rows that forward annealing does not reach, confirmed
            by repeats, ``batch``.
        beyond: Share of the density beyond the range of floating point, ``batch``.
        reference: Constant subtracted from the energy before summation, ``batch``.
        magnitude: Absolute size of the energy's values, which sets their rounding
            error, ``batch``.
        room: The dimension minus the nats that U falls per e-fold of distance to its
            lowest points, ``batch``: the mass within r of such a point scales as r to
            this power.
    """

    forward: Pass | None = None
    reverse: Pass | None = None
    drift: Array | None = None
    unreached: Array | None = None
    beyond: Array | None = None
    reference: Array | None = None
    magnitude: Array | None = None
    room: Array | None = None


class SiteCertificate(NamedTuple):
    """Fields of :class:`LogNormalizer` for one site."""

    estimate: Array
    stderr: Array
    lower: Array
    upper: Array
    ess: Array
    khat: Array
    log_normalizers: Array
    flags: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LogNormalizer:
    """log Z per energy site, with its limits and warning flags.

    Every field but ``method``, ``num_evaluations``, ``params`` and ``batch_ndims`` is a
    dict by site name; arrays have the site's batch shape, after the axes of the draws
    where parameters were given as draws.

    Attributes:
        estimate: log Z.  Jackknifed log-mean-exp over islands, each of whose Ẑ is
            unbiased (for ``reverse``, of 1/Z).
        stderr: Its jackknife standard error; for exact methods 0, or the rounding error
            where that is over 1e-5.
        lower: One-sided 97.5% limit from forward annealing; −inf where none was run.
        upper: One-sided 97.5% limit from reverse annealing, which holds if the draws
            that it started from are the model's; +inf where none was run.  An upper
            limit under the estimate is raised to the forward pass's own; where the two
            limits cross, both are widened to cover the limits of either pass.
        ess: Effective sample size of the weights over their number, the smaller of the
            two directions'.
        khat: Pareto k̂ of the weights, the larger of the two directions'.
        log_normalizers: Islands' log Ẑ_c, with a leading axis ``num_chains``; of length
            1 for exact methods.
        flags: Reasons why the numbers may be wrong; empty where they are certified.
        method: How log Z was found.
        num_evaluations: Energy evaluations (with their gradients, where walkers move).
        params: The constrained parameters at which log Z holds.
        batch_ndims: Number of leading axes of parameter draws; 0 for one point.
        fingerprints: E and log base (of the first draw) at points that cover the base,
            the walkers and the data, by which other energies are recognised and
            refused; empty where nothing was evaluated.
        conditions: Energy sites whose values in the model each site's log Z depends on.
    """

    estimate: dict[str, Array]
    stderr: dict[str, Array]
    lower: dict[str, Array]
    upper: dict[str, Array]
    ess: dict[str, Array]
    khat: dict[str, Array]
    log_normalizers: dict[str, Array]
    flags: dict[str, tuple[str, ...]]
    method: str
    num_evaluations: int = 0
    params: dict[str, Any] = field(default_factory=dict, repr=False)
    batch_ndims: int = 0
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict, repr=False)
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_sites(
        cls, sites: dict[str, SiteCertificate], method: str, **options: Any
    ) -> "LogNormalizer":
        """Collect sites' certificates."""
        columns: dict[str, Any] = {
            name: {
                site: getattr(certificate, name) for site, certificate in sites.items()
            }
            for name in SiteCertificate._fields
        }
        return cls(**columns, method=method, **options)

    @classmethod
    def exact(
        cls, estimate: Mapping[str, ArrayLike], params: Mapping[str, Any] | None = None
    ) -> "LogNormalizer":
        """Log Z in closed form, by site name, and the parameters at which it holds."""
        arrays = {name: jnp.asarray(value, float) for name, value in estimate.items()}
        sites = {
            name: exact_certificate(value, 0.0, flags_of_exact(value))
            for name, value in arrays.items()
        }
        return cls.from_sites(
            sites, "closed form", params={} if params is None else dict(params)
        )

    @property
    def is_certified(self) -> bool:
        """Whether no site has a flag."""
        return not any(self.flags.values())

    @property
    def markov_lower(self) -> dict[str, Array]:
        """Lower limit ``log Ẑ − log 20`` by site, from Markov's inequality alone.

        Ẑ is the islands' plain mean, so the limit holds with probability 95%.  It is
        −inf for the reverse pass, which gives no such limit, and log Z itself for exact
        methods.
        """
        if self.method in EXACT_METHODS:
            return dict(self.lower)

        if self.method == "reverse":
            return {
                name: jnp.full_like(value, -jnp.inf)
                for name, value in self.estimate.items()
            }

        return {
            name: log_mean_exp(islands, axis=0) - jnp.log(20.0)
            for name, islands in self.log_normalizers.items()
        }

    def interval(self, level: float = 0.9) -> dict[str, tuple[Array, Array]]:
        """Two-sided Student-t interval by site.

        Its degrees of freedom are the number of islands − 1.
        """
        out = {}
        for name, estimate in self.estimate.items():
            degrees = self.log_normalizers[name].shape[0] - 1
            quantile = (
                float(student_t.ppf(0.5 + level / 2, degrees)) if degrees else 0.0
            )
            half = quantile * self.stderr[name]
            out[name] = (estimate - half, estimate + half)
        return out

    @property
    def samples(self) -> dict[str, Any]:
        """Posterior samples for NumPyro: ``params``, and log Z of every site.

        The key of log Z is ``<site>_log_normalizer``.

        ``numpyro.infer.log_likelihood(normalized(model, log_z), log_z.samples, ...)``
        then has one log Z per draw.
        """
        values = {
            log_normalizer_site(name): value for name, value in self.estimate.items()
        }
        clash = sorted(set(values) & set(self.params))
        if clash:
            raise ValueError(
                f"The model has sites {clash}, names that log Z is given under; rename "
                "them in the model."
            )
        return self.params | values

    def require_certified(self) -> None:
        """Raise where a site has a flag.

        Raises:
            UncertifiedNormalizerError: The message holds every flag.
        """
        if not self.is_certified:
            reasons = "; ".join(
                f"site '{name}': {flag}"
                for name, flags in self.flags.items()
                for flag in flags
            )
            raise UncertifiedNormalizerError(
                f"log Z by method '{self.method}' is not certified: {reasons} To use "
                "it all the same, give the number itself "
                "(log_normalizer=log_z.estimate[site]) or allow_uncertified=True "
                "where that is offered."
            )

    def __str__(self) -> str:
        """One line per site, and one per flag."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, others in self.conditions.items():
            if others:
                given = ", ".join(f"'{other}'" for other in others)
                yield f"{name}: log Z at the model's present value of {given}"

        for name, estimate in self.estimate.items():
            verdict = "certified" if not self.flags[name] else "NOT certified"
            if self.method in EXACT_METHODS:
                error = float(np.max(self.stderr[name]))
                rounded = f" up to {error:.1g}" if error > 0 else ""
                yield (
                    f"{name}: log Z = {np.asarray(estimate)}, exact{rounded} "
                    f"({self.method}): {verdict}"
                )
                yield from (f"  - {flag}" for flag in self.flags[name])
                continue

            if np.ndim(estimate):
                shape = " x ".join(map(str, np.shape(estimate)))
                head = (
                    f"{name}: {shape} values of log Z, standard error at most "
                    f"{np.max(self.stderr[name]):.3g}"
                )
            else:
                head = (
                    f"{name}: log Z = {float(estimate):.4f} ± "
                    f"{float(self.stderr[name]):.4f}"
                )
                head += (
                    f", bracket [{float(self.lower[name]):.4f}, "
                    f"{float(self.upper[name]):.4f}]"
                )

            yield (
                f"{head}, ESS {float(np.min(self.ess[name])):.2f}, k̂ "
                f"{float(np.max(self.khat[name])):.2f} ({self.method}): {verdict}"
            )
            yield from (f"  - {flag}" for flag in self.flags[name])


def log_normalizer_site(name: str) -> str:
    """Name of the parameter that holds an energy site's log Z in a normalised model."""
    return f"{name}_log_normalizer"


def exact_certificate(
    estimate: Array, error: ArrayLike, flags: tuple[str, ...]
) -> SiteCertificate:
    """Certificate of an exact log Z, whose only error is rounding."""
    zeros = jnp.zeros_like(estimate)
    stderr = zeros + error
    lower, upper = estimate - 2 * stderr, estimate + 2 * stderr
    return SiteCertificate(
        estimate,
        stderr,
        lower,
        upper,
        zeros + 1.0,
        zeros - jnp.inf,
        estimate[None],
        flags=flags,
    )


def flags_of_exact(estimate: Array) -> tuple[str, ...]:
    """Flags of exact values found under a trace, where NaN marks any doubt."""
    return _flag(
        ~jnp.isfinite(estimate),
        "log Z is not a finite number{where}: check the energy; for quadrature take "
        "more num_points, or a base nearer "
        "to the energy.",
    )


def certify(
    evidence: Evidence,
    tolerance: float,
    remedy: str = MORE_TEMPERATURES,
    *,
    is_running: bool = False,
) -> SiteCertificate:
    """Estimate log Z, bound it, and flag every reason to doubt it.

    Args:
        evidence: At least one of its two passes.
        tolerance: Widest acceptable bracket (or, with one direction only, two-sided 95%
            interval), in nats.
        remedy: What a user should do about noisy weights.
        is_running: Whether this is the running value of a fit, whose caller itself
            reports that one direction is not enough.
    """
    # Limits
    forward, reverse = evidence.forward, evidence.reverse
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
            - 2 * _rounding(evidence, stderr)
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
    flags = _flags_of_weights(
        estimate + stderr, width, what, ess, khat, acceptance, tolerance, remedy
    )

    stuck = jnp.stack(
        [p.resampled & ~(p.moves.turnover >= MIN_TURNOVER) for p in passes]
    )
    flags += _flag(
        jnp.any(stuck, axis=0) & (acceptance >= MIN_ACCEPTANCE),
        "resampled walkers hardly moved{where}, so their copies are counted as if they "
        "were independent and neither "
        "error nor k̂ can be read: take larger steps (or let them adapt, MALA()), more "
        "temperatures or "
        "num_kernel_steps.",
    )

    flags += _flag(
        crossing > 0,
        "the forward pass's lower limit lies above the reverse pass's upper "
        "one{where}: the draws that the reverse "
        "pass started from are not the model's. Take more temperatures, or other "
        "samples=.",
    )

    flags += (
        () if is_running else _flags_of_one_direction(evidence)
    ) + _flags_of_walkers(evidence)

    certificate = SiteCertificate(
        estimate, stderr, lower, upper, ess, khat, log_normalizers, flags
    )
    return _in_full(certificate, evidence)


def _flags_of_one_direction(evidence: Evidence) -> tuple[str, ...]:
    """Flags where only one direction was run, which cannot detect missing mass alone.

    Ẑ misses modes that no walker has found; 1/Ẑ misses those that the reverse pass did
    not start from.
    """
    if evidence.reverse is None:
        return (
            "a forward pass has no upper limit, so log Z may be larger, or infinite: "
            "use method='bracket'.",
        )
    if evidence.forward is None:
        return (
            "a reverse pass has no lower limit, so log Z may be smaller: use "
            "method='bracket'.",
        )
    return ()


def _flags_of_walkers(evidence: Evidence) -> tuple[str, ...]:
    """Flags where walkers are not at equilibrium or miss part of the mass."""
    flags: tuple[str, ...] = ()

    if evidence.drift is not None:
        drifts, limits = _drifts(
            evidence.drift, MAX_DRIFT_PROBABILITY, MAX_SHIFT_PROBABILITY
        )
        flags += _flag(
            jnp.any(~(drifts <= limits), axis=0),
            f"walkers still drift at the energy itself (t = {_worst(drifts):.1f} over "
            "islands){where}, so they had not reached equilibrium: take more "
            "temperatures, a base nearer to the "
            "energy, or other samples=.",
        )

    if evidence.unreached is not None:
        share = 100.0 * _worst(evidence.unreached)
        flags += _flag(
            ~(evidence.unreached <= 0.0),
            f"{share:.{0 if share >= 1 else 1}f}% of the data rows lie where annealing "
            "from the base does not "
            "lead{where}, in repeated tries: a mode is missing from log Z. Take a base "
            "(or start=) that covers the "
            "data, or more temperatures.",
        )

    if evidence.beyond is not None:
        share = 100.0 * _worst(evidence.beyond)
        flags += _flag(
            ~(evidence.beyond <= MAX_BEYOND),
            f"about {share:.0f}% of the density lie beyond the last numbers that "
            "floating point has at the support's "
            "ends{where}, or the integral diverges there: make sure that it converges, "
            "write the energy of the "
            "logarithm (or logit) of x over the whole line instead, or run in double "
            "precision "
            "(jax.config.update('jax_enable_x64', True)).",
        )

    if evidence.room is not None:
        flags += _flag(
            evidence.room < MIN_ROOM,
            "the energy falls without end towards a point{where}, so fast that the "
            "integral diverges there, or has "
            "mass where walkers do not come (mass within r of it goes as r to the "
            "power of "
            f"{float(np.min(np.asarray(evidence.room))):.2g}): bound the energy from "
            "below.",
        )

    return flags


def _in_full(certificate: SiteCertificate, evidence: Evidence) -> SiteCertificate:
    """Add back the energy's reference, and widen the limits by floating-point error."""
    estimate, stderr, lower, upper = (
        certificate.estimate,
        certificate.stderr,
        certificate.lower,
        certificate.upper,
    )
    flags, log_normalizers = certificate.flags, certificate.log_normalizers

    if evidence.beyond is not None:
        upper = upper - jnp.log1p(-jnp.minimum(evidence.beyond, 0.99))

    if evidence.reference is not None and evidence.magnitude is not None:
        rounding = _rounding(evidence, estimate)
        flags += _flag(
            rounding > jnp.maximum(MAX_ROUNDING, 0.5 * stderr),
            f"the energy's values, of size {_worst(evidence.magnitude):.2g}, are "
            f"rounded by {_worst(rounding):.2g} nats{{where}}, beside a standard "
            f"error of {_worst(stderr):.2g}: subtract a constant of about "
            f"{_largest(evidence.reference):.6g} from the energy, or run in double "
            "precision (jax.config.update('jax_enable_x64', True)).",
        )

        stderr = jnp.hypot(stderr, rounding)
        estimate, lower, upper = (
            value - evidence.reference for value in (estimate, lower, upper)
        )
        lower, upper = lower - rounding, upper + rounding
        log_normalizers = log_normalizers - evidence.reference

    return certificate._replace(
        estimate=estimate,
        stderr=stderr,
        lower=lower,
        upper=upper,
        log_normalizers=log_normalizers,
        flags=flags,
    )


def _rounding(evidence: Evidence, like: Array) -> Array:
    """Largest error of log Z from rounding of the energy's values, in nats."""
    return (
        jnp.zeros_like(like)
        if evidence.magnitude is None
        else jnp.finfo(like.dtype).eps * evidence.magnitude
    )


def _drifts(drift: Array, means: float, shares: float) -> tuple[Array, Array]:
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
    drifts = jnp.abs(_t_statistic(drift))
    return drifts, jnp.asarray(limits, drifts.dtype).reshape(
        -1, *(1,) * (drifts.ndim - 1)
    )


def is_drift_suspicious(drift: Array, probability: float) -> bool:
    """Whether more moves are needed to tell if walkers drift.

    Args:
        drift: As in :class:`Evidence`.
        probability: False alarm rate at equilibrium of each of three tests: of mean
            ``|u|²``, of mean ``|u|``, and of all tail shares together.
    """
    drifts, limits = _drifts(drift, probability, probability)
    return bool(jnp.any(~(drifts <= limits)))


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
    flags = _flags_of_weights(
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
    return _in_full(certificate, Evidence(reference=total, magnitude=jnp.abs(total)))


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
    flags = _flag(
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


def _flags_of_weights(
    value: Array,
    width: Array,
    what: str,
    ess: Array,
    khat: Array,
    acceptance: Array,
    tolerance: float,
    remedy: str,
) -> tuple[str, ...]:
    return (
        _flag(
            ~jnp.isfinite(value),
            "log Z is not finite{where}: check that the energy is.",
        )
        + _flag(
            ~(width <= tolerance),
            f"the {what} is {_worst(width):.2g} nats wide{{where}}, over the "
            f"tolerance of {tolerance:g}: {remedy}.",
        )
        + _flag(
            ~(khat <= MAX_KHAT),
            f"Pareto k̂ = {_worst(khat):.2f} > {MAX_KHAT}{{where}}, so a few walkers "
            f"carry the estimate: {remedy}.",
        )
        + _flag(
            ~(ess >= MIN_ESS),
            f"the effective sample size is {float(jnp.min(ess)):.1%} of the "
            f"walkers{{where}}: {remedy}.",
        )
        + _flag(
            ~(acceptance >= MIN_ACCEPTANCE),
            f"only {float(jnp.min(acceptance)):.1%} of the moves were "
            f"accepted{{where}}: lower the kernel's step_size, or let it adapt "
            "(MALA()).",
        )
    )


@jax.jit
def _t_statistic(values: Array) -> Array:
    """Mean over islands divided by its standard error; 0 where nothing moves."""
    error = jnp.std(values, axis=0, ddof=1) / jnp.sqrt(values.shape[0])
    return jnp.where(error == 0, 0.0, jnp.mean(values, axis=0) / error)


def _largest(values: Array) -> float:
    flat = np.ravel(np.asarray(values))
    return float(flat[np.argmax(np.abs(flat))])


def _worst(values: Array) -> float:
    return float(np.max(np.asarray(values)))


def _flag(found: Array, message: str) -> tuple[str, ...]:
    count, size = int(np.sum(np.asarray(found))), int(np.prod(found.shape))
    if not count:
        return ()
    return (
        message.format(where="" if size == 1 else f" in {count} of {size} elements"),
    )
