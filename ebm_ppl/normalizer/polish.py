"""Fits of few parameters taken to the maximum of their likelihood, with errors."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree

from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.likelihood import (
    MAX_PARAMETERS,
    LikelihoodSurface,
    num_params,
)
from ebm_ppl.normalizer.newton import Maximum, groups_of
from ebm_ppl.normalizer.score_test import (
    ScoreTest,
    climb_from,
    constrained_errors,
    flags_of_draws,
)
from ebm_ppl.normalizer.verdict import NOT_FINITE
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.keys import require_key

# Monte Carlo error, in standard errors of the estimates, at which rounds end.
MAX_NOISE = 0.18
FIRST_WALKERS = 512
# A round counts when it began this near to where it led, in standard errors.
NEAR = 1.0


@dataclass(frozen=True, eq=False)
class Polished(Estimate):
    """A maximum of the likelihood, or of the joint density with priors.

    Attributes:
        params: Constrained parameters at the maximum.
        standard_errors: Of the parameters, from the Fisher information (and the priors'
            curvature).
        monte_carlo_errors: What the walkers' noise adds to ``params``.
        covariance: Of the raveled constrained parameters.
        test: The last round's score test, at the parameters where it began.
        num_rounds: Rounds of fresh walkers.
        flags: Why the estimate may be wrong.
    """

    params: Params
    standard_errors: Params
    monte_carlo_errors: Params
    covariance: np.ndarray = field(repr=False)
    test: ScoreTest = field(repr=False)
    num_rounds: int = 0
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line per parameter site, and the flags."""
        lines = [
            f"{name}: {np.asarray(value)} ± {np.asarray(self.standard_errors[name])} "
            f"(Monte Carlo {np.asarray(self.monte_carlo_errors[name])})"
            for name, value in self.params.items()
        ]
        return "\n".join(lines + [f"  - {flag}" for flag in self.flags])


