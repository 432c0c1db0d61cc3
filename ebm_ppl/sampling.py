"""Draws of x from energies at fixed parameters, as chains that ArviZ can judge."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.typing import ArrayLike
from numpyro.infer import MCMC, NUTS

from ebm_ppl.annealing import AnnealingOptions
from ebm_ppl.distribution import (
    EnergyDistribution,
    evaluate_at,
    potential_at,
    starting_distribution,
)
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import bind
from ebm_ppl.kernels import MALA, adapt_step_size, initial_step_size
from ebm_ppl.model import Model, Params
from ebm_ppl.placement import SiteAtParams, anneal_site, resampled, settle
from ebm_ppl.resampling import systematic

METHODS = ("smc", "mala", "nuts")
# Walkers that a chain's first point is picked from.
POOL = 64


def sample(
    rng_key: Array,
    model: Model | EnergyDistribution,
    params: Params | None = None,
    *args: Any,
    method: str = "smc",
    num_chains: int = 4,
    num_draws: int = 1000,
    num_temperatures: int | None = None,
    num_warmup: int = 500,
    thinning: int = 1,
    initial: Mapping[str, ArrayLike] | None = None,
    **kwargs: Any,
) -> dict[str, Array]:
    """Draw x from every energy site of a model at fixed parameters.

    Without ``initial`` all methods start by annealing from the base, every chain on an
    island of its own, so that R-hat compares independent runs:

    - ``"smc"``: the island's walkers, resampled by weight (copies stay next to each
      other) and moved on by MALA.
    - ``"mala"``: one walker per island goes on by MALA, with the step size that
      annealing settled on.
    - ``"nuts"``: one walker per island starts NumPyro's NUTS.

    With ``initial``, such as a generator's draws (``fit.state.draws``), ``"mala"`` and
    ``"nuts"`` start there instead: R-hat then says whether the moves have carried
    chains away from where they began.

    Feed the result to ``ebm_ppl.to_arviz(..., draws=...)`` or, for a bare distribution,
    to ``arviz.from_dict``.

    Args:
        rng_key: A JAX PRNG key.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`,
            whose site is then named 'x'.
        params: Constrained parameters by site name, such as ``fit.params``.
        args: The model's positional arguments; data at the energy sites may be left
            out.
        method: See above.
        num_chains: Islands, or chains.
        num_draws: Draws per chain.
        num_temperatures: Of the annealing; None takes 32 times what its pilot needed.
        num_warmup: Moves (``"mala"``) or warm-up steps (``"nuts"``) before the first
            draw.
        thinning: Keep one of so many moves (``"mala"`` and ``"nuts"``).
        initial: First points by site name, ``(num_chains, *batch_shape,
            *event_shape)``; ``"mala"`` adapts its step size in the warm-up then.
        kwargs: The model's keyword arguments.

    Returns:
        Draws by site name, ``(num_chains, num_draws, *batch_shape, *event_shape)``.

    Raises:
        ValueError: Options that cannot work, parameters that are missing or unknown, a
            discrete support, or an energy that annealing cannot reach.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
    if initial is not None and method == "smc":
        raise ValueError(
            "method = 'smc' anneals from the base; expected 'mala' or 'nuts' with "
            "initial=."
        )
    for option, value, least in (
        ("num_chains", num_chains, 1),
        ("num_draws", num_draws, 1),
        ("thinning", thinning, 1),
        ("num_temperatures", num_temperatures, 1),
        ("num_warmup", num_warmup, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} = {value}; expected at least {least}.")
    params = {} if params is None else dict(params)
    bound, found = bind(rng_key, model, params, args, kwargs)
    if initial is not None and not set(initial) <= set(found):
        raise ValueError(
            f"initial has sites {sorted(initial)}; expected energy sites among "
            f"{sorted(found)}."
        )
    draws, keys = {}, random.split(rng_key, len(found))
    for index, (name, distribution) in enumerate(found.items()):
        if distribution.support.is_discrete:
            raise ValueError(
                f"Energy site '{name}' has a discrete support; Langevin and "
                "Hamiltonian moves need a continuous one."
            )
        key_anneal, key_resample, key_settle, key_pick, key_run = random.split(
            keys[index], 5
        )
        site = SiteAtParams(
            name,
            bound,
            params,
            standardizing_transform(starting_distribution(distribution, name)),
        )
        if initial is not None:
            picked, step_size = _start(site, initial, num_chains)
            if method == "mala":
                picked, step_size = _warm_up(
                    site, key_settle, picked, step_size, num_warmup
                )
            draws[name] = site.transform(
                _chains(
                    method,
                    site,
                    key_run,
                    picked,
                    step_size,
                    num_draws,
                    num_warmup,
                    thinning,
                )
            )
            continue
        annealed = anneal_site(
            key_anneal,
            site,
            MALA(),
            AnnealingOptions(
                num_kernel_steps=1, ess_threshold=0.5, resampling=systematic
            ),
            num_chains=num_chains,
            num_walkers=num_draws if method == "smc" else POOL,
            num_temperatures=num_temperatures,
        )
        step_size = annealed.ladder.step_sizes[-1]
        num_moves = num_warmup if method == "mala" else 32
        position = settle(
            site, key_settle, resampled(key_resample, annealed), step_size, num_moves
        )
        # Resampled walkers are in order: any fixed place among them would favour one
        # end of the weights.
        picked = position[
            jnp.arange(num_chains),
            random.randint(key_pick, (num_chains,), 0, position.shape[1]),
        ]
        if method != "smc":
            position = _chains(
                method,
                site,
                key_run,
                picked,
                step_size,
                num_draws,
                num_warmup,
                thinning,
            )
        draws[name] = site.transform(position)
    return draws


def _start(
    site: SiteAtParams, initial: Mapping[str, ArrayLike], num_chains: int
) -> tuple[Array, Array]:
    """Given first points, checked, as positions; and a step size to begin with."""
    distribution = site.distribution
    expected = (num_chains, *distribution.batch_shape, *distribution.event_shape)
    if site.name not in initial:
        raise ValueError(
            f"initial has sites {sorted(initial)}; expected energy site '{site.name}' "
            "among them."
        )
    given = jnp.asarray(initial[site.name], float)
    if given.shape != expected:
        raise ValueError(
            f"initial['{site.name}'] has shape {given.shape}; expected (num_chains, "
            "*batch_shape, *event_shape) = "
            f"{expected}: one point per chain."
        )
    position = site.transform.inv(given)
    if not bool(
        jnp.all(jnp.isfinite(potential_at(distribution, site.transform, position)))
    ):
        raise ValueError(
            f"initial['{site.name}'] has points where the energy is not finite, which "
            "chains cannot leave: draw others."
        )
    return position, jnp.full(
        distribution.batch_shape, initial_step_size(MALA(), site.dimension)
    )


@partial(jax.jit, static_argnames=("num_moves",))
def _warm_up(
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_moves: int,
) -> tuple[Array, Array]:
    """MALA that adapts its step size to all chains' acceptance, with a falling gain."""
    evaluate = partial(evaluate_at, site.distribution, site.transform)

    def step(
        carry: tuple[Any, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Any, Array], None]:
        state, step_size = carry
        key, gain = inputs
        state, info = MALA().step(key, state, evaluate, step_size)
        return (
            state,
            adapt_step_size(MALA(), step_size, jnp.mean(info.acceptance, axis=0), gain),
        ), None

    gains = 1.0 / jnp.sqrt(1.0 + jnp.arange(num_moves))
    (state, step_size), _ = lax.scan(
        step, (evaluate(position), step_size), (random.split(rng_key, num_moves), gains)
    )
    return state.position, step_size


def _chains(
    method: str,
    site: SiteAtParams,
    rng_key: Array,
    position: Array,
    step_size: Array,
    num_draws: int,
    num_warmup: int,
    thinning: int,
) -> Array:
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
    evaluate = partial(evaluate_at, site.distribution, site.transform)

    def draw(state: Any, keys: Array) -> tuple[Any, Array]:
        state, _ = lax.scan(
            lambda s, key: (MALA().step(key, s, evaluate, step_size)[0], None),
            state,
            keys,
        )
        return state, state.position

    keys = random.split(rng_key, (num_draws, thinning))
    return jnp.moveaxis(lax.scan(draw, evaluate(position), keys)[1], 0, 1)


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
