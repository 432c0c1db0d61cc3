"""What is known about log Z: an estimate, limits on either side, and every reason to doubt them."""

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

# Each limit is one-sided at 97.5%, so that both hold together with 95%.
LIMIT_LEVEL = 0.975
MAX_KHAT = 0.7
MIN_ESS = 0.05
MIN_ACCEPTANCE = 0.1
# How far walkers that resample must move along the path, in units of their own spread.
MIN_TURNOVER = 1.0
# How often a site whose walkers are at equilibrium may be said to drift in |u|², and in
# |u|; and in the tails' shares.
MAX_DRIFT_PROBABILITY = 0.003
MAX_SHIFT_PROBABILITY = 0.005
# How often, at most, such walkers are given more moves to be sure.
MAX_SUSPICION = 0.05
# The share of a density beyond floating point's range that is added to the upper limit;
# more of it is refused.
MAX_BEYOND = 0.02
# Walkers come as near to a point as a thousandth of their spread, say: mass within it
# is 13% at this power of distance.
MIN_ROOM = 0.3
# Rounding, in nats, that is added to the errors: more of it is refused where it rivals
# the sampling error.
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
        log_weights: The terms that they average, past resamplings included,
            ``(num_chains, num_walkers, *batch)``.
        moves: What its moves amounted to.
        resampled: Whether any island resampled on the way, ``batch``.
        log_island_weights: Log weights of the islands, like ``log_ratios``; None where
            they count equally.  Islands that start from a forward pass's endpoints
            weigh by its Ẑ_c: E[Ẑ_c f(x_c)] = Z E[f] holds for each.
    """

    log_ratios: Array
    log_weights: Array
    moves: Moves
    resampled: Array
    log_island_weights: Array | None = None

    def limit(self) -> tuple[Array, Array, Array]:
        """Jackknifed log mean, its standard error, and its lower limit at :data:`LIMIT_LEVEL`."""
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
    """What an ensemble at the end of a ladder says."""
    log_weights = ensemble.log_normalizer[:, None] + ensemble.log_weight
    resampled = jnp.any(ensemble.log_normalizer != 0, axis=0)
    return Pass(
        ensemble.log_normalizers, log_weights, moves, resampled, log_island_weights
    )


class Bridge(NamedTuple):
    """Steps from reference parameters to draws of them; every array leads with the
    draws' axis.

    Attributes:
        log_ratios: Every island's log Ẑ_θ/Z_reference, ``(num_draws, num_chains,
            *batch)``.
        ess: ESS fraction of the terms, ``(num_draws, *batch)``.
        khat: Their Pareto k̂.
        acceptance: Mean acceptance.
        level: What was subtracted from the difference of the energies before anything
            was summed, like ``ess``.
    """

    log_ratios: Array
    ess: Array
    khat: Array
    acceptance: Array
    level: Array


class Evidence(NamedTuple):
    """All that :func:`certify` looks at, for one energy site.

    Attributes:
        forward: Annealing from the start to the energy, if it was run.
        reverse: And back, if it was run.
        drift: What changed in every island while the reverse pass's starting points
            moved on under the energy itself, ``(num_chains, num_statistics, *batch)``:
            mean ``|u|²`` and ``|u|``, then shares of walkers in tails.
        unreached: Share of data rows that forward annealing does not reach, confirmed
            by repeats, ``batch``.
        beyond: Share of the density beyond the range of floating point, ``batch``.
        reference: What was subtracted from the energy before anything was summed,
            ``batch``.
        magnitude: How large the numbers are that the energy is computed as, ``batch``.
        room: The dimension less the nats that U falls per e-fold of distance to its
            lowest points, ``batch``: mass near such a point goes as distance to this
            power.
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
    """log Z per energy site, what bounds it, and why not to believe it.

    Every field but ``method``, ``num_evaluations``, ``params`` and ``batch_ndims`` is a
    dict by site name; arrays have the site's batch shape, after the axes of the draws
    where parameters were given as draws.

    Attributes:
        estimate: log Z.  Jackknifed log-mean-exp over islands, each of whose Ẑ is
            unbiased (for ``reverse``, of 1/Z).
        stderr: Its jackknife standard error; for exact methods 0, or what rounding may
            take where that is over 1e-5.
        lower: One-sided 97.5% limit from forward annealing; −inf where none was run.
        upper: One-sided 97.5% limit from reverse annealing, as good as the model draws
            that it started from; +inf where none was run.  Where it is under the
            estimate it stands back to what the forward pass allows for; where the two
            limits cross, both stand back to what either pass does.
        ess: Effective sample size of the weights over their number, the smaller of the
            two directions'.
        khat: Pareto k̂ of the weights, the larger of the two directions'.
        log_normalizers: Islands' log Ẑ_c, with a leading axis ``num_chains``; of length
            1 for exact methods.
        flags: Reasons why the numbers may be wrong; empty where they are certified.
        method: How log Z was found.
        num_evaluations: Energy evaluations (with their gradients, where walkers move).
        params: The (constrained) parameters that it belongs to.
        batch_ndims: Number of leading axes of parameter draws; 0 for one point.
        fingerprints: E and log base (of the first draw) at points that cover the base,
            the walkers and the data, by which other energies are recognised and
            refused; empty where nothing was evaluated.
        conditions: Energy sites whose values, as the model had them, each site's log Z
            depends on.
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
        """Log Z in closed form, by site name, and the parameters that it belongs to."""
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
        """``log Ẑ − log 20`` by site, Ẑ the islands' plain mean: below log Z with 95%,
        by Markov's inequality alone.

        −inf where log Z rests on a reverse pass, which says nothing of the kind; log Z
        itself where it is exact.
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
        """Two-sided Student-t interval on (number of islands − 1) degrees of freedom, by site."""
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
        """``params`` with log Z beside them, under ``<site>_log_normalizer``: posterior
        samples for NumPyro.

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
                "it all the same, give the number "
                "itself (log_normalizer=log_z.estimate[site]) or "
                "allow_uncertified=True where that is offered."
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
                f"{float(np.max(self.khat[name])):.2f} "
                f"({self.method}): {verdict}"
            )
            yield from (f"  - {flag}" for flag in self.flags[name])


def log_normalizer_site(name: str) -> str:
    """Name of the parameter that holds an energy site's log Z in a normalised model."""
    return f"{name}_log_normalizer"


