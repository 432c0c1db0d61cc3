"""Walkers moved on under the energy itself."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.energy.start import target_of
from ebm_ppl.kernels.base import Kernel, KernelState, Tuning
from ebm_ppl.smc.ensemble import resample_islands
from ebm_ppl.smc.resampling import systematic
from ebm_ppl.walkers.follow import Annealed
from ebm_ppl.walkers.site import SiteAtParams

# Moves into places much narrower than the step size are rejected, so smaller steps are
# taken too. Half of the moves take full steps, to separate resampled copies.
SETTLING_SCALES = (1.0, 1 / 4, 1.0, 1 / 16, 1.0, 1 / 64)


@jax.jit
def resampled(rng_key: Array, annealed: Annealed) -> Array:
    """Equally weighted positions: every island resampled, with copies adjacent."""
    ensemble = annealed.relative
    everywhere = jnp.ones(ensemble.past.shape, bool)
    return resample_islands(rng_key, ensemble, everywhere, systematic).position


@partial(jax.jit, static_argnames=("kernel", "scales"))
def settle(
    site: SiteAtParams,
    kernel: Kernel,
    rng_key: Array,
    position: Array,
    tuning: Tuning,
    num_moves: int,
    scales: tuple[float, ...] = (1.0,),
) -> Array:
    """Move walkers under the energy itself, by the exact form of ``kernel``.

    Steps are as long as tuned times each of ``scales`` in turn.
    """
    target, kernel = target_of(site.distribution, site.transform), kernel.exactly()
    factors = jnp.asarray(scales, position.dtype)

    def body(index: Array, state: KernelState) -> KernelState:
        here = kernel.scaled(tuning, factors[index % len(scales)])
        return kernel.step(random.fold_in(rng_key, index), state, target, here)[0]

    first = kernel.evaluate(target, position)
    return lax.fori_loop(0, num_moves, body, first).position
