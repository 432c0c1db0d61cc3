"""Draws of x from energies at fixed parameters, as chains for ArviZ diagnostics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, random
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.finite_draws import draw_states
from ebm_ppl.energy.start import potential_at
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.model.binding import bind_model
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.programs.keys import require_key
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.resampling import systematic
from ebm_ppl.walkers.bar import annealing_bar
from ebm_ppl.walkers.chains import run_chains, warm_up
from ebm_ppl.walkers.placement import anneal_site
from ebm_ppl.walkers.settle import resampled, settle
from ebm_ppl.walkers.site import Progress, SiteAtParams, coordinates_for

METHODS = ("smc", "mala", "nuts")

# Walkers per island, one of which becomes a chain's first point.
POOL = 64


def sample(
    rng_key: Array,
    model: Model | EnergyDistribution,
    params: Estimate | Params | None = None,
    *args: Any,
    method: str = "smc",
    num_chains: int = 4,
    num_draws: int = 1000,
    num_temperatures: int | None = None,
    num_warmup: int = 500,
    thinning: int = 1,
    initial: Mapping[str, ArrayLike] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> dict[str, Array]:
    """Draw x from every energy site of a model at fixed parameters.

    Without ``initial`` all methods start by annealing from the base, every chain on an
    island of its own, so that R-hat compares independent runs:

    - ``"smc"``: the island's walkers, resampled by weight (copies are adjacent) and
      then moved by MALA.
    - ``"mala"``: one walker per island continues by MALA, with the step size at the end
      of annealing.
    - ``"nuts"``: one walker per island starts NumPyro's NUTS.

    Draws on a finite support are exact, from the weights of all its states, as
    ``"smc"``.

    With ``initial``, such as a generator's draws (``fit.state.draws``), ``"mala"`` and
    ``"nuts"`` start there instead: R-hat then shows whether the chains have forgotten
    their starting points.

    Feed the result to ``ebm_ppl.to_arviz(..., draws=...)`` or, for a bare distribution,
    to ``arviz.from_dict``.

    Args:
        rng_key: A JAX PRNG key.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`,
            whose site is then named 'x'.
        params: A :class:`Fit`, or constrained parameters by site name.
        args: The model's positional arguments; data at the energy sites may be left
            out.
        method: See above.
        num_chains: Islands, or chains.
        num_draws: Draws per chain.
        num_temperatures: Temperatures of the annealing; None takes 32 times the number
            that a pilot run needed.
        num_warmup: Moves (``"mala"``) or warm-up steps (``"nuts"``) before the first
            draw.
        thinning: Keep every ``thinning``-th draw (``"mala"`` and ``"nuts"``).
        initial: First points by site name,
            ``(num_chains, *batch_shape, *event_shape)``.  ``"mala"`` then adapts its
            step size in the warm-up.
        progress_bar: Show the number of temperatures done, after the first second.
        kwargs: The model's keyword arguments.

    Returns:
        Draws by site name, ``(num_chains, num_draws, *batch_shape, *event_shape)``.

    Raises:
        ValueError: An option out of range, parameters that are missing or unknown, a
            discrete support that is not finite or is to be moved on, or an energy that
            annealing cannot reach.
    """
    _check_options(
        method,
        initial,
        {
            "num_chains": (num_chains, 1),
            "num_draws": (num_draws, 1),
            "thinning": (thinning, 1),
            "num_temperatures": (num_temperatures, 1),
            "num_warmup": (num_warmup, 0),
        },
    )

    require_key(rng_key)

    # Model
    params = params_of(params)
    bound, found = bind_model(rng_key, model, params, args, kwargs)
    if initial is not None and not set(initial) <= set(found):
        raise ValueError(
            f"initial has sites {sorted(initial)}; expected energy sites among "
            f"{sorted(found)}."
        )

    # Draws
    draws = {}
    for key, (name, distribution) in zip(
        random.split(rng_key, len(found)), found.items(), strict=True
    ):
        if distribution.support.is_discrete and method == "smc":
            draws[name] = draw_states(key, distribution, (num_chains, num_draws), name)
            continue
        transform = coordinates_for(MALA(), distribution, name, "drawing by moves")
        site = SiteAtParams(name, bound, params, transform)
        chains = Chains(method, num_chains, num_draws, num_warmup, thinning)
        if initial is None:
            with annealing_bar(f"draws[{name}]", progress_bar) as progress:
                position = _annealed_chains(
                    key, site, chains, num_temperatures, progress
                )
        else:
            position = _chains_from(key, site, chains, initial)
        draws[name] = site.transform(position)

    return draws


class Chains(NamedTuple):
    """How draws are made; see :func:`sample`."""

    method: str
    num_chains: int
    num_draws: int
    num_warmup: int
    thinning: int

    def run(
        self, rng_key: Array, site: SiteAtParams, first: Array, step_size: Array
    ) -> Array:
        """Chains from first positions."""
        return run_chains(
            self.method,
            site,
            rng_key,
            first,
            step_size,
            self.num_draws,
            self.num_warmup,
            self.thinning,
        )


def _check_options(
    method: str,
    initial: Mapping[str, ArrayLike] | None,
    counts: Mapping[str, tuple[int | None, int]],
) -> None:
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
    if initial is not None and method == "smc":
        raise ValueError(
            "method = 'smc' anneals from the base; expected 'mala' or 'nuts' with "
            "initial=."
        )
    for option, (value, least) in counts.items():
        if value is not None and value < least:
            raise ValueError(f"{option} = {value}; expected at least {least}.")


def _chains_from(
    rng_key: Array,
    site: SiteAtParams,
    chains: Chains,
    initial: Mapping[str, ArrayLike],
) -> Array:
    """Chains from given points."""
    _, _, key_settle, _, key_run = random.split(rng_key, 5)
    first, step_size = _start(site, initial, chains.num_chains)
    if chains.method == "mala":
        first, step_size = warm_up(
            site, key_settle, first, step_size, chains.num_warmup
        )
    return chains.run(key_run, site, first, step_size)


def _annealed_chains(
    rng_key: Array,
    site: SiteAtParams,
    chains: Chains,
    num_temperatures: int | None,
    progress: Progress,
) -> Array:
    """Walkers annealed from the base, or chains from one of every island."""
    key_anneal, key_resample, key_settle, key_pick, key_run = random.split(rng_key, 5)
    is_smc, kernel = chains.method == "smc", MALA()

    # Anneal
    annealed = anneal_site(
        key_anneal,
        site,
        kernel,
        AnnealingOptions(1, ess_threshold=0.5, resampling=systematic),
        num_chains=chains.num_chains,
        num_walkers=chains.num_draws if is_smc else POOL,
        num_temperatures=num_temperatures,
        progress=progress,
    )

    # Settle
    step_size = annealed.ladder.tuning(-1)
    num_moves = chains.num_warmup if chains.method == "mala" else 32
    position = resampled(key_resample, annealed)
    position = settle(site, kernel, key_settle, position, step_size, num_moves)
    if is_smc:
        return position

    # Resampled walkers are in order: any fixed place among them would favour one end
    # of the weights.
    places = random.randint(key_pick, (chains.num_chains,), 0, position.shape[1])
    first = position[jnp.arange(chains.num_chains), places]
    return chains.run(key_run, site, first, step_size)


def _start(
    site: SiteAtParams, initial: Mapping[str, ArrayLike], num_chains: int
) -> tuple[Array, Array]:
    """Check the initial points; their positions, and an initial step size."""
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
            f"*batch_shape, *event_shape) = {expected}: one point per chain."
        )

    position = site.transform.inv(given)
    if not bool(
        jnp.all(jnp.isfinite(potential_at(distribution, site.transform, position)))
    ):
        raise ValueError(
            f"initial['{site.name}'] has points where the energy is not finite, which "
            "chains cannot leave: draw others."
        )

    return position, MALA().init_tuning(site.dimension, distribution.batch_shape)
