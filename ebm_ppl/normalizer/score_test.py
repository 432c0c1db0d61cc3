"""Whether parameters are at a maximum of the likelihood, and the way there.

The score of a model with energies is ``E_data[∂U] − E_p[∂U]``, with the data's
multiplicities and the priors.  Annealed walkers give the second mean and, by their
covariance, the Fisher information; Rao's test compares the two.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.likelihood import LikelihoodSurface
from ebm_ppl.normalizer.newton import Maximum, climb_to_maximum
from ebm_ppl.normalizer.saddles import saddles
from ebm_ppl.normalizer.surface import gain_on, surface_at
from ebm_ppl.normalizer.verdict import distances_of, judgement
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.keys import require_key

# Monte Carlo error, in standard errors, over which a distance is not judged.
MAX_NOISE = 0.5
# Walkers per island, at first and at most.
FIRST_WALKERS = 256
MAX_WALKERS = 8192


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
            infinite for those that the data do not tell, or not apart from others; empty
            for nets.
        gain: Nats gained as far as the walkers reach, Monte Carlo noise taken off.
        gain_per_row: The same, per row of data.
        newton: Constrained parameters where those steps lead; None for nets.
        gain_held_out: Nats gained per row of ``held_out``, by the same steps, priors left
            out; None without such rows.
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
    gain_held_out: float | None = None
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
        if self.gain_held_out is not None:
            lines[0] += f", {self.gain_held_out:.3g} on held-out rows"
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
    fit: Estimate | Params,
    model: Model,
    *args: Any,
    num_chains: int = 16,
    num_walkers: int | None = None,
    num_temperatures: int | None = None,
    tolerance: float = 1.0,
    held_out: tuple | None = None,
    progress_bar: bool = True,
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
        num_walkers: Walkers per island; None begins with 256 and, where their noise does
            not allow a judgement, goes on with as many as that takes, 8,192 at most.
        num_temperatures: As in :func:`log_normalizer`.
        tolerance: As in :func:`log_normalizer`.
        held_out: Positional arguments with rows that were not fitted, on which the gain
            is told too: what a net gains on its own rows may be nothing on others.
        progress_bar: Show the number of temperatures done, after the first second.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: A model, parameters or data that could not be fitted.

    Source: Rao (1948); Geyer and Thompson (1992).
    """
    require_key(rng_key)
    params = params_of(fit)
    others = None if held_out is None else Arguments(tuple(held_out), kwargs)
    size = FIRST_WALKERS if num_walkers is None else num_walkers

    for key in random.split(rng_key):
        climb = climb_from(
            key,
            params,
            model,
            Arguments(args, kwargs),
            num_chains=num_chains,
            num_walkers=size,
            num_temperatures=num_temperatures,
            tolerance=tolerance,
            progress_bar=progress_bar,
            held_out=others,
        )
        if climb.test.is_judged or num_walkers is not None:
            break
        size = _walkers_for(climb.test, size)

    if others is None:
        return climb.test
    gain = gain_on(climb.surface, climb.maximum, others)
    return replace(climb.test, gain_held_out=gain)


def _walkers_for(test: ScoreTest, size: int) -> int:
    """Walkers per island that leave an error well under the largest."""
    noise = max(float(np.max(leaf)) for leaf in jax.tree.leaves(test.distance_error))
    wanted = min(size * (noise / (0.7 * MAX_NOISE)) ** 2, MAX_WALKERS)
    # Powers of two: a few programs serve all data.
    return int(2 ** np.ceil(np.log2(wanted)))


class Climb(NamedTuple):
    """Fresh walkers at some parameters, and where Newton steps by them lead.

    Attributes:
        surface: The likelihood by the walkers.
        maximum: Where the steps lead.
        curves_up: Flags of a likelihood that curves up there.
        test: The verdict on where they began.
    """

    surface: LikelihoodSurface
    maximum: Maximum
    curves_up: tuple[str, ...]
    test: ScoreTest


def climb_from(
    rng_key: Array,
    params: Params,
    model: Model,
    arguments: Arguments,
    *,
    num_chains: int,
    **options: Any,
) -> Climb:
    """Anneal to the energies at constrained parameters, and climb from there.

    Args:
        rng_key: A JAX PRNG key.
        params: The parameters.
        model: The model.
        arguments: Its data.
        num_chains: Islands.
        options: Others of :func:`surface_at`.
    """
    surface, log_z = surface_at(
        rng_key, params, model, arguments, num_chains=num_chains, **options
    )
    maximum = climb_to_maximum(surface)
    curves_up = saddles(surface, maximum)
    test = _verdict_on(surface, maximum, num_chains, log_z, curves_up)
    return Climb(surface, maximum, curves_up, test)


def _verdict_on(
    surface: LikelihoodSurface,
    maximum: Maximum,
    num_chains: int,
    log_z: LogNormalizer,
    curves_up: tuple[str, ...],
) -> ScoreTest:
    """Distances by site, and flags."""
    bound, params = surface.bound, surface.params
    found = distances_of(surface, maximum, num_chains)
    is_judged, reasons = judgement(found, max_noise=MAX_NOISE)
    errors: dict[str, Any]

    # By site, or by module
    if surface.is_net:
        by_site = lambda values: {n: values[p] for n, p in found.places.items()}  # noqa: E731
        after, covariance, errors = None, None, {}
    else:
        by_site = lambda values: _like(params, values)  # noqa: E731
        there = surface.at(jnp.asarray(maximum.step, surface.directions.dtype))
        after = bound.constrain(there)
        covariance, errors = constrained_errors(bound, there, maximum)

    return ScoreTest(
        params=bound.constrain(params),
        score=by_site(maximum.score),
        distance=by_site(found.distance),
        distance_error=by_site(found.error),
        standard_errors=errors,
        gain=maximum.gain,
        gain_per_row=found.gain_per_row,
        newton=after,
        log_normalizer=log_z,
        flags=flags_of_draws(log_z) + reasons + curves_up,
        is_judged=is_judged,
        covariance=covariance,
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
    bound: BoundModel,
    params: Params,
    maximum: Maximum,
    covariance: np.ndarray | None = None,
) -> tuple[np.ndarray, Any]:
    """Covariance and standard errors of the constrained parameters (delta method).

    Errors are infinite where a parameter, or what it is told apart from, has no
    information; the covariance is that along the other directions.
    """
    covariance = maximum.covariance if covariance is None else covariance
    flat, unravel = ravel_pytree(params)
    _, unravel_constrained = ravel_pytree(bound.constrain(params))

    def constrain(values: Array) -> Array:
        return ravel_pytree(bound.constrain(unravel(values)))[0]

    jacobian = np.asarray(jax.jacfwd(constrain)(flat), float)
    found = jacobian @ covariance @ jacobian.T
    errors = np.sqrt(np.maximum(np.diag(found), 0.0))
    errors[np.any(jacobian[:, maximum.is_unknown] != 0, axis=1)] = np.inf
    by_site = unravel_constrained(jnp.asarray(errors, flat.dtype))
    return found, jax.tree.map(np.asarray, by_site)
