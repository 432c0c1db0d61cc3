"""Islands renewed by the clock, so that none learns for long from its own walkers.

An update follows the noise of the training islands' gradient, and the same walkers are
then reweighted by that very move: an island that trains counts its log Z too small, a
little more at every update, and the parameters follow.  One that has not trained is
right.  So every so many updates the oldest training islands leave, those held out begin
to train, and as many fresh ones, annealed from exact draws of the start to the present
parameters, are held out instead.  Their ladder comes from a pilot of its own, and the
clock counts updates alone, so their log Z is unbiased given the path of the parameters.
Only where fresh islands miss what old ones know is a renewal left out.
"""

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.backends.jarzynski.clock import NUM_TEMPERATURES, Clock, Line, count
from ebm_ppl.backends.jarzynski.fresh_islands import doubt
from ebm_ppl.backends.jarzynski.placement import annealing_options
from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.errors import level_of_caller
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.ensemble import Ensemble
from ebm_ppl.smc.path import stretch
from ebm_ppl.walkers.follow import absolute
from ebm_ppl.walkers.placement import level_at_start, pilot_at, reaches_energy, refine
from ebm_ppl.walkers.site import SiteAtParams
from ebm_ppl.walkers.state import Walkers

# Temperatures of a renewal for each that its pilot needed.
PER_RUNG = 4
# Turns, at most, along ladders chosen once; and periods until another try.
MAX_TURNS = 8
# Where fresh islands are in doubt, as many times more temperatures, up to this many times.
TIMES_HARDER, MAX_TIMES = 4, 64


def renewed(
    backend: Any, state: JarzynskiState, arguments: Arguments
) -> JarzynskiState:
    """The state with its oldest islands replaced, and the clock set again.

    Where annealing does not reach a site's energy, all islands stay, and a warning says
    so.  Where it misses part of one they stay too: the next time has more temperatures,
    and the warning comes when there may be no more.

    Args:
        backend: A :class:`Jarzynski`.
        state: The state; its clock has run out.
        arguments: The model's arguments.
    """
    clock = state.clock
    assert clock is not None
    key, key_next = random.split(state.rng_key)
    bound = BoundModel(backend.model, state.transforms, key, arguments)
    walkers, lines = dict(state.walkers), dict(clock.lines)
    is_new_turn = int(clock.until_pilot) == 0

    for index, (name, old) in enumerate(state.walkers.items()):
        key_pilot, key_islands = random.split(random.fold_in(key, index))
        site = SiteAtParams(name, bound, state.params, old.transform)
        if is_new_turn:
            line = _line(backend, site, key_pilot, int(lines[name].times))
            if line is None:
                return _postponed(backend, state, key_next, _out_of_reach(name))
            lines[name] = line

        turned, is_done = _along(backend, site, lines[name], key_islands, old)
        if not bool(is_done):
            return _postponed(backend, state, key_next, _out_of_reach(name))
        if why := doubt(*_groups(old, turned)):
            times = TIMES_HARDER * int(lines[name].times)
            if times > MAX_TIMES:
                return _postponed(backend, state, key_next, _missing(name, why))
            lines[name] = lines[name]._replace(times=count(times))
            clock = replace(clock, left=count(backend.renew_every * times), lines=lines)
            return replace(state, clock=clock, rng_key=key_next)
        walkers[name] = jax.tree.map(_on_the_devices_of, old, turned)

    clock = _wound(backend, clock, lines, state.walkers, is_new_turn)
    return replace(state, walkers=walkers, clock=clock, rng_key=key_next)


def _postponed(
    backend: Any, state: JarzynskiState, rng_key: Array, why: str
) -> JarzynskiState:
    """The state with all its islands, and another try, with new ladders, much later."""
    warnings.warn(why, stacklevel=level_of_caller())
    clock = state.clock
    assert clock is not None
    times = max(int(line.times) for line in clock.lines.values())
    left = count(max(MAX_TURNS, times) * backend.renew_every)
    clock = replace(clock, left=left, until_pilot=count(0))
    return replace(state, clock=clock, rng_key=rng_key)


def num_renewed(walkers: Walkers) -> int:
    """Islands that one renewal replaces."""
    return min(walkers.num_holdout_chains, walkers.num_training_chains)


def _groups(old: Walkers, turned: Walkers) -> tuple[Ensemble, Ensemble, Ensemble]:
    """Islands that train, those held out until now, and fresh ones."""
    split, num_new = old.num_training_chains, num_renewed(old)

    def part(ensemble: Ensemble, islands: slice) -> Ensemble:
        return jax.tree.map(lambda leaf: leaf[islands], ensemble)

    return (
        part(old.ensemble, slice(split)),
        part(old.ensemble, slice(split, None)),
        part(turned.ensemble, slice(-num_new, None)),
    )


