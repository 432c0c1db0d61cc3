"""Islands renewed by the clock, so that none learns for long from its own walkers.

An update follows the noise of the training islands' gradient, and the same walkers are
then reweighted by that very move: an island that trains counts its log Z too small, a
little more at every update, and the parameters follow.  One that has not trained is
right.  So every so many updates the oldest training islands leave, those held out begin
to train, and as many fresh ones, annealed from exact draws of the start to the present
parameters, are held out instead.  Their ladder comes from a pilot of its own, and the
clock looks at nothing, so their log Z is unbiased given the path of the parameters.
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
from ebm_ppl.backends.jarzynski.placement import annealing_options, place_for
from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.backends.jarzynski.warnings import warn_where_log_z_drifted
from ebm_ppl.errors import level_of_caller
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.path import Ladder
from ebm_ppl.walkers.follow import absolute
from ebm_ppl.walkers.placement import level_at_start, pilot_at, reaches_energy, refine
from ebm_ppl.walkers.site import SiteAtParams
from ebm_ppl.walkers.state import Walkers

# Moves of a renewal for every temperature that its pilot needed.
PER_RUNG = 4
MAX_MOVES = 8
# Turns, at most, along ladders chosen once.
MAX_TURNS = 8


def renewed(
    backend: Any, state: JarzynskiState, arguments: Arguments
) -> JarzynskiState:
    """The state with its oldest islands replaced, and the clock set again.

    A site whose energy annealing does not reach keeps its islands, and a warning says
    so.

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
            line = _line(backend, site, key_pilot)
            if line is None:
                _warn_of(name)
                continue
            lines[name] = line

        turned, is_done = _turned(
            replace(site, reference=lines[name].reference),
            backend.kernel.exactly(),
            annealing_options(backend, int(lines[name].num_moves)),
            key_islands,
            lines[name].ladder,
            old,
            num_renewed(old),
        )
        walkers[name] = jax.tree.map(_on_the_devices_of, old, turned)
        if not bool(is_done):
            _warn_of(name)

    clock = _wound(backend, clock, lines, state.walkers, is_new_turn)
    return replace(state, walkers=walkers, clock=clock, rng_key=key_next)


def with_fresh_log_z(
    backend: Any,
    rng_key: Array,
    state: JarzynskiState,
    arguments: Arguments,
    num_temperatures: int,
) -> JarzynskiState:
    """The state with all held-out islands replaced, along a ladder as long as asked."""
    bound = BoundModel(backend.model, state.transforms, rng_key, arguments)
    walkers = {}
    for index, (name, old) in enumerate(state.walkers.items()):
        fresh = place_for(
            backend,
            random.fold_in(rng_key, index),
            name,
            bound,
            state.params,
            num_chains=backend.num_holdout_chains,
            num_temperatures=num_temperatures,
            transform=old.transform,
        )

        split = old.num_training_chains
        ensemble = jax.tree.map(
            lambda kept, new, split=split: jnp.concatenate([kept[:split], new]),
            old.ensemble,
            fresh.ensemble,
        )
        walkers[name] = replace(old, ensemble=ensemble)
        warn_where_log_z_drifted(name, old, walkers[name])
    return replace(state, walkers=walkers)


def num_renewed(walkers: Walkers) -> int:
    """Islands that one renewal replaces."""
    return min(walkers.num_holdout_chains, walkers.num_training_chains)


def _line(backend: Any, site: SiteAtParams, rng_key: Array) -> Line | None:
    """A ladder to the energy at the present parameters; None if it is out of reach."""
    kernel, (_, level) = backend.kernel.exactly(), level_at_start(site, rng_key)
    site, pilot = pilot_at(
        replace(site, reference=level), kernel, annealing_options(backend, 1), rng_key
    )
    if not reaches_energy(pilot):
        return None

    wanted = PER_RUNG * int(pilot.num_rungs) / NUM_TEMPERATURES
    num_moves = min(MAX_MOVES, 2 ** max(0, math.ceil(math.log2(wanted))))
    assert site.reference is not None
    return Line(refine(pilot, NUM_TEMPERATURES), count(num_moves), site.reference)


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
    num_moves = max(int(line.num_moves) for line in lines.values())
    left = count(backend.renew_every * num_moves)
    if not is_new_turn:
        return Clock(left, clock.until_pilot - 1, clock.num_pilots, lines)

    turn = min(
        math.ceil(site.log_weight.shape[0] / num_renewed(site))
        for site in walkers.values()
    )
    num_turns = min(2 ** int(clock.num_pilots), MAX_TURNS)
    return Clock(left, count(turn * num_turns - 1), clock.num_pilots + 1, lines)


@partial(jax.jit, static_argnames=("kernel", "options", "num_new"))
def _turned(
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    rng_key: Array,
    ladder: Ladder,
    walkers: Walkers,
    num_new: int,
) -> tuple[Walkers, Array]:
    """Walkers without the oldest islands, fresh ones at their end.

    The saved gradient stays, for one update, that of the islands that made it.

    Returns:
        The walkers, or the old ones where an island died on the way; and whether none
        did.
    """
    key_start, key_run = random.split(rng_key)
    position = site.draw(key_start, (num_new, walkers.log_weight.shape[1]))
    relative, _ = anneal(kernel, key_run, site.path(), position, ladder, options)
    assert site.reference is not None
    fresh = absolute(relative, site.reference)
    is_done = jnp.all(jnp.isfinite(fresh.log_normalizers))

    ensemble = jax.tree.map(
        lambda old, new: jnp.where(
            is_done, jnp.concatenate([old[num_new:], new.astype(old.dtype)]), old
        ),
        walkers.ensemble,
        fresh,
    )
    return replace(walkers, ensemble=ensemble), is_done


def _on_the_devices_of(old: Array, new: Array) -> Array:
    """The new array, spread over devices as the old one was."""
    if new.sharding.is_equivalent_to(old.sharding, old.ndim):
        return new
    return jax.device_put(new, old.sharding)


def _warn_of(name: str) -> None:
    warnings.warn(
        f"The walkers of energy site '{name}' could not be renewed: annealing from its "
        "start did not reach the energy at the present parameters, so the old ones "
        "went on, and what they learned from themselves stays in the fit. Name a "
        "closer start= or base, or lower the learning rate.",
        stacklevel=level_of_caller(),
    )
