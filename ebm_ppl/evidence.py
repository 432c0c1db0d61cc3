"""Evidence about log Z at one energy site: annealing to it, back from it, and back from data."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike

from ebm_ppl.annealing import AnnealingOptions
from ebm_ppl.certificate import UNREACHED_NATS, Evidence, pass_of
from ebm_ppl.distribution import unwrap
from ebm_ppl.inspection import unmasked
from ebm_ppl.kernels import Kernel
from ebm_ppl.model import BoundModel, Observation, Params, observations
from ebm_ppl.placement import (
    Annealed,
    Progress,
    SiteAtParams,
    anneal_site,
    follow,
    resampled,
    settle,
)
from ebm_ppl.weights import jackknife_log_mean_exp

MAX_DATA_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """How evidence is gathered."""

    method: str
    kernel: Kernel
    options: AnnealingOptions
    num_chains: int
    num_walkers: int
    num_temperatures: int | None
    num_settling_moves: int


def gather(
    rng_key: Array,
    site: SiteAtParams,
    plan: Plan,
    samples: Array | None,
    rows: Array | None,
    progress: Progress,
) -> tuple[Evidence, Annealed, int]:
    """The passes that the method asks for, the forward one's walkers, and the cost in energy evaluations."""
    key_forward, key_resample, key_settle, key_reverse, key_data = random.split(rng_key, 5)
    kernel, options = plan.kernel, plan.options
    num_walkers = plan.num_chains * plan.num_walkers
    # A reverse pass from given draws needs the forward pass for its ladder alone.
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
    num_temperatures = forward.ladder.betas.shape[0]
    per_pass = num_temperatures * num_walkers * options.num_kernel_steps
    spent = per_pass + forward.num_pilot_evaluations
    reverse = drift = None
    if plan.method == "reverse" and _misses_part_of_the_start(site, key_data):
        raise ValueError(
            f"The energy of site '{site.name}' is infinite on part of its base's support, where a reverse pass "
            "never comes: 1/Ẑ would leave that part out. Use method='bracket' or 'forward', or a base with the smaller "
            "support."
        )
    if plan.method != "forward":
        down = forward.ladder.reverse()
        start = resampled(key_resample, forward) if samples is None else site.transform.inv(samples)
        position, drift = settle(site, key_settle, start, forward.ladder.step_sizes[-1], plan.num_settling_moves)
        spent += plan.num_settling_moves * num_walkers
        backward = follow(key_reverse, site, kernel, options, down, position, progress)
        spent += per_pass
        weights = forward.ensemble.log_normalizers if samples is None else None
        reverse = pass_of(backward.ensemble, backward.moves, weights)
    unreached = None
    if rows is not None and plan.method != "reverse":
        alone = options._replace(ess_threshold=0.0)
        back = follow(key_data, site, kernel, alone, forward.ladder.reverse(), site.transform.inv(rows))
        unreached = _share_unreached(back, forward)
        spent += num_temperatures * rows.shape[1] * options.num_kernel_steps
    forward_pass = None if plan.method == "reverse" else pass_of(forward.ensemble, forward.moves)
    return Evidence(forward_pass, reverse, drift, unreached), forward, spent


def _misses_part_of_the_start(site: SiteAtParams, rng_key: Array) -> bool:
    return bool(jnp.any(jnp.isposinf(site.path().difference(site.draw(rng_key, (1, MAX_DATA_ROWS))))))


def _share_unreached(back: Annealed, forward: Annealed) -> Array:
    """Share of data rows where annealing from the base arrives far more rarely than the model says.

    A trajectory that ends at a row and is followed back to the base weighs, on average, the density of forward
    annealing's unweighted endpoints there over base·exp(−E); times Ẑ this is about 1 wherever annealing leads.
    """
    log_z, _ = jackknife_log_mean_exp(forward.ensemble.log_normalizers)
    ratio = back.ensemble.log_weight[0] + log_z
    return jnp.mean(~(ratio >= -UNREACHED_NATS), axis=0)


def given_samples(site: SiteAtParams, samples: Mapping[str, ArrayLike], num_chains: int, num_walkers: int) -> Array:
    """Draws of the model that a user gave for one site, checked.

    Raises:
        ValueError: The site is missing, or the shape is not ``(num_chains, num_walkers, *batch, *event)``.
    """
    if site.name not in samples:
        raise ValueError(f"samples has sites {sorted(samples)}; expected energy site '{site.name}' among them.")
    distribution = site.distribution
    given = jnp.asarray(samples[site.name], float)
    expected = (num_chains, num_walkers, *distribution.batch_shape, *distribution.event_shape)
    if given.shape != expected:
        raise ValueError(
            f"samples['{site.name}'] has shape {given.shape}; expected (num_chains, num_walkers, *batch_shape, "
            f"*event_shape) = {expected}. Pass num_chains= and num_walkers=, or reshape the draws."
        )
    return given


def _observed(bound: BoundModel, params: Params) -> dict[str, Observation]:
    """Data with every plate at its full size, or, where a batch came in from outside, as they came."""
    arguments = (bound.rng_key, bound.model, params, bound.arguments)
    full = observations(*arguments)
    try:
        for found in full.values():
            np.broadcast_shapes(jnp.shape(found.value), found.distribution.shape())
    except ValueError:
        return observations(*arguments, full_plates=False)
    return full


def data_rows(bound: BoundModel, params: Params, max_rows: int = MAX_DATA_ROWS) -> dict[str, Array]:
    """Up to ``max_rows`` usable rows of every observed energy site, ``(1, rows, *batch, *event)``."""
    rows = {}
    for name, found in _observed(bound, params).items():
        energy = unwrap(found.distribution)
        if energy is None or isinstance(found.value, jax.core.Tracer) or energy.support.is_discrete:
            continue
        own_shape = energy.batch_shape + energy.event_shape
        values = np.broadcast_to(np.asarray(found.value), found.distribution.shape()).reshape(-1, *own_shape)
        num_rows = len(values)
        checks = (np.isfinite(values), np.asarray(energy.support(values)), unmasked(found.distribution))
        values = values[np.all([check.reshape(num_rows, -1).all(1) for check in checks], axis=0)]
        if not len(values):
            continue
        chosen = np.unique(np.linspace(0, len(values) - 1, max_rows).astype(int))
        rows[name] = jnp.asarray(values[chosen], float)[None]
    return rows
