"""Fresh walkers of an energy site: exact draws of its start, annealed to the energy."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.kernels.base import Kernel
from ebm_ppl.smc.annealing import NUM_SETTLING_MOVES, AnnealingOptions
from ebm_ppl.smc.ensemble import Ensemble, unmoved
from ebm_ppl.smc.path import Ladder
from ebm_ppl.smc.pilot import Pilot, refine_ladder, run_pilot
from ebm_ppl.smc.weights import ess_fraction
from ebm_ppl.walkers.follow import Annealed, draw, follow
from ebm_ppl.walkers.site import Progress, SiteAtParams

NUM_PILOT_WALKERS = 256

MAX_PILOT_RUNGS = 1000


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

    A pilot chooses the temperatures and tunes the kernel.  Where the starting distribution
    already is the energy (ESS fraction over 0.9999), nothing is annealed.

    Args:
        rng_key: A JAX PRNG key.
        site: The site.
        kernel: The Markov kernel.
        options: See :class:`AnnealingOptions`.
        num_chains: Number of islands.
        num_walkers: Walkers per island.
        num_temperatures: Number of rungs; None takes 32 times the number the pilot
            needed, at least 128.
        progress: Called about twice a second with the number of temperatures done since
            the last call, and the total.
    """
    key_pilot, key_start, key_run = random.split(rng_key, 3)
    at_start, level = level_at_start(site, key_pilot)
    site = replace(site, reference=level)

    if bool(at_start):
        ensemble = _exact_start(site, key_start, (num_chains, num_walkers))
        tunings = jax.tree.map(lambda leaf: leaf[None], site.init_tuning(kernel))
        trivial = Ladder(jnp.zeros(()), jnp.ones(1), tunings)
        return Annealed(ensemble, trivial, unmoved(level), level, NUM_PILOT_WALKERS)

    # Pilot
    site, pilot = pilot_at(site, kernel, options, key_pilot)
    rungs = int(pilot.num_rungs)
    if not reaches_energy(pilot):
        raise ValueError(
            _why_annealing_stopped(
                site, key_pilot, pilot.ladder.betas[rungs - 1], rungs
            )
        )

    # Ladder
    if num_temperatures is None:
        # Powers of two, so that a few compiled lengths serve every call.
        num_temperatures = max(128, 2 ** math.ceil(math.log2(32 * rungs)))
    ladder = refine(pilot, num_temperatures)

    # Anneal
    start = draw(site, key_start, (num_chains, num_walkers))
    annealed = follow(key_run, site, kernel, options, ladder, start, progress)
    per_rung = options.num_kernel_steps + NUM_SETTLING_MOVES
    return annealed._replace(
        num_pilot_evaluations=NUM_PILOT_WALKERS * (1 + rungs * per_rung)
    )


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


def pilot_at(
    site: SiteAtParams, kernel: Kernel, options: AnnealingOptions, rng_key: Array
) -> tuple[SiteAtParams, Pilot]:
    """A pilot to the site's parameters, and the site with its energy's level there.

    At the base's walkers, where ``site.reference`` is from, D may be far larger.
    """
    pilot, level = _pilot(site, kernel, options, rng_key)
    return replace(site, reference=site.reference + level), pilot


def reaches_energy(pilot: Pilot) -> bool:
    """Whether a pilot came to β = 1."""
    return bool(pilot.ladder.betas[int(pilot.num_rungs) - 1] >= 1.0)


@jax.jit
def level_at_start(site: SiteAtParams, rng_key: Array) -> tuple[Array, Array]:
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

    pilot = run_pilot(
        kernel,
        key_run,
        site.path(),
        position,
        site.init_tuning(kernel),
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


refine = jax.jit(refine_ladder, static_argnames=("num_temperatures",))
