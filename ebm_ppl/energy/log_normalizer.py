"""What is known about log Z: an estimate, limits on either side, and every reason to doubt them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy.stats import t as student_t

from ebm_ppl.energy.fingerprint import Fingerprint
from ebm_ppl.errors import UncertifiedNormalizerError
from ebm_ppl.smc.weights import log_mean_exp

# Values of log Z that are printed; of more, the range.
MAX_PRINTED = 8

EXACT_METHODS = ("quadrature", "enumeration", "closed form")


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
            For ``base`` and a bounded energy, both limits hold whatever the energy.
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
    def value(self) -> Array:
        """The certified log Z of the only site, of its shape; ``float`` gives it too.

        Raises:
            ValueError: There are several sites.
            UncertifiedNormalizerError: It has flags; ``estimate`` holds it all the same.
        """
        if len(self.estimate) != 1:
            raise ValueError(
                f"There is one log Z for each of the sites {sorted(self.estimate)}; "
                "take log_z.estimate[site]."
            )
        self.require_certified()
        (estimate,) = self.estimate.values()
        return estimate

    def __float__(self) -> float:
        """The certified log Z of the only site, a scalar."""
        return float(self.value)

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
            raise UncertifiedNormalizerError(
                f"log Z by method '{self.method}' is not certified: "
                f"{reasons_of(self.flags)} To use "
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

        for name in self.estimate:
            verdict = "certified" if not self.flags[name] else "NOT certified"
            yield f"{name}: {self._numbers(name)} ({self.method}): {verdict}"
            yield from (f"  - {flag}" for flag in self.flags[name])

    def _numbers(self, name: str) -> str:
        """The estimate, a summary of many, and what is known of its error."""
        estimate, stderr = np.asarray(self.estimate[name]), self.stderr[name]
        is_exact = self.method in EXACT_METHODS
        error = float(np.max(stderr))
        if estimate.size > MAX_PRINTED or (estimate.ndim and not is_exact):
            shape = " x ".join(map(str, estimate.shape))
            ends = (rounded(np.min(estimate)), rounded(np.max(estimate)))
            head = f"{shape} values of log Z from {ends[0]} to {ends[1]}"
            if not is_exact:
                head += f", standard error at most {error:.3g}"
        elif is_exact:
            head = f"log Z = {np.array2string(estimate + 0.0, precision=6)}"
        else:
            limits = rounded(self.lower[name]), rounded(self.upper[name])
            head = (
                f"log Z = {rounded(estimate)} ± {error:.4f}, "
                f"bracket [{limits[0]}, {limits[1]}]"
            )

        if is_exact:
            return f"{head}, exact" + (f" up to {error:.1g}" if error > 0 else "")
        khat = float(np.max(self.khat[name]))
        tail = "" if np.isnan(khat) else f", k̂ {khat:.2f}"
        return f"{head}, ESS {float(np.min(self.ess[name])):.2f}{tail}"


def reasons_of(flags: Mapping[str, tuple[str, ...]]) -> str:
    """Every flag with its site, in one sentence."""
    return "; ".join(
        f"site '{name}': {flag}" for name, found in flags.items() for flag in found
    )


def rounded(value: Any) -> str:
    """Four decimals; a zero has no sign."""
    return f"{round(float(value), 4) + 0.0:.4f}"


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
    return flag_where(
        ~jnp.isfinite(estimate),
        "log Z is not a finite number{where}: check the energy; for quadrature take "
        "more num_points, or a base nearer "
        "to the energy.",
    )


def flag_where(found: Array | np.ndarray, message: str) -> tuple[str, ...]:
    """The message, with how many elements it holds for; nothing where it holds for none."""
    count, size = int(np.sum(np.asarray(found))), int(np.prod(found.shape))
    if not count:
        return ()
    return (
        message.format(where="" if size == 1 else f" in {count} of {size} elements"),
    )
