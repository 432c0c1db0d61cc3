"""Approximate draws of an energy by annealed sequential Monte Carlo."""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random

from ebm_ppl.energy.coordinates import standardizing_transform
from ebm_ppl.energy.start import annealing_path
from ebm_ppl.energy.unnormalized import Unnormalized
from ebm_ppl.errors import at_site
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.smc.annealing import AnnealingOptions, anneal
from ebm_ppl.smc.pilot import refine_ladder, run_pilot
from ebm_ppl.smc.resampling import multinomial, systematic

NUM_WALKERS = 256
NUM_TEMPERATURES = 256


def draw_annealed(
    rng_key: Array,
    distribution: Unnormalized,
    start: dist.Distribution,
    sample_shape: tuple[int, ...],
) -> Array:
    """Draws picked by weight from one population that was annealed from ``start``.

    Returns:
        ``(*sample_shape, *batch_shape, *event_shape)``.
    """
    key_pilot, key_start, key_run, key_pick, key_order = random.split(rng_key, 5)
    key_pilot, key_pilot_start = random.split(key_pilot)
    batch_shape, event_shape = distribution.batch_shape, distribution.event_shape
    count, transform = math.prod(sample_shape), standardizing_transform(start)
    path = annealing_path(distribution, start, transform)
    options = AnnealingOptions(1, ess_threshold=0.5, resampling=systematic)
    kernel = MALA()

    def exact(key: Array, num: int) -> Array:
        return transform.inv(start.sample(key, (1, num)))

    # Ladder
    pilot = run_pilot(
        kernel,
        key_pilot,
        path,
        exact(key_pilot_start, NUM_WALKERS),
        kernel.init_tuning(math.prod(event_shape), batch_shape),
        options,
        max_rungs=NUM_TEMPERATURES,
    )
    ladder = refine_ladder(pilot, NUM_TEMPERATURES)

    # Anneal
    position = exact(key_start, max(count, NUM_WALKERS))
    ensemble, _ = anneal(kernel, key_run, path, position, ladder, options)
    values = transform(ensemble.position[0])
    log_weight = jnp.moveaxis(ensemble.log_weight[0], 0, -1)
    log_weight = log_weight.reshape(-1, values.shape[0])

    # Pick, in random order
    num_elements = log_weight.shape[0]
    picked = jax.vmap(multinomial)(random.split(key_pick, num_elements), log_weight)
    keys = random.split(key_order, num_elements)
    picked = jax.vmap(random.permutation)(keys, picked)[:, :count]
    picked = jnp.moveaxis(picked.reshape((*batch_shape, count)), -1, 0)

    indices = picked.reshape(picked.shape + (1,) * len(event_shape))
    draws = jnp.take_along_axis(values, indices, axis=0)
    return draws.reshape(sample_shape + batch_shape + event_shape)


def no_key(name: str | None) -> str:
    """Message for an energy that is to be drawn without a PRNG key."""
    return (
        f"The energy{at_site(name)} is to be drawn, and there is no key: give it data "
        "(obs=; obs_mask= would make its masked rows latent, where "
        "numpyro.handlers.mask leaves them out), or run the model under "
        "numpyro.handlers.seed or Predictive."
    )
