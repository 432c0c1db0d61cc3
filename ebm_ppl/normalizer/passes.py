"""Passes of annealing at one energy site, and what they find.

They go to the energy, back from it, and back from data rows.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.energy.rounding import normalization_error
from ebm_ppl.energy.start import starting_distribution
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.normalizer.drift import changes
from ebm_ppl.normalizer.edges import has_edges, share_beyond
from ebm_ppl.normalizer.findings import Findings
from ebm_ppl.normalizer.flags import is_drift_suspicious
from ebm_ppl.normalizer.poles import steepest_fall
from ebm_ppl.normalizer.reach import share_unreached
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.passes import pass_of
from ebm_ppl.walkers.follow import Annealed, draw, follow
from ebm_ppl.walkers.placement import anneal_site
from ebm_ppl.walkers.settle import SETTLING_SCALES, resampled, settle
from ebm_ppl.walkers.site import Progress, SiteAtParams

NUM_START_DRAWS = 256

# Settling goes on while a drift is suspected: multiples of the settling moves, and the
# probability at which each test of a drift asks for the next stage.  On a narrow ridge
# walkers spread so slowly that only the sum of all stages shows it.
SETTLING_STAGES = ((1, 0.1), (1, 0.02), (2, 0.0))


@dataclass(frozen=True)
class Plan:
    """Settings of the passes."""

    method: str
    kernel: Kernel
    options: AnnealingOptions
    num_chains: int
    num_walkers: int
    num_temperatures: int | None
    num_settling_moves: int
    may_settle_longer: bool = True


class Passes(NamedTuple):
    """Result of :func:`run_passes`.

    Attributes:
        findings: Input of the certificate.
        forward: The forward pass's walkers.
        position: Equally weighted walkers, moved further under the energy itself,
            ``(num_chains, num_walkers, *batch, *event)``.
        num_evaluations: Energy evaluations spent.
    """

    findings: Findings
    forward: Annealed
    position: Array
    num_evaluations: int


def run_passes(
    rng_key: Array,
    site: SiteAtParams,
    plan: Plan,
    samples: Array | None,
    rows: Array | None,
    progress: Progress | None = None,
) -> Passes:
    """Run the passes that the method needs, and check them by walkers and data rows.

    One body: the passes, in order; each starts where another ends.
    """
    key_forward, key_resample, key_settle, key_reverse, key_data = random.split(
        rng_key, 5
    )
    kernel, options = plan.kernel, plan.options

    # Forward pass; a reverse pass from given draws uses only its ladder.
    forward = anneal_site(
        key_forward,
        site,
        kernel,
        options,
        num_chains=plan.num_chains,
        num_walkers=plan.num_walkers,
        num_temperatures=plan.num_temperatures,
        progress=progress,
    )
    site = replace(site, reference=forward.reference)
    num_walkers = plan.num_chains * plan.num_walkers
    per_pass = forward.ladder.betas.shape[0] * num_walkers * options.num_kernel_steps
    spent = per_pass + forward.num_pilot_evaluations

    if plan.method == "reverse" and _misses_part_of_the_start(site, key_data):
        raise ValueError(
            f"The energy of site '{site.name}' is infinite on part of its base's "
            "support, where a reverse pass never comes: 1/Ẑ would leave that part "
            "out. Use method='bracket' or 'forward', or a base with the smaller "
            "support."
        )

    # Reverse pass
    position = (
        resampled(key_resample, forward)
        if samples is None
        else site.transform.inv(samples)
    )
    reverse = drift = unreached = None

    if plan.method != "forward":
        position, drift, num_moves = _settle(key_settle, site, plan, forward, position)

        # A copy, because the pass donates its starting points.
        start = jnp.copy(position)
        backward = follow(
            key_reverse,
            site,
            kernel,
            options,
            forward.ladder.reverse(),
            start,
            progress,
        )
        weights = forward.relative.log_normalizers if samples is None else None
        reverse = pass_of(backward.relative, backward.moves, weights)
        spent += per_pass + num_moves * num_walkers

    # Data rows
    if rows is not None and plan.method != "reverse":
        unreached, more = share_unreached(
            key_data, site, forward, position, rows, kernel, options
        )
        spent += more

    findings = Findings(
        None if plan.method == "reverse" else pass_of(forward.relative, forward.moves),
        reverse,
        drift,
        unreached,
        _share_beyond(key_data, site, position),
        forward.reference,
        _magnitude(forward),
        math.prod(position.shape[2 + len(site.distribution.batch_shape) :])
        - steepest_fall(site, position),
        normalization_error(starting_distribution(site.distribution, site.name)),
    )

    return Passes(findings, forward, position, spent)


def _settle(
    rng_key: Array, site: SiteAtParams, plan: Plan, forward: Annealed, position: Array
) -> tuple[Array, Array, int]:
    """Move walkers further under the energy.

    Returns:
        Their positions, the changes of their statistics, and the moves per walker.
    """
    tuning, num_moves = forward.ladder.tuning(-1), plan.num_settling_moves
    before, total = position, 0

    keys = random.split(rng_key, len(SETTLING_STAGES))
    for key, (factor, suspicion) in zip(keys, SETTLING_STAGES, strict=True):
        position = settle(
            site,
            plan.kernel,
            key,
            position,
            tuning,
            factor * num_moves,
            SETTLING_SCALES,
        )
        total += factor * num_moves
        drift = changes(site, before, position)

        # More moves tell whether a suspected drift is real, and bring the walkers
        # nearer to equilibrium.
        if not (plan.may_settle_longer and is_drift_suspicious(drift, suspicion)):
            break

    return position, drift, total


def _misses_part_of_the_start(site: SiteAtParams, rng_key: Array) -> bool:
    return bool(
        jnp.any(
            jnp.isposinf(
                site.path().difference(site.draw(rng_key, (1, NUM_START_DRAWS)))
            )
        )
    )


def _share_beyond(rng_key: Array, site: SiteAtParams, position: Array) -> Array:
    """Share of the density beyond the range of floating point.

    The larger of the shares of the energy's density and of its start's.
    """
    batch_shape = site.distribution.batch_shape
    if not has_edges(site.transform):
        return jnp.zeros(batch_shape)
    start = draw(site, rng_key, (position.shape[0], position.shape[1]))
    return jnp.maximum(
        *(share_beyond(site.transform, u, len(batch_shape)) for u in (start, position))
    )


@jax.jit
def _magnitude(forward: Annealed) -> Array:
    """Absolute size of the energy's values, ``batch``."""
    ensemble = forward.relative
    weights = jax.nn.softmax(ensemble.log_weight, axis=1) / ensemble.log_weight.shape[0]
    potential = jnp.abs(ensemble.potential + forward.reference)
    usual = jnp.sum(jnp.where(weights > 0, weights * potential, 0.0), axis=(0, 1))
    return jnp.maximum(jnp.abs(forward.reference), usual)
