"""log Z by draws of the start alone, with limits that hold before anything is run."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from scipy.special import rel_entr
from scipy.stats import t as student_t

from ebm_ppl.energy.bounded import bound_of
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import SiteCertificate, flag_where
from ebm_ppl.energy.rounding import MAX_ERROR, normalization_error, not_normalized
from ebm_ppl.energy.start import starting_distribution
from ebm_ppl.energy.weighted_draws import weighted_draws
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.flags import flags_of_weights, worst_of
from ebm_ppl.smc.passes import LIMIT_LEVEL
from ebm_ppl.smc.weights import (
    ess_fraction,
    jackknife_log_mean_exp,
    log_mean_exp,
    pareto_khat,
)

# Draws per island, at first and at most.
NUM_DRAWS = 2048
MAX_DRAWS = 2**16
MORE_DRAWS = "take more draws (num_walkers=), or a base nearer to the energy"


class Terms(NamedTuple):
    """What draws of the start say of one site.

    Attributes:
        islands: Their log Ẑ, ``(num_chains, num_points, *batch)``.
        ess: ESS fraction of all weights, ``(num_points, *batch)``.
        khat: Pareto k̂ of all weights, likewise.
        largest: Largest log weight, likewise.
    """

    islands: Array
    ess: Array
    khat: Array
    largest: Array


class ByBase(NamedTuple):
    """What :func:`certify_by_base` finds, by site.

    Attributes:
        sites: Certificates.
        largest: Largest log weight of any draw, ``(num_points, *batch)``.
        num_evaluations: Energy evaluations spent.
    """

    sites: dict[str, SiteCertificate]
    largest: dict[str, Array]
    num_evaluations: int


def certify_by_base(
    rng_key: Array,
    bound: BoundModel,
    energies: Mapping[str, EnergyDistribution],
    points: Params,
    num_chains: int,
    num_draws: int | None,
    tolerance: float,
) -> ByBase:
    """Certificates of every site, at parameters with one leading axis.

    Args:
        rng_key: A JAX PRNG key; draws are the same at all points.
        bound: The model.
        energies: Its energies.
        points: Parameters.
        num_chains: Islands.
        num_draws: Draws per island; None takes what a pilot says that the limits of a
            bounded energy need.
        tolerance: Widest limits, in nats, that are certified.
    """
    sites, largest, spent = {}, {}, 0
    for index, (name, energy) in enumerate(energies.items()):
        # Of E the bound is known, of U + log start it is not.
        limit = bound_of(energy.factors) if energy.start is None else None
        size = NUM_DRAWS if num_draws is None else num_draws
        key_first, key_second = random.split(random.fold_in(rng_key, index))
        terms = _terms(bound, points, key_first, name, (num_chains, size))
        spent += num_chains * size

        # Draws that chose their number are not used again.
        wanted = size
        if num_draws is None and limit is not None:
            mean = np.asarray(log_mean_exp(terms.islands, axis=0), float)
            wanted = _draws_for(mean, limit, num_chains, tolerance)
        if wanted > size:
            size = wanted
            terms = _terms(bound, points, key_second, name, (num_chains, size))
            spent += num_chains * size

        found = (
            _of_unbounded(terms, tolerance)
            if limit is None
            else _of_bounded(terms, tolerance, limit, size)
        )
        sites[name] = found._replace(flags=found.flags + _flags_of_base(energy, name))
        largest[name] = terms.largest
    return ByBase(sites, largest, spent * num_points_of(points))


def _flags_of_base(energy: EnergyDistribution, name: str) -> tuple[str, ...]:
    """Flags where the base's own density is not normalised in this precision."""
    off = np.max(np.abs(normalization_error(starting_distribution(energy, name))))
    return flag_where(off > MAX_ERROR, not_normalized(float(off)))


def num_points_of(points: Params) -> int:
    """Length of the leading axis of parameters; 1 where there are none."""
    leaves = jax.tree.leaves(points)
    return len(leaves[0]) if leaves else 1


def _draws_for(
    log_mean: np.ndarray, limit: float, num_chains: int, tolerance: float
) -> int:
    """Draws per island after which limits stand within half of the tolerance."""
    size = NUM_DRAWS
    while size < MAX_DRAWS:
        lower, upper = chernoff_limits(log_mean, limit, num_chains * size)
        if not np.any(upper - lower > 0.5 * tolerance):
            break
        size *= 2
    return size


def first_of(sites: Mapping[str, SiteCertificate]) -> dict[str, SiteCertificate]:
    """The certificates at the first of the points."""
    return {
        name: SiteCertificate(
            site.estimate[0],
            site.stderr[0],
            site.lower[0],
            site.upper[0],
            site.ess[0],
            site.khat[0],
            site.log_normalizers[:, 0],
            site.flags,
        )
        for name, site in sites.items()
    }


