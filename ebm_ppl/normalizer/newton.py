"""Newton steps to a maximum of the likelihood, and the directions they may take."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.likelihood import (
    MAX_PARAMETERS,
    LikelihoodSurface,
    num_params,
    quadratic,
)

# Random directions of every module of a net, beside that of its gradient.
NUM_DIRECTIONS = 4
MAX_STEPS = 12
MAX_HALVINGS = 16
# Smallest ESS fraction of reweighted draws that a step may lead to.
MIN_ESS = 0.1
# Steps shorter than this, in standard errors, end the search.
SHORT = 0.02
# Information in units of that where the search began, under which it is lost.
LOST = 1e-6
# Eigenvalues of the information, in units of its diagonal, under which a direction says
# nothing: parameters that do not matter, or that others repeat.
MIN_INFORMATION = 1e-5
# Share of such a direction from which a parameter takes part in it.
MIN_PART = 1e-3
# What a score along such a direction may be, in units of the root of its curvature: one
# whose Newton step would be a standard error, were the curvature information.
MAX_UNTOLD = 1.0
# Curvature that single precision cannot tell from none, in units of the diagonal.
NO_CURVATURE = 1e-6
# That unit where there is no curvature at all: scores over 0.01 nats count.
WITHOUT_SCALE = 100.0
# Monte Carlo errors that are taken off a score.
MAX_ERRORS = 5.0


def groups_of(params: Params) -> dict[str, slice]:
    """Where each site, or each module of a net, stands in the raveled parameters."""
    is_net = num_params(params) > MAX_PARAMETERS
    groups: dict[str, slice] = {}
    begin = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        name = "/".join(keys[:3]) if is_net else keys[0]
        first = groups[name].start if name in groups else begin
        begin += jnp.size(leaf)
        groups[name] = slice(first, begin)
    return groups


def directions_of(gradient: Array, groups: Mapping[str, slice]) -> Array:
    """Columns along which a net is tested: a few of every module."""
    size = gradient.shape[0]
    rng = np.random.default_rng(0)
    columns = []
    for place in groups.values():
        length = place.stop - place.start
        random = rng.normal(size=(NUM_DIRECTIONS, length))
        along = np.concatenate([np.asarray(gradient[place])[None], random])
        norms = np.linalg.norm(along, axis=1, keepdims=True)
        block = np.zeros((1 + NUM_DIRECTIONS, size))
        block[:, place] = along / np.where(norms > 0, norms, 1.0)
        columns.append(block)

    return jnp.asarray(np.concatenate(columns).T, gradient.dtype)


class Maximum(NamedTuple):
    """Where Newton steps led.

    Attributes:
        score: The score where they began, ``(k,)``.
        step: The sum of the steps.
        covariance: Inverse information there: the covariance of the estimates.
        noise: Monte Carlo covariance of ``step``.
        gain: Nats gained, without what noise alone would seem to gain.
        counts: How often every log Z enters, by site.
        left: The Newton step that is left there, zero where the maximum was reached.
        is_reached: Whether the draws reach that far: the last step was short, and
            nothing slopes where it does not curve.
        score_noise: Monte Carlo covariance of the score there.
        is_unknown: Parameters that take part in a direction without information, ``(k,)``.
        is_lost: Parameters whose information vanished on the way, ``(k,)``.
        untold: The score along directions without information, in units of its
            curvature there, ``(k,)``: where it is not 0 no Newton step can judge.
        slope: The first Newton step in standard errors there: Rao's statistic, ``(k,)``.
        slope_error: Its Monte Carlo standard error; weights at the end of a long way add
            none to it.
    """

    score: np.ndarray
    step: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    gain: float
    counts: dict[str, np.ndarray]
    left: np.ndarray
    is_reached: bool
    score_noise: np.ndarray
    is_unknown: np.ndarray
    is_lost: np.ndarray
    untold: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray


def climb_to_maximum(surface: LikelihoodSurface) -> Maximum:
    """Fisher scoring by reweighted draws, as far as they reach."""
    step = np.zeros(surface.directions.shape[1])
    origin = np.asarray(ravel_pytree(surface.params)[0], float)
    first: Any = _at(surface, step)
    here: Any = first
    is_reached = False

    for _ in range(MAX_STEPS):
        covariance = pseudo_inverse(here.information)
        newton = covariance @ here.score
        errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        size = np.max(np.abs(newton) / np.where(errors > 0, errors, np.inf))
        if not np.isfinite(size) or size < SHORT:
            is_reached = bool(np.isfinite(size)) and not np.any(_lost(here, first))
            break

        # No parameter moves by more than twice its size, or 2, at once: of a positive
        # one that is two e-folds.  Clipped one by one, or one that hardly matters would
        # hold the others.
        if not surface.is_net:
            limit = 2.0 * np.maximum(1.0, np.abs(origin + step))
            newton = np.clip(newton, -limit, limit)

        # Halve steps that the draws do not reach, or that lead down.
        for _ in range(MAX_HALVINGS):
            there = _at(surface, step + newton)
            if there.ess >= MIN_ESS and there.value <= here.value:
                break
            newton = 0.5 * newton
        else:
            break
        step, here = step + newton, there

    return _maximum(first, here, step, is_reached)


def _maximum(first: Any, here: Any, step: np.ndarray, is_reached: bool) -> Maximum:
    """What the steps that began at ``first`` found."""
    untold = _untold_score(here)
    is_reached = is_reached and bool(np.all(np.abs(untold) <= MAX_UNTOLD))
    covariance = pseudo_inverse(here.information)
    left = np.zeros_like(step) if is_reached else covariance @ here.score
    noise = covariance @ here.noise @ covariance
    gain = float(first.value - here.value) - 0.5 * np.sum(covariance * here.noise)
    there = pseudo_inverse(first.information)
    slope, slope_error = in_standard_errors(
        there @ first.score, there @ first.noise @ there, there
    )

    return Maximum(
        first.score,
        step,
        covariance,
        noise,
        max(gain, 0.0),
        here.counts,
        left,
        is_reached,
        here.noise,
        _unknown(here.information),
        _lost(here, first),
        untold,
        slope,
        slope_error,
    )


def in_standard_errors(
    step: np.ndarray, noise: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A step, and the deviation of its Monte Carlo noise, in standard errors.

    0 for parameters without information.

    Args:
        step: ``(k,)``.
        noise: Its Monte Carlo covariance, ``(k, k)``.
        covariance: That of the estimates, ``(k, k)``.
    """
    stderr, deviation = (
        np.sqrt(np.maximum(np.diag(matrix), 0.0)) for matrix in (covariance, noise)
    )
    scale = np.where(stderr > 0, stderr, np.inf)
    return step / scale, deviation / scale


