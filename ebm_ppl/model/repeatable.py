"""Checks that a model gives the same energies on every run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.fingerprint import Fingerprint, fingerprint
from ebm_ppl.energy.pointwise import Company, in_company, require_equal
from ebm_ppl.energy.supports import points_in_support
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params


def random_direction(rng_key: Array, params: Params) -> Params:
    """Random shares of the parameters, of their signs; of 1 where they are zero."""
    leaves, treedef = jax.tree.flatten(params)
    keys = random.split(rng_key, len(leaves))
    shares = [
        jnp.where(leaf == 0, 1.0, leaf) * random.uniform(key, jnp.shape(leaf))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, shares)


def moved_along(params: Params, direction: Params, length: ArrayLike) -> Params:
    """Parameters a step of ``length`` away, of the same types."""
    return jax.tree.map(
        lambda leaf, along: leaf + (length * along).astype(jnp.result_type(leaf)),
        params,
        direction,
    )


@jax.jit
def moved_a_little(rng_key: Array, params: Params) -> Params:
    """Parameters scaled by up to 1.1, which keeps signs; zeros become at most 0.1."""
    return moved_along(params, random_direction(rng_key, params), 0.1)


def check_repeatable(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    found: dict[str, EnergyDistribution],
) -> None:
    """Refuse an energy that is not a function of x and its parameters alone.

    It must not depend on a random key or on the rows of a mini-batch.  ``found`` holds
    the energies at ``params``.
    """
    key_params, key_start, key_other = random.split(rng_key, 3)
    # A last layer of zeros would hide the effect of the layers before it.
    original, params = params, moved_a_little(key_params, params)
    first, companies = energies_at_points(bound, params, key_start)
    second, _ = energies_at_points(replace(bound, rng_key=key_other), params, key_start)
    may_move = any(_has_parameters(energy.support) for energy in found.values())
    agree = _supports_agree(bound, original, params, key_start) if may_move else {}
    for name, inside in agree.items():
        if not bool(inside):
            raise ValueError(
                f"The support of the base at site '{name}' changes with the "
                "parameters: walkers cannot follow it, and ∇log Z lacks what the "
                "moving boundary adds. Fix the base's support, or rescale x to a "
                "fixed one."
            )

    for name, values in first.items():
        if not np.array_equal(
            np.asarray(values), np.asarray(second[name]), equal_nan=True
        ):
            raise ValueError(
                f"The energy at site '{name}' changes with the random key. Either it "
                "is stochastic (dropout: switch it off, deterministic=True), or it "
                "depends on a latent site that has no value here, or on the rows of a "
                "subsampled plate (then give the base their batch shape, without "
                "subsampling): walkers need one energy per parameter value."
            )

    # Last, because a stochastic energy fails this check too.
    for name, company in companies.items():
        require_equal(name, found[name], company)


def _has_parameters(support: constraints.Constraint) -> bool:
    try:
        return bool(jax.tree.leaves(support))
    except NotImplementedError:  # a user's constraint without tree_flatten
        return True


@partial(jax.jit, static_argnames=("moved",))
def energies_at_points(
    bound: BoundModel, params: Params, rng_key: Array, moved: str | None = None
) -> tuple[dict[str, Array], dict[str, Company]]:
    """Potentials at random points, and the same energies in batches of other sizes."""
    found = bound.energies(params, moved)
    values = {}
    for name, energy in found.items():
        points = points_in_support(energy.base, rng_key, 8)
        values[name] = energy.potential(points)
        if energy.start is not None:
            values[name] = jnp.stack([values[name], energy.start.log_prob(points)])
    return values, {name: in_company(energy) for name, energy in found.items()}


@jax.jit
def fingerprints(
    bound: BoundModel, params: Params, more: dict[str, Array]
) -> dict[str, Fingerprint]:
    """Fingerprints of the model's energies, by site.

    ``more`` holds additional evaluation points, by site.
    """
    return {
        name: fingerprint(energy, more.get(name))
        for name, energy in bound.energies(params).items()
    }


@jax.jit
def _supports_agree(
    bound: BoundModel, params: Params, moved: Params, rng_key: Array
) -> dict[str, Array]:
    """Whether supports have the same parameters and each other's points, by site."""
    here, there = bound.energies(params), bound.energies(moved)
    return {
        name: _same_leaves(energy.support, there[name].support)
        & jnp.all(there[name].support(points_in_support(energy.base, rng_key, 64)))
        & jnp.all(energy.support(points_in_support(there[name].base, rng_key, 64)))
        for name, energy in here.items()
    }


def _same_leaves(
    one: constraints.Constraint, other: constraints.Constraint
) -> Array | bool:
    """Whether the parameters of two supports are equal; True where they are unknown."""
    try:
        pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    except (NotImplementedError, ValueError):  # no tree_flatten; another structure
        return True
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in pairs] or [jnp.ones(())]))