@partial(jax.jit, static_argnames=("name", "shape"))
def _terms(
    bound: BoundModel, points: Params, rng_key: Array, name: str, shape: tuple[int, int]
) -> Terms:
    """What fresh draws say at every point."""

    def at(point: tuple[Params, Array]) -> tuple[Array, Array, Array, Array]:
        params, _ = point
        energy = bound.energies(params)[name]
        # One island after another, for the memory of its draws.
        log_weight = lax.map(
            lambda key: weighted_draws(key, name, energy, shape[1:]).log_weight,
            random.split(rng_key, shape[0]),
        )
        flat = log_weight.reshape(-1, *log_weight.shape[2:])
        return (
            log_mean_exp(log_weight, axis=1),
            ess_fraction(flat, axis=0),
            pareto_khat(flat),
            jnp.max(flat, axis=0),
        )

    # A model without parameters has a point too.
    numbers = jnp.arange(num_points_of(points))
    islands, *others = lax.map(at, (points, numbers))
    return Terms(jnp.moveaxis(islands, 1, 0), *others)


def _of_bounded(
    terms: Terms, tolerance: float, limit: float, size: int
) -> SiteCertificate:
    """The certificate of an energy in [−limit, limit]: its limits hold for every one."""
    islands, ess, khat, _ = terms
    estimate, stderr = jackknife_log_mean_exp(islands)
    mean = np.asarray(log_mean_exp(islands, axis=0), float)
    num_draws = len(islands) * size
    lower, upper = chernoff_limits(mean, limit, num_draws)
    width = jnp.asarray(upper - lower, estimate.dtype)

    flags = flag_where(
        ~jnp.isfinite(estimate), "log Z is not finite{where}: check that the energy is."
    ) + flag_where(
        ~(width <= tolerance),
        f"the limits by the energy's bound of {limit:g} are {worst_of(width):.2g} nats "
        f"apart{{where}}, over the tolerance of {tolerance:g}: take more draws "
        "(num_walkers=), a lower bound or a base nearer to the energy, or "
        "method='bracket'.",
    )
    like = partial(jnp.asarray, dtype=estimate.dtype)
    return SiteCertificate(
        estimate, stderr, like(lower), like(upper), ess, khat, islands, flags
    )


def _of_unbounded(terms: Terms, tolerance: float) -> SiteCertificate:
    """The certificate of an energy without a bound, which always has a flag."""
    islands, ess, khat, _ = terms
    estimate, stderr = jackknife_log_mean_exp(islands)
    quantile = float(student_t.ppf(LIMIT_LEVEL, len(islands) - 1))
    lower = estimate - quantile * stderr

    flags = flags_of_weights(
        estimate + stderr,
        2.0 * quantile * stderr,
        "95% interval",
        ess,
        khat,
        jnp.ones_like(ess),
        tolerance,
        MORE_DRAWS,
    )
    flags += (
        "the energy has no bound, so that mass may lie where no draw of the base comes: "
        "bound it (ebm_ppl.bounded), or use method='bracket'.",
    )
    upper = jnp.full_like(estimate, jnp.inf)
    return SiteCertificate(estimate, stderr, lower, upper, ess, khat, islands, flags)


def chernoff_limits(
    log_mean: np.ndarray, limit: float, num_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided limits of log Z from the mean of weights in ``[0, exp(limit)]``.

    The mean of n independent numbers in [0, 1] exceeds, or falls short of, its
    expectation p so far that ``n KL(mean, p) ≥ log(1/α)`` with probability α at most:
    no assumption is made on the weights, nor on n.

    Source: Hoeffding (1963), theorem 1.
    """
    log_share = np.minimum(log_mean - limit, 0.0)
    share = np.exp(log_share)
    enough = -np.log1p(-LIMIT_LEVEL) / num_draws

    def root(low: np.ndarray, high: np.ndarray, rises: bool) -> np.ndarray:
        for _ in range(60):
            middle = 0.5 * (low + high)
            p = np.exp(middle)
            far = rel_entr(share, p) + rel_entr(1 - share, -np.expm1(middle)) > enough
            low, high = (
                np.where(far == rises, low, middle),
                np.where(far == rises, middle, high),
            )
        return 0.5 * (low + high)

    lower = root(np.full_like(log_share, -2.0 * limit), log_share, rises=False)
    upper = root(log_share, np.zeros_like(log_share), rises=True)
    is_number = np.isfinite(log_mean)
    return (
        np.where(is_number, limit + lower, np.nan),
        np.where(is_number, limit + upper, np.nan),
    )
