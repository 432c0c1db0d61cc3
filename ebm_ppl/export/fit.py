"""The groups of a fit."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.wrappers import rewrap
from ebm_ppl.export.attributes import attributes_of
from ebm_ppl.export.contents import GIVEN, Contents, named_factors
from ebm_ppl.export.groups import Group, Naming, Variable
from ebm_ppl.model.data import Observation
from ebm_ppl.model.masks import unmasked_rows
from ebm_ppl.smc.resampling import systematic
from ebm_ppl.smc.weights import ess_fraction, pareto_khat
from ebm_ppl.training.fit import Fit
from ebm_ppl.walkers.state import Walkers

# A generator's draws are independent; ArviZ needs the two dimensions (chain, draw).
GENERATED = (4, 1000)


def fit_groups(
    fit: Fit, held: Contents, log_normalizer: LogNormalizer | None, usable: bool
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Groups and attributes of a fit; data and user-given draws are added elsewhere."""
    state, ends = fit.state, held.naming.ends
    groups = {
        name: Group() for name in ("posterior_predictive", "sample_stats", "islands")
    }
    groups["training"] = Group(_training(fit.history, held.naming))

    reported = log_normalizer
    if isinstance(state, JarzynskiState) and log_normalizer is None:
        reported = state.log_normalizer()
    attributes = attributes_of(reported, ends)

    if isinstance(state, VERAState):
        attributes |= _add_generated(groups, state, held)
    if isinstance(state, JarzynskiState):
        for index, (name, site) in enumerate(state.walkers.items()):
            _add_walkers(groups, random.fold_in(held.rng_key, index), name, site, held)
            held_out = list(range(site.num_training_chains, site.log_weight.shape[0]))
            attributes[f"holdout_chains{ends[name]}"] = json.dumps(held_out)
    if usable:
        assert log_normalizer is not None
        attributes |= _mean_log_densities(
            log_normalizer, held.energies, held.data, ends
        )
    return groups, attributes


def _add_walkers(
    groups: dict[str, Group],
    rng_key: jax.Array,
    name: str,
    site: Walkers,
    held: Contents,
) -> None:
    """Add one energy site to the groups of a Jarzynski fit.

    These are ``posterior_predictive``, ``sample_stats`` and ``islands``.

    One body: one group after another.
    """
    naming, event_dims, energy = held.naming, held.event_dims[name], held.energies[name]
    end, num_batch_dims = naming.ends[name], site.log_weight.ndim - 2
    # `to_event` around an energy with a batch shape makes the event's first dimensions
    # those of its normalisers.
    num_declared = len(event_dims) - (site.values.ndim - site.log_weight.ndim)
    batch_dims = (
        *naming.batch(name, num_batch_dims - num_declared),
        *event_dims[:num_declared],
    )
    leading = ("chain", "draw", *batch_dims)

    stats = groups["sample_stats"]
    stats.attrs |= {"draws": "walkers, which carry weights", "draws_are_weighted": 1}
    stats.attrs[f"log_weights{end}"] = f"sample_stats/log_weight{end}"
    stats.variables[f"log_weight{end}"] = (leading, np.array(site.log_weight))
    stats.variables |= _energies(energy, site.values, leading, end)

    if name not in held.draws:
        predictive, ancestors = (
            groups["posterior_predictive"],
            _ancestors(rng_key, site),
        )
        values = np.array(site.values)
        indices = ancestors.reshape(
            ancestors.shape + (1,) * (values.ndim - ancestors.ndim)
        )

        draws = np.take_along_axis(values, indices, axis=1)
        predictive.variables[naming.variables[name]] = (
            (*leading, *event_dims[num_declared:]),
            draws,
        )
        predictive.attrs |= {
            "draws": "walkers, resampled by their weights",
            "draws_are_weighted": 0,
        }
        stats.variables[f"ancestor{end}"] = (leading, ancestors)

    num_chains = site.log_weight.shape[0]
    held_out = (np.arange(num_chains) >= site.num_training_chains).astype(int)
    groups["islands"].variables |= {
        f"ess{end}": (
            ("chain", *batch_dims),
            np.array(ess_fraction(site.log_weight, axis=1)),
        ),
        f"khat{end}": (
            ("chain", *batch_dims),
            np.array(pareto_khat(jnp.moveaxis(site.log_weight, 1, 0))),
        ),
        f"held_out{end}": (("chain",), held_out),
    }


def _energies(
    energy: EnergyDistribution, values: Any, dims: tuple[str, ...], end: str
) -> dict[str, Variable]:
    """The energy of draws, and its factors where they are named."""
    factors = energy.factor_energies(values)
    found: dict[str, Variable] = {
        f"energy{end}": (dims, np.array(sum(factors.values())))
    }
    if len(factors) > 1:
        for factor, written in named_factors(energy).items():
            found[f"energy_{written}{end}"] = (dims, np.array(factors[factor]))
    return found


def _add_generated(
    groups: dict[str, Group], state: VERAState, held: Contents
) -> dict[str, Any]:
    """A generator's draws, or given ones, with their energies and attributes."""
    name, num_chains = state.generator.name, GENERATED[0]
    naming, event_dims = held.naming, held.event_dims[name]
    if name in held.draws:
        values, what = jnp.asarray(held.draws[name]), GIVEN
    else:
        _, values = state.draws(held.rng_key, num_chains * GENERATED[1])
        values, what = (
            values.reshape(num_chains, -1, *values.shape[1:]),
            "of the generator, not of the model",
        )

    attrs = {"draws": what, "draws_are_weighted": 0}
    stats, predictive = groups["sample_stats"], groups["posterior_predictive"]
    stats.variables |= _energies(
        held.energies[name], values, ("chain", "draw"), naming.ends[name]
    )
    predictive.variables[naming.variables[name]] = (
        ("chain", "draw", *event_dims),
        np.array(values),
    )
    stats.attrs |= attrs
    predictive.attrs |= attrs
    return {
        "entropy_weight": float(state.entropy_weight),
        "log_normalizer_bound": float(state.log_normalizer_bound),
    }


def _ancestors(rng_key: jax.Array, walkers: Walkers) -> np.ndarray:
    """Ancestor indices per island and batch element, of the log weights' shape."""
    rows = jnp.moveaxis(walkers.log_weight, 1, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    picked = jax.vmap(systematic)(random.split(rng_key, flat.shape[0]), flat)
    return np.moveaxis(np.array(picked).reshape(rows.shape), -1, 1)


def _training(history: dict[str, Any], naming: Naming) -> dict[str, Variable]:
    variables: dict[str, Variable] = {}
    for key, entry in history.items():
        if not isinstance(entry, dict):
            variables[key] = (("step",), np.array(entry))
            continue
        for name, values in entry.items():
            dims = ("step", *naming.batch(name, np.ndim(values) - 1))
            variables[f"{key}{naming.ends[name]}"] = (dims, np.array(values))
    return variables


def _mean_log_densities(
    log_normalizer: LogNormalizer,
    energies: dict[str, EnergyDistribution],
    data: dict[str, Observation],
    ends: Mapping[str, str],
) -> dict[str, float]:
    """Mean log densities over unmasked rows, by attribute name."""
    means = {}
    for name, energy in energies.items():
        if name not in data:
            continue
        wrapped = data[name].distribution
        log_density = rewrap(
            wrapped, energy.with_log_normalizer(log_normalizer.estimate[name])
        ).log_prob(data[name].value)
        num_rows = np.sum(unmasked_rows(wrapped))
        if num_rows:
            means[f"mean_log_density{ends[name]}"] = float(
                jnp.sum(log_density) / num_rows
            )
    return means
