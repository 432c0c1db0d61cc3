"""Whether parameters are at a maximum of the likelihood, and the way there.

The score of a model with energies is ``E_data[∂U] − E_p[∂U]``, with the data's
multiplicities and the priors.  Annealed walkers give the second mean and, by their
covariance, the Fisher information; Rao's test compares the two.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy.stats import t as student_t

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.likelihood import LikelihoodSurface
from ebm_ppl.normalizer.newton import (
    MAX_UNTOLD,
    NUM_DIRECTIONS,
    Maximum,
    climb_to_maximum,
    groups_of,
)
from ebm_ppl.normalizer.surface import surface_at
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.fit import Fit

# A distance from the maximum, in standard errors, that is told; a net's gain, in nats a
# row.
MAX_DISTANCE = 1.0
# Monte Carlo error of a distance, in the same unit, over which it cannot be judged.
MAX_NOISE = 1.0
MAX_GAIN = 0.01
# Probability that Monte Carlo error alone passes for such a distance.
FALSE_ALARM = 0.005
NOT_FINITE = "the score or the information is not finite."


@dataclass(frozen=True, eq=False)
class ScoreTest:
    """Rao's score test of parameters against the maximum of the likelihood.

    With priors, it is the maximum of the joint density in the convention of ``AutoDelta``.
    Dicts are by parameter site; of a net's modules, arrays hold one entry per direction.

    Attributes:
        params: The constrained parameters that were tested.
        score: Derivative of the log joint density with respect to the unconstrained
            parameters.
        distance: How far the maximum is, in standard errors of each estimate (Fisher
            information): by Newton steps as far as reweighted walkers reach, and the
            step that is left there.
        distance_error: Monte Carlo standard error of ``distance``.
        standard_errors: Of the constrained parameters, from the Fisher information;
            empty for nets.
        gain: Nats gained as far as the walkers reach, Monte Carlo noise taken off.
        gain_per_row: The same, per row of data.
        newton: Constrained parameters where those steps lead; None for nets.
        log_normalizer: The certified log Z that the draws came with.
        flags: Why the parameters are not at a maximum, or cannot be judged.
        is_judged: False where Monte Carlo errors are too large to tell.
    """

    params: Params
    score: dict[str, Any]
    distance: dict[str, Any]
    distance_error: dict[str, Any]
    standard_errors: dict[str, Any]
    gain: float
    gain_per_row: float
    newton: Params | None
    log_normalizer: LogNormalizer
    flags: tuple[str, ...]
    is_judged: bool = True
    covariance: np.ndarray | None = field(default=None, repr=False)

    @property
    def is_at_maximum(self) -> bool:
        """Whether there are no flags."""
        return not self.flags

    def __str__(self) -> str:
        """The verdict, the largest distance of every site, and the flags."""
        verdict = "at a maximum" if self.is_at_maximum else "NOT at a maximum"
        verdict = verdict if self.is_judged else "cannot be judged"
        lines = [f"{verdict}: going there gains {self.gain_per_row:.3g} nats a row"]
        for name, distance in self.distance.items():
            values, errors = np.ravel(distance), np.ravel(self.distance_error[name])
            worst = int(np.argmax(np.abs(values)))
            lines.append(
                f"{name}: {values[worst]:+.2f} ± {errors[worst]:.2f} standard errors "
                "from it"
            )
        return "\n".join(lines + [f"  - {flag}" for flag in self.flags])


def score_test(
    rng_key: Array,
    fit: Fit | Params,
    model: Model,
    *args: Any,
    num_chains: int = 16,
    num_walkers: int = 256,
    num_temperatures: int | None = None,
    tolerance: float = 1.0,
    **kwargs: Any,
) -> ScoreTest:
    r"""Test whether parameters maximise the likelihood, or the joint density with priors.

    Fresh walkers are annealed to the energies, as in :func:`log_normalizer`.  With the
    score S and the information I,

    .. math::
        S = \nabla_\theta \log p(x, \theta), \qquad
        I = \sum_{sites} n\, \mathrm{Cov}_p(\partial_\theta U)
        - \nabla^2_\theta \log \pi(\theta),

    a Newton step is :math:`I^{-1} S`, and it gains :math:`\tfrac12 S^\top I^{-1} S`,
    half of Rao's statistic.  Steps go on by reweighted walkers as far as those reach;
    their sum is told in units of the standard errors :math:`(I^{-1})_{kk}^{1/2}`.  Up
    to 1,000 parameters are tested one by one; of larger nets, every module along its
    own gradient and along four fixed random directions.

    Args:
        rng_key: A JAX PRNG key.
        fit: A :class:`Fit`, or constrained parameters by site name.
        model: The model that was fitted.
        args: Its positional arguments, the data; plates count at their full size.
        num_chains: Islands, from which Monte Carlo errors are computed.
        num_walkers: Walkers per island.
        num_temperatures: As in :func:`log_normalizer`.
        tolerance: As in :func:`log_normalizer`.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: A model, parameters or data that could not be fitted.

    Source: Rao (1948); Geyer and Thompson (1992).
    """
    surface, log_z = surface_at(
        rng_key,
        fit.params if isinstance(fit, Fit) else dict(fit),
        model,
        Arguments(args, kwargs),
        num_chains=num_chains,
        num_walkers=num_walkers,
        num_temperatures=num_temperatures,
        tolerance=tolerance,
    )
    return verdict_on(surface, climb_to_maximum(surface), num_chains, log_z)


def verdict_on(
    surface: LikelihoodSurface,
    maximum: Maximum,
    num_chains: int,
    log_z: LogNormalizer,
) -> ScoreTest:
    """Distances by site, and flags.

    One body: numbers, then flags.
    """
    bound, params = surface.bound, surface.params
    places = groups_of(params)
    is_net = surface.is_net
    num_rows = max(float(np.sum(count)) for count in maximum.counts.values())
    stderr = np.sqrt(np.maximum(np.diag(maximum.covariance), 0.0))
    scale = np.where(stderr > 0, stderr, np.inf)
    # Where draws do not reach the maximum, the step that is left belongs to the distance.
    distance = (maximum.step + maximum.left) / scale
    error = np.sqrt(np.maximum(np.diag(maximum.noise), 0.0)) / scale
    if not is_net:
        far = np.copysign(np.inf, maximum.untold)
        distance = np.where(np.abs(maximum.untold) > MAX_UNTOLD, far, distance)
    errors: dict[str, Any]

    # By site, or by module
    if is_net:
        size = 1 + NUM_DIRECTIONS
        places = {n: slice(i * size, (i + 1) * size) for i, n in enumerate(places)}
        by_site = lambda values: {n: values[p] for n, p in places.items()}  # noqa: E731
        after, covariance, errors = None, None, {}
    else:
        by_site = lambda values: _like(params, values)  # noqa: E731
        there = surface.at(jnp.asarray(maximum.step, surface.directions.dtype))
        after = bound.constrain(there)
        covariance, errors = constrained_errors(bound, there, maximum.covariance)

    # Flags
    gain_per_row = maximum.gain / num_rows
    quantile = student_t.ppf(1 - 0.5 * FALSE_ALARM / distance.size, num_chains - 1)
    limit = quantile * error
    found = _Found(maximum, places, is_net, distance, error, limit, gain_per_row)
    is_judged, reasons = _judgement(found)
    flags = flags_of_draws(log_z) + reasons

    return ScoreTest(
        params=bound.constrain(params),
        score=by_site(maximum.score),
        distance=by_site(distance),
        distance_error=by_site(error),
        standard_errors=errors,
        gain=maximum.gain,
        gain_per_row=gain_per_row,
        newton=after,
        log_normalizer=log_z,
        flags=flags,
        is_judged=is_judged,
        covariance=covariance,
    )


class _Found(NamedTuple):
    """What the flags of a test are made from; arrays by parameter, or by direction."""

    maximum: Maximum
    places: dict[str, slice]
    is_net: bool
    distance: np.ndarray
    error: np.ndarray
    limit: np.ndarray
    gain_per_row: float

    def site(self, index: Any) -> str:
        """The site, or module, of a parameter."""
        return next(n for n, p in self.places.items() if p.start <= index < p.stop)


def _judgement(found: _Found) -> tuple[bool, tuple[str, ...]]:
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
            "Newton steps cannot say how far its maximum is. Train on from here, or "
            "begin nearer to it.",
        )

    # A distance beyond its error
    beyond = np.abs(found.distance) - found.limit
    worst = np.argmax(beyond)
    if beyond[worst] > MAX_DISTANCE:
        how_far = (
            f"parameter '{found.site(worst)}' is {abs(found.distance[worst]):.1f} ± "
            f"{found.error[worst]:.1f} of its standard errors away, and "
        )
        return True, (_not_at_maximum(found, how_far),)

    # An error too large to tell
    worst = np.argmax(found.error)
    if found.error[worst] > MAX_NOISE:
        return False, (
            f"parameter '{found.site(worst)}' can be judged to {found.limit[worst]:.1f} "
            "of its standard errors only, for Monte Carlo error: take "
            f"{found.error[worst] ** 2:.0f} times the walkers (num_walkers), or more "
            "islands (num_chains).",
        )
    return True, ()


def _not_at_maximum(found: _Found, how_far: str) -> str:
    over = "" if found.maximum.is_reached else "over "
    return (
        f"not at a maximum: {how_far}the way there gains {over}"
        f"{found.gain_per_row:.2g} nats a row. Train on from here with more walkers, a "
        "lower learning rate or more steps."
    )


def flags_of_draws(log_z: LogNormalizer) -> tuple[str, ...]:
    """Why the draws that came with a log Z may not be the model's."""
    return tuple(
        f"the draws at site '{name}' may not be the model's: {flag}"
        for name, found in log_z.flags.items()
        for flag in found
    )


def _like(params: Params, values: np.ndarray) -> Any:
    flat, unravel = ravel_pytree(params)
    return jax.tree.map(np.asarray, unravel(jnp.asarray(values, flat.dtype)))


def constrained_errors(
    bound: BoundModel, params: Params, covariance: np.ndarray
) -> tuple[np.ndarray, Any]:
    """Covariance and standard errors of the constrained parameters (delta method)."""
    flat, unravel = ravel_pytree(params)
    _, unravel_constrained = ravel_pytree(bound.constrain(params))

    def constrain(values: Array) -> Array:
        return ravel_pytree(bound.constrain(unravel(values)))[0]

    jacobian = np.asarray(jax.jacfwd(constrain)(flat), float)
    found = jacobian @ covariance @ jacobian.T
    errors = jnp.asarray(np.sqrt(np.maximum(np.diag(found), 0.0)), flat.dtype)
    return found, jax.tree.map(np.asarray, unravel_constrained(errors))