def polish(
    rng_key: Array,
    fit: Estimate | Params,
    model: Model,
    *args: Any,
    num_chains: int = 16,
    num_walkers: int | None = None,
    num_temperatures: int | None = None,
    max_rounds: int = 10,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Polished:
    """Take parameters to the maximum of the likelihood, whatever fitted them.

    Each round anneals fresh walkers to the energies at the present parameters, and
    climbs the likelihood by Fisher scoring as far as reweighted walkers reach.  Rounds
    that begin near the maximum are averaged, until their noise is a fifth of the
    standard errors.

    Args:
        rng_key: A JAX PRNG key.
        fit: A :class:`Fit`, or constrained parameters by site name, to begin from.
        model: The model.
        args: Its positional arguments, the data; plates count at their full size.
        num_chains: Islands, from which Monte Carlo errors are computed.
        num_walkers: Walkers per island; None takes 512 in the first round and then as
            many as there are rows to be told from noise, 8,192 at most.
        num_temperatures: As in :func:`log_normalizer`.
        max_rounds: Rounds at most; a flag says where they did not do.
        progress_bar: Show the number of temperatures done, after the first second.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: More than 1,000 parameters, or what could not be fitted.

    Source: Geyer and Thompson (1992); Hunter and Handcock (2006).
    """
    require_key(rng_key)
    params = params_of(fit)
    arguments = Arguments(args, kwargs)
    options: dict[str, Any] = {
        "num_chains": num_chains,
        "num_temperatures": num_temperatures,
        "progress_bar": progress_bar,
    }
    if num_params(params) > MAX_PARAMETERS:
        raise ValueError(
            f"The model has {num_params(params)} parameters; polish takes "
            f"{MAX_PARAMETERS:,} at most, whose information is a matrix. Train nets on, "
            "and look at ebm_ppl.score_test(...)."
        )
    if max_rounds < 1:
        raise ValueError(f"max_rounds = {max_rounds}; expected at least 1.")

    found: list[tuple[np.ndarray, Maximum]] = []
    doubts: dict[str, None] = {}
    lost: dict[str, None] = {}
    num_rounds, size = 0, FIRST_WALKERS if num_walkers is None else num_walkers
    for key in random.split(rng_key, max_rounds):
        num_rounds += 1

        # Anneal, and climb
        climb = climb_from(
            key, params, model, arguments, num_walkers=size, tolerance=1.0, **options
        )
        surface, maximum = climb.surface, climb.maximum
        of_draws = flags_of_draws(climb.test.log_normalizer)
        if not np.all(np.isfinite(maximum.step)):
            break

        lost |= dict.fromkeys(_names(surface, maximum.is_lost))

        # Average rounds that began near the maximum.
        flat, _ = ravel_pytree(surface.params)
        if maximum.is_reached and _is_near(maximum) and not lost:
            found.append((np.asarray(flat, float) + maximum.step, maximum))
            doubts |= dict.fromkeys(of_draws)
        params = surface.bound.constrain(_at(surface, maximum.step))
        if found and _noise(found) < MAX_NOISE:
            break
        if num_walkers is None:
            size = _walkers_for(maximum, num_chains)

    flags = tuple(doubts) if found else of_draws
    flags += climb.curves_up + _flags_of_unknown(surface, maximum, lost)
    return _result(surface, found, maximum, climb.test, num_rounds, flags)


def _names(surface: LikelihoodSurface, which: np.ndarray) -> list[str]:
    """Sites of parameters."""
    return [n for n, p in groups_of(surface.params).items() if np.any(which[p])]


def _flags_of_unknown(
    surface: LikelihoodSurface, maximum: Maximum, lost: dict[str, None]
) -> tuple[str, ...]:
    """Flags of parameters of which the data say nothing here."""
    flags = tuple(
        f"parameter '{name}' went where nothing depends on it any more: the likelihood "
        "rises towards the end of its range, and has no maximum inside."
        for name in lost
    )
    unknown = [n for n in _names(surface, maximum.is_unknown) if n not in lost]
    if unknown:
        named = ", ".join(f"'{name}'" for name in unknown)
        flags += (
            f"the data do not tell parameter {named}, or not apart from another: its "
            "standard error is infinite. Drop it, give it a prior, or centre what it "
            "multiplies.",
        )
    return flags


def _is_near(maximum: Maximum) -> bool:
    """Whether a round began near to where it led, its noise taken off."""
    errors = np.sqrt(np.maximum(np.diag(maximum.covariance), 1e-30))
    noise = np.sqrt(np.maximum(np.diag(maximum.noise), 0.0))
    return bool(np.all(np.abs(maximum.step) < NEAR * errors + 3.0 * noise))


def _walkers_for(maximum: Maximum, num_chains: int) -> int:
    """Walkers per island for a noise of a fifth of the standard errors in five rounds.

    The noise of one round is √(rows / walkers) of them.
    """
    num_rows = max(float(np.sum(count)) for count in maximum.counts.values())
    wanted = num_rows / (5 * MAX_NOISE**2 * num_chains)
    # Powers of two: a few programs serve all data.
    return int(np.clip(2 ** np.ceil(np.log2(max(wanted, 1.0))), FIRST_WALKERS, 8192))


def _at(surface: LikelihoodSurface, step: np.ndarray) -> Params:
    return surface.at(jnp.asarray(step, surface.directions.dtype))


def _average(
    found: list[tuple[np.ndarray, Maximum]],
) -> tuple[np.ndarray, np.ndarray]:
    """Monte Carlo covariance of the rounds' average, and covariance of the estimates."""
    noises = np.stack([maximum.noise for _, maximum in found])
    covariances = np.stack([maximum.covariance for _, maximum in found])
    return noises.mean(0) / len(found), covariances.mean(0)


def _noise(found: list[tuple[np.ndarray, Maximum]]) -> float:
    """Largest Monte Carlo error of the average, in standard errors."""
    noise, covariance = _average(found)
    noise, variance = np.diag(noise), np.diag(covariance)
    is_told = variance > 0
    return float(np.sqrt(np.max(noise[is_told] / variance[is_told], initial=0.0)))


def _result(
    surface: LikelihoodSurface,
    found: list[tuple[np.ndarray, Maximum]],
    last: Maximum,
    test: ScoreTest,
    num_rounds: int,
    flags: tuple[str, ...],
) -> Polished:
    """The average of the rounds near the maximum, or the last round and a flag."""
    flat, _ = ravel_pytree(surface.params)
    begin = np.asarray(flat, float)
    if not np.all(np.isfinite(last.step)):
        flags += (NOT_FINITE,)
    if not found:
        flags += (
            f"no maximum was reached in {num_rounds} rounds: begin nearer to it (train "
            "on), take more rounds, or check that the likelihood has one.",
        )
        found = [(begin + last.step, last)]
    elif _noise(found) >= MAX_NOISE:
        flags += (
            f"Monte Carlo errors are {_noise(found):.2f} of the standard errors: take "
            "more walkers or rounds.",
        )

    mean = np.mean([estimate for estimate, _ in found], axis=0)
    noise, covariance = _average(found)
    params = _at(surface, mean - begin)
    spread, errors = constrained_errors(surface.bound, params, last, covariance)
    _, noises = constrained_errors(surface.bound, params, last, noise)
    return Polished(
        surface.bound.constrain(params), errors, noises, spread, test, num_rounds, flags
    )
