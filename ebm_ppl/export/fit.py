"""The groups of a fit."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.wrappers import rewrap
from ebm_ppl.export.attributes import attributes_of, warn_of_contradictions
from ebm_ppl.export.contents import GIVEN, Contents, named_factors
from ebm_ppl.export.groups import Group, Naming, Variable
from ebm_ppl.model.data import Observation
from ebm_ppl.model.masks import unmasked_rows
from ebm_ppl.normalizer.likelihood import MAX_PARAMETERS, num_params
from ebm_ppl.smc.ensemble import ancestors_where
from ebm_ppl.smc.resampling import systematic
from ebm_ppl.smc.weights import ess_fraction, pareto_khat
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.state import Population


def fit_groups(
    fit: Fit, held: Contents, log_normalizer: LogNormalizer | None, usable: bool
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Groups and attributes of a fit; data and user-given draws are added elsewhere."""
    state, ends = fit.state, held.naming.ends
    groups = {
        name: Group() for name in ("posterior_predictive", "sample_stats", "islands")
    }
    groups["training"] = Group(_training(fit.history, held.naming))

    # log Z
    reported = log_normalizer
    if log_normalizer is None:
        reported = state.running_log_normalizer()
    attributes = attributes_of(reported, ends) | state.attributes()
    attributes["findings"] = json.dumps(fit.findings, ensure_ascii=False)

    # Draws; given ones take the place of those that count equally
    populations = state.populations(held.rng_key, held.energies, held.draws)
    for name, values in held.draws.items():
        own = populations.get(name)
        if name in held.energies and (own is None or own.log_weight is None):
            populations[name] = Population(jnp.asarray(values), GIVEN)
    for index, (name, population) in enumerate(populations.items()):
        if population.log_weight is None:
            _add_draws(groups, name, population, held)
            continue
        key = random.fold_in(held.rng_key, index)
        _add_weighted(groups, key, name, population, held)
        if population.held_out is not None:
            held_out = np.flatnonzero(population.held_out).tolist()
            attributes[f"holdout_chains{ends[name]}"] = json.dumps(held_out)

    # Densities
    if usable:
        assert log_normalizer is not None
        attributes |= _mean_log_densities(
            log_normalizer, held.energies, held.data, ends
        )
        found = state.contradictions(log_normalizer)
        attributes["contradictions"] = json.dumps(found, ensure_ascii=False)
        if num_params(fit.params) <= MAX_PARAMETERS:
            warn_of_contradictions(found)
    return groups, attributes


def _add_weighted(
    groups: dict[str, Group],
    rng_key: jax.Array,
    name: str,
    population: Population,
    held: Contents,
) -> None:
    """Add the weighted draws of one energy site.

    The groups are ``posterior_predictive``, ``sample_stats`` and ``islands``.

    One body: one group after another.
    """
    naming, event_dims, energy = held.naming, held.event_dims[name], held.energies[name]
    log_weight, values = population.log_weight, np.array(population.values)
    assert log_weight is not None
    end, num_batch_dims = naming.ends[name], log_weight.ndim - 2
    # `to_event` around an energy with a batch shape makes the event's first dimensions
    # those of its normalisers.
    num_declared = len(event_dims) - (values.ndim - log_weight.ndim)
    batch_dims = (
        *naming.batch(name, num_batch_dims - num_declared),
        *event_dims[:num_declared],
    )
    leading = ("chain", "draw", *batch_dims)

    stats = groups["sample_stats"]
    what = population.what
    stats.attrs |= {"draws": f"{what}, which carry weights", "draws_are_weighted": 1}
    stats.attrs[f"log_weights{end}"] = f"sample_stats/log_weight{end}"
    stats.variables[f"log_weight{end}"] = (leading, np.array(log_weight))
    stats.variables |= _energies(energy, population.values, leading, end)

    if name not in held.draws:
        predictive = groups["posterior_predictive"]
        ancestors = np.array(_ancestors(rng_key, log_weight))
        indices = ancestors.reshape(
            ancestors.shape + (1,) * (values.ndim - ancestors.ndim)
        )

        draws = np.take_along_axis(values, indices, axis=1)
        predictive.variables[naming.variables[name]] = (
            (*leading, *event_dims[num_declared:]),
            draws,
        )
        predictive.attrs |= {
            "draws": f"{what}, resampled by their weights",
            "draws_are_weighted": 0,
        }
        stats.variables[f"ancestor{end}"] = (leading, ancestors)

    groups["islands"].variables |= {
        f"ess{end}": (
            ("chain", *batch_dims),
            np.array(ess_fraction(log_weight, axis=1)),
        ),
        f"khat{end}": (
            ("chain", *batch_dims),
            np.array(pareto_khat(jnp.moveaxis(log_weight, 1, 0))),
        ),
    }
    if population.held_out is not None:
        held_out = np.array(population.held_out).astype(int)
        groups["islands"].variables[f"held_out{end}"] = (("chain",), held_out)


def _energies(
    energy: EnergyDistribution, values: Any, dims: tuple[str, ...], end: str
) -> dict[str, Variable]:
    """The energy of draws, and its factors where they are named."""
    factors = jax.jit(lambda values: energy.factor_energies(values))(values)
    found: dict[str, Variable] = {
        f"energy{end}": (dims, np.array(sum(factors.values())))
    }
    if len(factors) > 1:
        for factor, written in named_factors(energy).items():
            found[f"energy_{written}{end}"] = (dims, np.array(factors[factor]))
    return found


def _add_draws(
    groups: dict[str, Group], name: str, population: Population, held: Contents
) -> None:
    """Add draws that count equally, and their energies."""
    naming, event_dims, values = held.naming, held.event_dims[name], population.values
    attrs = {"draws": population.what, "draws_are_weighted": 0}
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


@jax.jit
def _ancestors(rng_key: jax.Array, log_weight: jax.Array) -> jax.Array:
    """Ancestor indices per island and batch element, of the log weights' shape."""
    everywhere = jnp.ones_like(log_weight[:, 0], bool)
    return ancestors_where(rng_key, log_weight, everywhere, systematic)


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
        known = rewrap(
            wrapped, energy.with_log_normalizer(log_normalizer.estimate[name])
        )
        # Of many rows one program is compiled sooner than every operation.
        log_density = jax.jit(lambda value, known=known: known.log_prob(value))(
            data[name].value
        )
        num_rows = np.sum(unmasked_rows(wrapped))
        if num_rows:
            means[f"mean_log_density{ends[name]}"] = float(
                jnp.sum(log_density) / num_rows
            )
    return means
