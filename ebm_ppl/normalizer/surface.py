"""The likelihood around parameters, from fresh draws of the energies."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.handlers import WithoutPriors
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Model, Params
from ebm_ppl.normalizer.certify import certify
from ebm_ppl.normalizer.density import num_rows
from ebm_ppl.normalizer.likelihood import (
    MAX_PARAMETERS,
    Draws,
    LikelihoodSurface,
    site_potential,
    value_and_counts,
)
from ebm_ppl.normalizer.newton import Maximum, directions_of, groups_of
from ebm_ppl.normalizer.options import plan_of
from ebm_ppl.normalizer.passes import Plan, run_passes
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.normalizer.same_energies import have_same_energies
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.walkers.bar import annealing_bar
from ebm_ppl.walkers.site import SiteAtParams, coordinates_for


def surface_at(
    rng_key: Array,
    params: Params,
    model: Model,
    arguments: Arguments,
    *,
    num_chains: int,
    num_walkers: int,
    num_temperatures: int | None,
    tolerance: float,
    progress_bar: bool = False,
    held_out: Arguments | None = None,
) -> tuple[LikelihoodSurface, LogNormalizer]:
    """Anneal to the energies at (constrained) parameters.

    Returns:
        The surface, along all parameters or along few directions of a net, and the log Z
        that the draws came with.

    Raises:
        ValueError: Options, a model, parameters or data that cannot work; held-out data
            for which the model has other energies.
    """
    if num_chains < 2 or num_walkers < 1:
        raise ValueError(
            f"num_chains = {num_chains}, num_walkers = {num_walkers}; expected at "
            "least 2 islands, for Monte Carlo errors, and a walker in each."
        )
    key_model, key_walkers = random.split(rng_key)
    full = with_full_plates(model)
    found = inspect_model(key_model, full, arguments, init_params=params)
    bound = BoundModel(full, found.transforms, key_model, arguments)
    if held_out is not None:
        _check_held_out(bound, found.params, held_out)

    plan = plan_of(
        "bracket", None, num_chains, num_walkers, num_temperatures, 1, None, 1
    )
    draws, log_z = _draws_of(
        key_walkers, bound, found.params, found.energies, plan, tolerance, progress_bar
    )
    return _surface(bound, found.params, draws), log_z


def _draws_of(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    energies: Mapping[str, EnergyDistribution],
    plan: Plan,
    tolerance: float,
    progress_bar: bool,
) -> tuple[dict[str, Draws], LogNormalizer]:
    """Weighted draws of every site, and the certificate that comes with them."""
    constrained = bound.constrain(params)
    rows = data_rows(bound, constrained)
    draws, sites, spent = {}, {}, 0
    for index, (name, distribution) in enumerate(energies.items()):
        transform = coordinates_for(plan.kernel, distribution, name, "annealing")
        site = SiteAtParams(name, bound, params, transform)
        key = random.fold_in(rng_key, index)
        with annealing_bar(f"walkers[{name}]", progress_bar, 2) as progress:
            passes = run_passes(key, site, plan, None, rows.get(name), progress)
        sites[name] = certify(passes.findings, tolerance)
        spent += passes.num_evaluations

        values = transform(passes.position)
        potential = site_potential(bound, params, name, values)
        islands = passes.forward.relative.log_normalizers[:, None]
        draws[name] = Draws(values, islands + jnp.zeros_like(potential), potential)

    log_z = LogNormalizer.from_sites(
        sites, plan.method, num_evaluations=spent, params=constrained
    )
    return draws, log_z


def _surface(
    bound: BoundModel,
    params: Params,
    draws: dict[str, Draws],
) -> LikelihoodSurface:
    """The surface along all parameters, or along a net's gradient and beside it."""
    flat, _ = ravel_pytree(params)
    if flat.size <= MAX_PARAMETERS:
        return LikelihoodSurface(bound, params, jnp.eye(flat.size), draws)

    directions = directions_of(_gradient(bound, params, draws), groups_of(params))
    return LikelihoodSurface(bound, params, directions, draws)


@jax.jit
def _gradient(bound: BoundModel, params: Params, draws: dict[str, Draws]) -> Array:
    """Gradient of the negative log joint in all parameters, flat."""

    def loss(params: Params) -> Array:
        size = ravel_pytree(params)[0].size
        surface = LikelihoodSurface(bound, params, jnp.zeros((size, 1)), draws)
        return surface.negative_log_joint(jnp.zeros(1), surface.offsets())

    return ravel_pytree(jax.grad(loss)(params))[0]


def gain_on(
    surface: LikelihoodSurface, maximum: Maximum, arguments: Arguments
) -> float:
    """Nats gained per row of other data by the steps to a maximum, priors left out.

    The same draws chose the steps and tell log Z there, which is taken off.
    """
    other = _likelihood(surface.bound, arguments)
    held_out = replace(surface, bound=other)
    step = jnp.asarray(maximum.step, surface.directions.dtype)
    before, counts = value_and_counts(held_out, jnp.zeros_like(step))
    after, _ = value_and_counts(held_out, step)

    # What noise gained, in every log Z that enters
    num_fitted = max(float(np.sum(count)) for count in maximum.counts.values())
    optimism = np.sum(maximum.covariance * maximum.score_noise) / num_fitted
    num_held_out = max(float(jnp.sum(count)) for count in counts.values())

    constrained = replace(other, transforms={})
    size = num_rows(constrained, other.constrain(surface.params), counts)
    return (float(before - after) - optimism * num_held_out) / size


def _likelihood(bound: BoundModel, arguments: Arguments) -> BoundModel:
    """The model on other data, its likelihood alone."""
    model = without_priors(bound.model)
    return BoundModel(model, bound.transforms, bound.rng_key, arguments)


def _check_held_out(bound: BoundModel, params: Params, held_out: Arguments) -> None:
    """Refuse rows at which the energies have other log Z's: the draws do not serve."""
    if not have_same_energies(_likelihood(bound, held_out), bound, params):
        raise ValueError(
            "The energies of the held-out rows are conditional: every row has a log Z of "
            "its own, and the draws at the rows that were fitted do not serve. Test the "
            "held-out rows by themselves."
        )


@lru_cache(maxsize=16)
def without_priors(model: Model) -> Model:
    """The model with its likelihood alone."""

    def likelihood(*args: Any, **kwargs: Any) -> Any:
        with WithoutPriors():
            return model(*args, **kwargs)

    return likelihood
