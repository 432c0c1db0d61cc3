"""Walkers carried along a ladder in compiled pieces."""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.kernels.base import Kernel
from ebm_ppl.smc.annealing import (
    Annealing,
    AnnealingOptions,
    begin_annealing,
    follow_rungs,
)
from ebm_ppl.smc.ensemble import Ensemble, Moves
from ebm_ppl.smc.path import Ladder
from ebm_ppl.walkers.site import Progress, SiteAtParams

SECONDS_PER_PIECE = 0.5
# Ladders are lengthened to a multiple of this, so that one program follows them all.
LADDER_LENGTH = 1024


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
        return absolute(self.relative, self.reference)


@jax.jit
def absolute(ensemble: Ensemble, reference: Array) -> Ensemble:
    """Walkers whose energies had a reference taken off, with the energies themselves."""
    return ensemble._replace(
        potential=ensemble.potential + reference,
        past=ensemble.past - reference,
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
    annealing = _begin(site, kernel, position, ladder.start)
    total, long_enough = ladder.betas.shape[0], _lengthened(ladder)
    done, length = 0, total if progress is None else 1

    while done < total:
        length = min(length, total - done)
        began = time.perf_counter()
        annealing = advance_piece(
            site,
            kernel,
            options,
            rng_key,
            annealing,
            long_enough,
            done,
            done + length,
        )
        done += length

        if progress is not None:
            jax.block_until_ready(annealing)
            progress(length, total)
            # The first piece includes compilation, so its time gives no speed.
            length = (
                16
                if done == 1
                else max(
                    1, int(length * SECONDS_PER_PIECE / (time.perf_counter() - began))
                )
            )

    moves = annealing.moves._replace(acceptance=annealing.moves.acceptance / total)
    reference = (
        jnp.zeros_like(moves.acceptance) if site.reference is None else site.reference
    )
    return Annealed(annealing.ensemble, ladder, moves, reference)


@jax.jit
def _lengthened(ladder: Ladder) -> Ladder:
    """A ladder with its last rung repeated, which nobody follows to the end."""
    missing = -ladder.betas.shape[0] % LADDER_LENGTH

    def lengthen(leaf: Array) -> Array:
        return jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)), mode="edge")

    betas, tunings = jax.tree.map(lengthen, (ladder.betas, ladder.tunings))
    return ladder._replace(betas=betas, tunings=tunings)


@partial(jax.jit, static_argnames=("shape",))
def draw(site: SiteAtParams, rng_key: Array, shape: tuple[int, int]) -> Array:
    """Exact draws from the site's starting distribution, as positions."""
    return site.draw(rng_key, shape)


@partial(jax.jit, static_argnames=("kernel",), donate_argnames=("position",))
def _begin(
    site: SiteAtParams, kernel: Kernel, position: Array, beta: Array
) -> Annealing:
    return begin_annealing(kernel, site.path(), position, beta)


@partial(jax.jit, static_argnames=("kernel", "options"), donate_argnames=("state",))
def advance_piece(
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    rng_key: Array,
    state: Annealing,
    ladder: Ladder,
    first: int,
    last: int,
) -> Annealing:
    """Carry walkers over some of a ladder's temperatures."""
    return follow_rungs(
        kernel, rng_key, site.path(), state, ladder, options, first, last
    )