def _line(backend: Any, site: SiteAtParams, rng_key: Array, least: int) -> Line | None:
    """A ladder to the energy at the present parameters; None if it is out of reach.

    It is to be followed in ``least`` times as many temperatures, or more.
    """
    kernel, (_, level) = backend.kernel.exactly(), level_at_start(site, rng_key)
    options = annealing_options(backend)
    at_level = replace(site, reference=level)
    at_level, pilot = pilot_at(at_level, kernel, options, rng_key)
    rungs = int(pilot.num_rungs)
    if not reaches_energy(pilot) or rungs > NUM_TEMPERATURES:
        return None

    times = 2 ** math.ceil(math.log2(max(least, PER_RUNG * rungs / NUM_TEMPERATURES)))
    assert at_level.reference is not None
    return Line(refine(pilot, NUM_TEMPERATURES), count(times), at_level.reference)


def _missing(name: str, why: str) -> str:
    return (
        f"The walkers of energy site '{name}' are not renewed: of fresh islands, {why}, "
        "so annealing from the base misses a part of the energy that they know, such as "
        "a narrow mode, or finds it only now and then. What walkers learn from "
        "themselves stays in the fit. Name a closer start= or base, take more "
        "num_walkers, and check the fit with ebm_ppl.score_test(...)."
    )


def _wound(
    backend: Any,
    clock: Clock,
    lines: dict[str, Line],
    walkers: dict[str, Walkers],
    is_new_turn: bool,
) -> Clock:
    """The clock after a renewal.

    A turn replaces every island once.  Ladders are chosen after one turn, two more, four
    more, and so on: parameters move less and less.
    """
    times = max(int(line.times) for line in lines.values())
    left = count(backend.renew_every * times)
    if not is_new_turn:
        return Clock(left, clock.until_pilot - 1, clock.num_pilots, lines)

    turn = min(
        math.ceil(site.log_weight.shape[0] / num_renewed(site))
        for site in walkers.values()
    )
    num_turns = min(2 ** int(clock.num_pilots), MAX_TURNS)
    return Clock(left, count(turn * num_turns - 1), clock.num_pilots + 1, lines)


def _along(
    backend: Any, site: SiteAtParams, line: Line, rng_key: Array, old: Walkers
) -> tuple[Walkers, Array]:
    """:func:`_turned` along a line, by the backend's kernel."""
    return _turned(
        replace(site, reference=line.reference),
        backend.kernel.exactly(),
        annealing_options(backend),
        rng_key,
        line,
        old,
        num_renewed(old),
    )


@partial(jax.jit, static_argnames=("kernel", "options", "num_new"))
def _turned(
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    rng_key: Array,
    line: Line,
    walkers: Walkers,
    num_new: int,
) -> tuple[Walkers, Array]:
    """Walkers without the oldest islands, fresh ones at their end.

    The saved gradient stays, for one update, that of the islands that made it.

    Returns:
        The walkers, and whether no island died on the way.
    """
    key_start, key_run = random.split(rng_key)
    position = site.draw(key_start, (num_new, walkers.log_weight.shape[1]))
    ladder = stretch(line.ladder, line.times, MAX_TIMES)
    num_temperatures = line.times * NUM_TEMPERATURES
    relative, _ = anneal(
        kernel, key_run, site.path(), position, ladder, options, num_temperatures
    )
    assert site.reference is not None
    fresh = absolute(relative, site.reference)
    is_done = jnp.all(jnp.isfinite(fresh.log_normalizers))

    ensemble = jax.tree.map(
        lambda old, new: jnp.concatenate([old[num_new:], new.astype(old.dtype)]),
        walkers.ensemble,
        fresh,
    )
    return replace(walkers, ensemble=ensemble), is_done


def _on_the_devices_of(old: Array, new: Array) -> Array:
    """The new array, spread over devices as the old one was."""
    if new.sharding.is_equivalent_to(old.sharding, old.ndim):
        return new
    return jax.device_put(new, old.sharding)


def _out_of_reach(name: str) -> str:
    return (
        f"The walkers of energy site '{name}' could not be renewed: annealing from its "
        "start does not reach the energy at the present parameters in a few hundred "
        "moves, so the old ones go on, and what they learned from themselves stays in "
        "the fit. Name a closer start= or base, or lower the learning rate."
    )