def exact_certificate(
    estimate: Array, error: ArrayLike, flags: tuple[str, ...]
) -> SiteCertificate:
    """Log Z by quadrature or enumeration: no sampling error, and, where rounding matters, what that may amount to."""
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
    """Flags of exact values found under a trace, where NaN stands for any doubt."""
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
    """Estimate log Z, bound it, and flag whatever speaks against it.

    Args:
        evidence: At least one direction.
        tolerance: Widest acceptable bracket (or, with one direction only, two-sided 95%
            interval), in nats.
        remedy: What a user should do about noisy weights.
        is_running: Whether it is a fit's running value, of which the caller says that
            one direction is not enough.
    """
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
    ess = jnp.min(jnp.stack([p.ess() for p in passes]), axis=0)
    khat = jnp.max(jnp.stack([p.khat() for p in passes]), axis=0)
    acceptance = jnp.min(jnp.stack([p.moves.acceptance for p in passes]), axis=0)

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
        # Limits that cross contradict each other: fall back on all that either pass
        # allows for.
        lowest, highest = (
            jnp.minimum(lower, 2 * -inverse - upper),
            jnp.maximum(upper, 2 * estimate - lower),
        )
        lower, upper = (
            jnp.where(crossed, lowest, lower),
            jnp.where(crossed, highest, upper),
        )
        # Nor is an upper limit under the forward estimate to be believed further than
        # that pass itself.
        upper = jnp.where(upper < estimate, 2 * estimate - lower, upper)
        width, what = upper - lower, "bracket"

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
    """Ẑ misses what no walker has found, and 1/Ẑ what the reverse pass did not start from: one cannot tell alone."""
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
    """Whether walkers are the energy's own, and everywhere where its mass is."""
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
    """What was subtracted from the energy is put back, and what floating point cannot tell enters the limits."""
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
            f"rounded by {_worst(rounding):.2g} "
            f"nats{{where}}, beside a standard error of {_worst(stderr):.2g}: subtract "
            "a constant of about "
            f"{_largest(evidence.reference):.6g} from the energy, or run in double "
            "precision "
            "(jax.config.update('jax_enable_x64', True)).",
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
    """How far rounding of the energy's values may move log Z, in nats."""
    return (
        jnp.zeros_like(like)
        if evidence.magnitude is None
        else jnp.finfo(like.dtype).eps * evidence.magnitude
    )


