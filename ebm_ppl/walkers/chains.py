"""MALA and NUTS chains for one site at fixed parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.infer import MCMC, NUTS

from ebm_ppl.energy.start import potential_at, target_of
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.walkers.site import SiteAtParams


@partial(jax.jit, static_argnames=("num_moves",))
def warm_up(
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_moves: int,
) -> tuple[Array, Array]:
    """MALA that adapts its step size to the mean acceptance, with decreasing gain."""
    kernel, target = MALA(), target_of(site.distribution, site.transform)

    def step(
        carry: tuple[Any, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Any, Array], None]:
        state, step_size = carry
        key, gain = inputs
        state, info = kernel.step(key, state, target, step_size)
        acceptance = jnp.mean(info.acceptance, axis=0)
        return (state, kernel.adapt(step_size, acceptance, gain)), None

    gains = 1.0 / jnp.sqrt(1.0 + jnp.arange(num_moves))
    (state, step_size), _ = lax.scan(
        step,
        (kernel.evaluate(target, position), step_size),
        (random.split(rng_key, num_moves), gains),
    )
    return state.position, step_size


def run_chains(
    method: str,
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_draws: int,
    num_warmup: int,
    thinning: int,
) -> Array:
    """Chains from given positions, by MALA or NUTS."""
    if method == "mala":
        return _mala(site, rng_key, position, step_size, num_draws, thinning)
    return _nuts(site, rng_key, position, num_draws, num_warmup, thinning)


@partial(jax.jit, static_argnames=("num_draws", "thinning"))
def _mala(
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_draws: int,
    thinning: int,
) -> Array:
    kernel, target = MALA(), target_of(site.distribution, site.transform)

    def draw(state: Any, keys: Array) -> tuple[Any, Array]:
        state, _ = lax.scan(
            lambda s, key: (kernel.step(key, s, target, step_size)[0], None),
            state,
            keys,
        )
        return state, state.position

    keys = random.split(rng_key, (num_draws, thinning))
    first = kernel.evaluate(target, position)
    return jnp.moveaxis(lax.scan(draw, first, keys)[1], 0, 1)


def _nuts(
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    num_draws: int,
    num_warmup: int,
    thinning: int,
) -> Array:
    def potential(position: Array) -> Array:
        return jnp.sum(potential_at(site.distribution, site.transform, position))

    num_chains = position.shape[0]
    mcmc = MCMC(
        NUTS(potential_fn=potential),
        num_warmup=num_warmup,
        num_samples=num_draws * thinning,
        num_chains=num_chains,
        thinning=thinning,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(rng_key, init_params=position if num_chains > 1 else position[0])
    return mcmc.get_samples(group_by_chain=True)
