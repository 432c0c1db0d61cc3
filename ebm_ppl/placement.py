"""Fresh walkers of an energy site: exact draws of its start, annealed to the energy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.annealing import (
    NUM_SETTLING_MOVES,
    AnnealingOptions,
    Climb,
    Ensemble,
    Ladder,
    Moves,
    Path,
    Pilot,
    begin_climb,
    climb,
    refine_ladder,
    resample_islands,
    run_pilot,
    unmoved,
)
from ebm_ppl.distribution import (
    EnergyDistribution,
    annealing_path,
    evaluate_at,
    starting_distribution,
)
from ebm_ppl.kernels import MALA, Kernel, KernelState, initial_step_size
from ebm_ppl.model import BoundModel, Params
from ebm_ppl.resampling import systematic
from ebm_ppl.weights import ess_fraction

NUM_PILOT_WALKERS = 256
MAX_PILOT_RUNGS = 1000
SECONDS_PER_PIECE = 0.5
# Moves into places much narrower than the step size are rejected, so smaller steps are
# taken too. Half of the moves take full steps, to separate resampled copies.
SETTLING_SCALES = (1.0, 1 / 4, 1.0, 1 / 16, 1.0, 1 / 64)

Progress = Callable[[int, int], object]
"""Told how many temperatures were just done, and how many the whole pass has."""


class Annealed(NamedTuple):
    """Walkers at the end of a ladder.

    Attributes:
        relative: The walkers, with potentials and log normalisers of the energy minus
            ``reference``.
        ladder: The ladder that they followed.
        moves: Statistics of the moves.
        reference: The site's ``reference`` during the run, ``batch``.
        num_pilot_evaluations: Energy evaluations of the pilot that chose the ladder.
    """

    relative: Ensemble
    ladder: Ladder
    moves: Moves
    reference: Array
    num_pilot_evaluations: int = 0

    @property
    def ensemble(self) -> Ensemble:
        """The walkers, with potentials and log normalisers of the energy itself."""
        return _absolute(self.relative, self.reference)


@jax.jit
def _absolute(ensemble: Ensemble, reference: Array) -> Ensemble:
    return ensemble._replace(
        potential=ensemble.potential + reference,
        log_normalizer=ensemble.log_normalizer - reference,
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bound", "params", "transform", "reference"],
    meta_fields=["name"],
)
@dataclass(frozen=True)
class SiteAtParams:
    """One energy site of a model at fixed unconstrained parameters.

    ``transform`` maps positions to values.  ``reference``, of the batch shape, is
    subtracted from the energy along the path: sums of log weights are then as small as
    the energy's variation, whatever constant it contains.
    """

    name: str
    bound: BoundModel
    params: Params
    transform: Transform
    reference: Array | None = None

    @property
    def distribution(self) -> EnergyDistribution:
        """The energy distribution, rebuilt in the current trace."""
        return self.bound.energies(self.params)[self.name]

    @property
    def dimension(self) -> int:
        """Number of elements of an event."""
        return math.prod(self.distribution.event_shape)

    def path(self) -> Path:
        """The path from the starting distribution to the energy."""
        distribution, reference = self.distribution, self.reference
        path = annealing_path(
            distribution, starting_distribution(distribution, self.name), self.transform
        )
        if reference is None:
            return path

        return path._replace(
            difference=lambda position: path.difference(position) - reference
        )

    def draw(self, rng_key: Array, shape: tuple[int, int]) -> Array:
        """Exact draws from the starting distribution, as positions."""
        return self.transform.inv(
            starting_distribution(self.distribution, self.name).sample(rng_key, shape)
        )


def anneal_site(
    rng_key: Array,
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    *,
    num_chains: int,
    num_walkers: int,
    num_temperatures: int | None,
    progress: Progress | None = None,
) -> Annealed:
    """Fresh walkers at the site's parameters, from exact draws of its start.

    A pilot chooses the temperatures and step sizes.  Where the starting distribution
    already is the energy (ESS fraction over 0.9999), nothing is annealed.

    Args:
        rng_key: A JAX PRNG key.
        site: The site.
        kernel: How walkers move.
        options: See :class:`AnnealingOptions`.
        num_chains: Number of islands.
        num_walkers: Walkers per island.
        num_temperatures: Number of rungs; None takes 32 times the number the pilot
            needed, at least 128.
        progress: Called about twice a second with the number of temperatures done since
            the last call, and the total.
    """
    key_pilot, key_start, key_run = random.split(rng_key, 3)
    at_start, level = _at_start(site, key_pilot)
    site = replace(site, reference=level)

    if bool(at_start):
        step_size = jnp.full(
            site.distribution.batch_shape, initial_step_size(kernel, site.dimension)
        )
        ensemble = _exact_start(site, key_start, (num_chains, num_walkers))
        trivial = Ladder(jnp.zeros(()), jnp.ones(1), step_size[None])
        return Annealed(ensemble, trivial, unmoved(step_size), level, NUM_PILOT_WALKERS)

    # Pilot
    pilot, level = _pilot(site, kernel, options, key_pilot)
    # Take the reference at the energy's walkers: at the base's, D may be far larger.
    site = replace(site, reference=site.reference + level)
    rungs = int(pilot.num_rungs)
    if not bool(pilot.ladder.betas[rungs - 1] >= 1.0):
        raise ValueError(
            _why_annealing_stopped(
                site, key_pilot, pilot.ladder.betas[rungs - 1], rungs
            )
        )

    # Ladder
    if num_temperatures is None:
        # Powers of two, so that a few compiled lengths serve every call.
        num_temperatures = max(128, 2 ** math.ceil(math.log2(32 * rungs)))
    ladder = _refine(pilot, num_temperatures)

    # Anneal
    start = draw(site, key_start, (num_chains, num_walkers))
    annealed = follow(key_run, site, kernel, options, ladder, start, progress)
    per_rung = options.num_kernel_steps + NUM_SETTLING_MOVES
    return annealed._replace(
        num_pilot_evaluations=NUM_PILOT_WALKERS * (1 + rungs * per_rung)
    )


def follow(
    rng_key: Array,
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    ladder: Ladder,
    position: Array,
    progress: Progress | None = None,
) -> Annealed:
    """Carry walkers along a ladder in compiled pieces.

    They start at ``position``, which holds draws under U at ``ladder.start`` and is
    donated.
    """
    climb, total = _begin(site, position, ladder.start), ladder.betas.shape[0]
    done, length = 0, total if progress is None else 1

    while done < total:
        length = min(length, total - done)
        began = time.perf_counter()
        climb = _climb(
            site, kernel, options, rng_key, climb, ladder, done, done + length
        )
        done += length

        if progress is not None:
            jax.block_until_ready(climb)
            progress(length, total)
            # The first piece includes compilation, so its time gives no speed.
            length = (
                16
                if done == 1
                else max(
                    1, int(length * SECONDS_PER_PIECE / (time.perf_counter() - began))
                )
            )

    moves = climb.moves._replace(acceptance=climb.moves.acceptance / total)
    reference = (
        jnp.zeros_like(moves.acceptance) if site.reference is None else site.reference
    )
    return Annealed(climb.ensemble, ladder, moves, reference)


def resampled(rng_key: Array, annealed: Annealed) -> Array:
    """Equally weighted positions: every island resampled, with copies adjacent."""
    ensemble = annealed.relative
    everywhere = jnp.ones(ensemble.log_normalizer.shape, bool)
    return resample_islands(rng_key, ensemble, everywhere, systematic).position


@partial(jax.jit, static_argnames=("scales",))
def settle(
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_moves: int,
    scales: tuple[float, ...] = (1.0,),
) -> Array:
    """Move walkers under the energy itself by MALA.

    Step sizes are ``step_size`` times each of ``scales`` in turn.
    """
    evaluate = partial(evaluate_at, site.distribution, site.transform)
    factors = jnp.asarray(scales, step_size.dtype)

    def body(index: Array, state: KernelState) -> KernelState:
        here = step_size * factors[index % len(scales)]
        return MALA().step(random.fold_in(rng_key, index), state, evaluate, here)[0]

    return lax.fori_loop(0, num_moves, body, evaluate(position)).position


def _why_annealing_stopped(
    site: SiteAtParams, rng_key: Array, beta: Array, rungs: int
) -> str:
    difference = site.path().difference(site.draw(rng_key, (1, NUM_PILOT_WALKERS)))
    num_nan = int(jnp.sum(jnp.isnan(difference)))
    if num_nan:
        return (
            f"The energy of site '{site.name}' is NaN at {num_nan} of "
            f"{difference.size} draws of its base (or start), at the given parameters. "
            "Make it finite, or +inf, over the whole support: guard logarithms and "
            "roots, or choose a base with the energy's own support."
        )

    return (
        f"Annealing walkers of energy site '{site.name}' from its base to the given "
        f"parameters stopped at inverse temperature {float(beta):.3g} after {rungs} "
        "temperatures. The energy is far from the base, or not bounded below: rescale "
        "it, start from smaller parameters (a last layer of zeros starts at the base "
        "itself), or name a closer start=."
    )


@jax.jit
def _at_start(site: SiteAtParams, rng_key: Array) -> tuple[Array, Array]:
    """Whether the starting distribution already is the energy, and the level of D."""
    difference = site.path().difference(site.draw(rng_key, (1, NUM_PILOT_WALKERS)))
    return jnp.all(ess_fraction(-difference, axis=1) > 0.9999), _level(difference)


def _level(difference: Array) -> Array:
    """Median over walkers of the finite values, ``batch``; 0 where there are none."""
    level = jnp.nanmedian(
        jnp.where(jnp.isfinite(difference), difference, jnp.nan), axis=(0, 1)
    )
    return jnp.where(jnp.isnan(level), 0.0, level)


@partial(jax.jit, static_argnames=("kernel", "options"))
def _pilot(
    site: SiteAtParams, kernel: Kernel, options: AnnealingOptions, rng_key: Array
) -> tuple[Pilot, Array]:
    """The pilot run, and the level of D at its final walkers."""
    key_start, key_run = random.split(rng_key)
    position = site.draw(key_start, (1, NUM_PILOT_WALKERS))
    step_size = jnp.full(
        site.distribution.batch_shape, initial_step_size(kernel, site.dimension)
    )

    pilot = run_pilot(
        kernel,
        key_run,
        site.path(),
        position,
        step_size,
        options,
        max_rungs=MAX_PILOT_RUNGS,
    )
    return pilot, _level(pilot.difference)


@partial(jax.jit, static_argnames=("shape",))
def _exact_start(
    site: SiteAtParams, rng_key: Array, shape: tuple[int, int]
) -> Ensemble:
    path, position = site.path(), site.draw(rng_key, shape)
    difference = path.difference(position)
    return Ensemble(
        position,
        path.start(position) + difference,
        -difference,
        jnp.zeros_like(difference[:, 0]),
    )


_refine = jax.jit(refine_ladder, static_argnames=("num_temperatures",))


@partial(jax.jit, static_argnames=("shape",))
def draw(site: SiteAtParams, rng_key: Array, shape: tuple[int, int]) -> Array:
    """Exact draws from the site's starting distribution, as positions."""
    return site.draw(rng_key, shape)


@partial(jax.jit, donate_argnames=("position",))
def _begin(site: SiteAtParams, position: Array, beta: Array) -> Climb:
    return begin_climb(site.path(), position, beta)


@partial(jax.jit, static_argnames=("kernel", "options"), donate_argnames=("state",))
def _climb(
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    rng_key: Array,
    state: Climb,
    ladder: Ladder,
    first: int,
    last: int,
) -> Climb:
    return climb(kernel, rng_key, site.path(), state, ladder, options, first, last)