def _drifts(drift: Array, means: float, shares: float) -> tuple[Array, Array]:
    """Sizes of t statistics over islands, ``(num_statistics, *batch)``, and their
    limits, for all elements together.

    Either of the first two may be passed by chance with probability ``means``, any of
    the others with ``shares``.
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


def is_drift_suspicious(drift: Array) -> bool:
    """Whether more moves should show if walkers drift; ``drift`` as in :class:`Evidence`."""
    drifts, limits = _drifts(drift, MAX_SUSPICION / 2, MAX_SUSPICION / 2)
    return bool(jnp.any(~(drifts <= limits)))


def certify_bridges(
    reference: SiteCertificate, bridge: Bridge, tolerance: float
) -> SiteCertificate:
    """Log Z at every draw: the reference's, plus the ratio, with both uncertainties."""
    ratios = jnp.moveaxis(bridge.log_ratios, 1, 0)
    # Both come from the same walkers: each island's product Ẑ_c R_c is unbiased, and
    # their mean is what is estimated.
    at_reference = (reference.log_normalizers - reference.estimate)[:, None]
    islands = at_reference + ratios
    quantile = float(student_t.ppf(LIMIT_LEVEL, islands.shape[0] - 1))
    estimate, stderr = jackknife_log_mean_exp(islands)
    ratio, ratio_stderr = jackknife_log_mean_exp(
        ratios, jnp.broadcast_to(at_reference, ratios.shape)
    )

    lower = estimate - quantile * stderr
    upper = reference.upper - reference.estimate + ratio + quantile * ratio_stderr
    lower, upper = jnp.minimum(lower, upper), jnp.maximum(upper, lower)
    one_sided = bool(jnp.any(jnp.isinf(reference.upper)))
    width = 2.0 * (estimate - lower) if one_sided else upper - lower
    what = "95% interval" if one_sided else "bracket"
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
    # What is wrong at the reference is wrong everywhere.
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
    """Flags where a draw's log Z from a bridge is not what annealing finds there, or
    where that is flagged.

    Args:
        bridged: Of all draws.
        index: Which draw was annealed on its own.
        alone: What that found.
        num_comparisons: How many draws are compared; all together are flagged by chance
            as rarely as one would be.
        how: In what way the draw is out of the ordinary.
    """
    estimate, stderr = bridged.estimate[index], bridged.stderr[index]
    gap, error = jnp.abs(estimate - alone.estimate), jnp.hypot(stderr, alone.stderr)
    probability = MAX_DRIFT_PROBABILITY / (num_comparisons * max(gap.size, 1))
    limit = float(
        student_t.ppf(1.0 - 0.5 * probability, alone.log_normalizers.shape[0] - 1)
    )
    worst = int(np.argmax(np.ravel(np.asarray(gap / error))))
    found, told = (
        float(np.ravel(np.asarray(values))[worst])
        for values in (alone.estimate, estimate)
    )
    where = f"at draw {index} ({how})"
    flags = _flag(
        ~(gap <= limit * error),
        f"{where} annealing finds log Z = {found:.3f}, and the bridge from the draw in "
        f"the middle {told:.3f}{{where}}: "
        "the walkers of the draw in the middle miss part of the energy there. Estimate "
        "log Z at such draws on their "
        "own (without batch_ndims), in groups of draws that are alike, or fit closer "
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
            f"the {what} is {_worst(width):.2g} nats wide{{where}}, over the tolerance "
            f"of {tolerance:g}: {remedy}.",
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
            f"accepted{{where}}: lower the kernel's step_size, "
            "or let it adapt (MALA()).",
        )
    )


@jax.jit
def _t_statistic(values: Array) -> Array:
    """Mean over islands by its standard error; 0 where nothing moves."""
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