def _lost(here: Any, first: Any) -> np.ndarray:
    """Which parameters have come to where nothing depends on them any more.

    A rate that goes to zero, say: what looks like a maximum there is none.
    """
    now, before = np.diag(here.information), np.diag(first.information)
    return (before > 0) & ~(now >= LOST * before)


def _unknown(information: np.ndarray) -> np.ndarray:
    """Which parameters take part in a direction without information."""
    if not np.all(np.isfinite(information)):
        return np.ones(len(information), bool)
    _, values, vectors = _spectrum(information)
    part = np.abs(vectors[:, values <= MIN_INFORMATION])
    return np.any(part > MIN_PART, axis=1)


def _at(surface: LikelihoodSurface, step: np.ndarray) -> Any:
    """The surface at a step, in NumPy's double precision."""
    found = quadratic(surface, jnp.asarray(step, surface.directions.dtype))
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), found)


def pseudo_inverse(information: np.ndarray) -> np.ndarray:
    """The inverse, in units of the diagonal, along directions with information."""
    if not np.all(np.isfinite(information)):
        return np.full_like(information, np.nan)
    unit, values, vectors = _spectrum(information)
    is_told = values > MIN_INFORMATION
    inverse = np.where(is_told, 1.0 / np.where(is_told, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T * np.outer(unit, unit)


def _spectrum(information: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units of the diagonal, and eigenvalues and vectors of the information in them."""
    scale = np.sqrt(np.abs(np.diag(information)))
    unit = np.where(scale > 0, 1.0 / np.where(scale > 0, scale, 1.0), WITHOUT_SCALE)
    values, vectors = np.linalg.eigh(information * np.outer(unit, unit))
    return unit, values, vectors


def _untold_score(here: Any) -> np.ndarray:
    """The score along directions without information, beyond its Monte Carlo error.

    A likelihood that slopes where it does not curve down has no maximum nearby.
    """
    if not np.all(np.isfinite(here.information)):
        return np.zeros_like(here.score)
    unit, values, vectors = _spectrum(here.information)
    vectors = vectors[:, values <= MIN_INFORMATION]

    # Beyond Monte Carlo error and rounding, in units of the root of what curvature there is
    along = vectors.T @ (unit * here.score)
    noise = np.outer(unit, unit) * here.noise
    error = np.sqrt(np.maximum(np.diag(vectors.T @ noise @ vectors), 0.0))
    rounding = np.abs(vectors).T @ (unit * here.rounding)
    beyond = np.maximum(np.abs(along) - MAX_ERRORS * error - rounding, 0.0)
    # Where nothing curves at all the unit is that of WITHOUT_SCALE.
    is_idle = np.diag(here.information) == 0
    idle = np.sum(vectors[is_idle] ** 2, axis=0)
    scale = np.sqrt(np.maximum(np.abs(values[values <= MIN_INFORMATION]), NO_CURVATURE))
    scale = np.where(idle > 0.5, 1.0, scale)
    return vectors @ (np.sign(along) * beyond / scale)
