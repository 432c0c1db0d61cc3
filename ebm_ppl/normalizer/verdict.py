"""What Newton steps say of parameters: distances from the maximum, and a judgement."""

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from ebm_ppl.normalizer.density import num_rows
from ebm_ppl.normalizer.likelihood import LikelihoodSurface
from ebm_ppl.normalizer.newton import (
    MAX_UNTOLD,
    NUM_DIRECTIONS,
    Maximum,
    groups_of,
    in_standard_errors,
)

# A distance from the maximum, in standard errors, that is told; a net's gain, in nats a
# row.
MAX_DISTANCE = 1.0
# Monte Carlo error of a distance, in the same unit, over which it cannot be judged.
MAX_NOISE = 1.0
MAX_GAIN = 0.01
# Probability that Monte Carlo error alone passes for such a distance.
FALSE_ALARM = 0.005
NOT_FINITE = "the score or the information is not finite."


class Distances(NamedTuple):
    """How far a maximum is; arrays by parameter, or by direction of a net.

    Attributes:
        maximum: Where Newton steps led.
        places: Where each site, or module, stands in the arrays.
        is_net: Whether they are along directions.
        distance: In standard errors of each estimate.
        error: Its Monte Carlo standard error.
        limit: What Monte Carlo error alone may pass for.
        slope_limit: The same of the slope where the way there begins.
        gain_per_row: Nats a row gained on the way.
        by_gain: The distance that the gain speaks of, in standard errors: half its square
            is gained; and the same of Monte Carlo error alone.
    """

    maximum: Maximum
    places: dict[str, slice]
    is_net: bool
    distance: np.ndarray
    error: np.ndarray
    limit: np.ndarray
    slope_limit: np.ndarray
    gain_per_row: float
    by_gain: tuple[float, float]

    def site(self, index: Any) -> str:
        """The site, or module, of a parameter."""
        return next(n for n, p in self.places.items() if p.start <= index < p.stop)


def distances_of(
    surface: LikelihoodSurface, maximum: Maximum, num_chains: int
) -> Distances:
    """Distances in standard errors, from islands whose number gives t quantiles."""
    places = groups_of(surface.params)
    constrained = surface.bound.constrain(surface.params)
    size = num_rows(surface.bound, constrained, maximum.counts)

    # Where draws do not reach the maximum, the step that is left belongs to the distance.
    distance, error = in_standard_errors(
        maximum.step + maximum.left, maximum.noise, maximum.covariance
    )
    if surface.is_net:
        width = 1 + NUM_DIRECTIONS
        places = {n: slice(i * width, (i + 1) * width) for i, n in enumerate(places)}
    else:
        far = np.copysign(np.inf, maximum.untold)
        distance = np.where(np.abs(maximum.untold) > MAX_UNTOLD, far, distance)

    quantile = student_t.ppf(1 - 0.5 * FALSE_ALARM / distance.size, num_chains - 1)
    return Distances(
        maximum,
        places,
        surface.is_net,
        distance,
        error,
        quantile * error,
        quantile * maximum.slope_error,
        maximum.gain / size,
        _distance_by_gain(maximum, quantile),
    )


def _distance_by_gain(maximum: Maximum, quantile: float) -> tuple[float, float]:
    """√(2 gain), which no scale of the parameters changes, and its limit by noise."""
    noise = max(float(np.sum(maximum.covariance * maximum.score_noise)), 0.0)
    return float(np.sqrt(2.0 * maximum.gain + noise)), float(quantile * np.sqrt(noise))


def judgement(
    found: Distances, max_distance: float = MAX_DISTANCE, max_noise: float = MAX_NOISE
) -> tuple[bool, tuple[str, ...]]:
    """Whether the parameters can be judged, and what speaks against them."""
    maximum, gain = found.maximum, found.gain_per_row
    if not np.all(np.isfinite(maximum.step)):
        return True, (NOT_FINITE,)
    if found.is_net:
        is_off = gain > MAX_GAIN or not maximum.is_reached
        return True, (_not_at_maximum(found, ""),) if is_off else ()

    # A slope without curvature
    untold = np.abs(maximum.untold)
    if np.any(untold > MAX_UNTOLD):
        return True, (
            "not at a maximum: the likelihood slopes along parameter "
            f"'{found.site(np.argmax(untold))}' where it does not curve down, so that "
            "Newton steps cannot say how far its maximum is, or parameters that the energy "
            "hardly tells apart. Train on from here, begin nearer to it, or centre what "
            "they multiply.",
        )

    # A distance, or a slope, beyond its error
    how_far = _how_far(found, max_distance)
    if how_far:
        return True, (_not_at_maximum(found, how_far),)

    # A gain beyond it: standard errors that grow on the way hide a distance
    (distance, noise), size = found.by_gain, np.sqrt(len(found.distance))
    if distance > max_distance * size + noise:
        return True, (_not_at_maximum(found, ""),)

    # An error too large to tell
    worst = np.argmax(found.error)
    times = int((found.error[worst] / max_noise) ** 2) + 1
    if found.error[worst] > max_noise:
        return False, (
            f"parameter '{found.site(worst)}' can be judged to {found.limit[worst]:.1f} "
            "of its standard errors only, for Monte Carlo error: take "
            f"{times} times the walkers (num_walkers), or more islands (num_chains).",
        )
    return True, ()


def _how_far(found: Distances, max_distance: float) -> str:
    """The parameter that is farthest away beyond its Monte Carlo error; or nothing.

    Where the way is too long for weights to tell its end, the slope at its beginning
    may tell.
    """
    maximum = found.maximum
    is_away = np.abs(found.distance) > max_distance
    slope = np.where(is_away, maximum.slope, 0.0)

    for value, error, limit, by in (
        (found.distance, found.error, found.limit, ""),
        (slope, maximum.slope_error, found.slope_limit, " by its slope"),
    ):
        beyond = np.abs(value) - limit
        worst = np.argmax(beyond)
        if beyond[worst] > max_distance:
            return (
                f"parameter '{found.site(worst)}' is {abs(value[worst]):.1f} ± "
                f"{error[worst]:.1f} of its standard errors away{by}, and "
            )
    return ""


def _not_at_maximum(found: Distances, how_far: str) -> str:
    over = "" if found.maximum.is_reached else "over "
    return (
        f"not at a maximum: {how_far}the way there gains {over}"
        f"{found.gain_per_row:.2g} nats a row. Train on from here with more walkers, a "
        "lower learning rate or more steps."
    )
