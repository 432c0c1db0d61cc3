"""What an export holds and what it is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.fingerprint import require_same_energy
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.pointwise import require_pointwise
from ebm_ppl.export.attributes import ATTRIBUTES, SHARED, STATISTICS
from ebm_ppl.export.groups import Naming, Variable, storable
from ebm_ppl.export.names import Dimensions, distinct, labels
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.data import Observation, observations
from ebm_ppl.model.every_row import with_every_row
from ebm_ppl.model.program import Model, require_same_parameters
from ebm_ppl.normalizer.belongs import require_site
from ebm_ppl.normalizer.parameter_draws import marked_draw
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.fit import Fit

GIVEN = "given to to_arviz"


@dataclass(frozen=True)
class Contents:
    """What an export holds, and what it is called."""

    rng_key: jax.Array
    params: Mapping[str, Any]
    data: dict[str, Observation]
    energies: dict[str, EnergyDistribution]
    draws: Mapping[str, Any]
    naming: Naming
    event_dims: dict[str, tuple[str, ...]]
    parameters: dict[str, Variable]


def contents_of(
    source: Fit | Mapping[str, Any],
    model: Model,
    arguments: Arguments,
    log_normalizer: LogNormalizer | None,
    draws: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> Contents:
    """Run and check the model at the source's (first) parameters; assign all names."""
    is_fit, history = isinstance(source, Fit), {}
    rng_key: jax.Array = random.key(0)
    if isinstance(source, Fit):
        rng_key, params, history = source.state.rng_key, source.params, source.history
    else:
        params = dict(source)
        _check_posterior(_leaves(params))
    one = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if is_fit else jnp.asarray(leaf)[0, 0], params
    )

    key_model, key_resample = random.split(rng_key)
    data = observations(key_model, model, one, arguments)
    bound = BoundModel(model, {}, key_model, arguments)
    _, energies = with_every_row(bound, one, bound.energies(one))
    for name, energy in energies.items():
        require_pointwise(name, energy)
    if log_normalizer is not None:
        _check_belongs(log_normalizer, energies, params)
        marked = energies
        if log_normalizer.batch_ndims:
            draw = marked_draw(params, log_normalizer.batch_ndims)
            _, marked = with_every_row(bound, draw, bound.energies(draw))
        for name, expected in log_normalizer.fingerprints.items():
            require_same_energy(name, marked[name], expected)

    leaves = _leaves(params)
    naming = _naming(energies, data, leaves, history, dims)
    event_dims = {name: naming.event(name, found) for name, found in data.items()}
    parameters = parameters_of(params, naming, num_draw_dims=0 if is_fit else 2)
    _check_draws(draws or {}, data)
    return Contents(
        key_resample,
        params,
        data,
        energies,
        draws or {},
        naming,
        event_dims,
        parameters,
    )


def _naming(
    energies: Mapping[str, EnergyDistribution],
    data: Mapping[str, Observation],
    leaves: Mapping[str, Any],
    history: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]] | None,
) -> Naming:
    variables = distinct([*data, *energies, *leaves])
    stems = {
        name: [
            *ATTRIBUTES,
            *STATISTICS,
            *history,
            *(f"energy_{factor}" for factor in named_factors(energy).values()),
        ]
        for name, energy in energies.items()
    }
    ends = labels(list(energies), stems, [*SHARED, *ATTRIBUTES, *STATISTICS, *history])
    plates = [
        dim for found in data.values() for dim in found.dims if isinstance(dim, str)
    ]
    return Naming(variables, ends, Dimensions(variables, plates, dims))


def named_factors(energy: EnergyDistribution) -> dict[str, str]:
    """Names of an energy's factors in the export."""
    return distinct(energy.factors, ())


def _check_belongs(
    log_normalizer: LogNormalizer, energies: dict[str, Any], params: Mapping[str, Any]
) -> None:
    """Refuse a log Z that was estimated for other sites or parameters."""
    for name in energies:
        require_site(log_normalizer, name)

    require_same_parameters(
        "log_normalizer",
        log_normalizer.params,
        params,
        "Estimate it at these: ebm_ppl.log_normalizer(rng_key, model, fit.params, ...), "
        "or with batch_ndims=2 at draws (chain, draw).",
    )


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by site name; a tree gives one entry per leaf, named by its path."""
    return {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in params.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def parameters_of(
    params: Mapping[str, Any], naming: Naming, num_draw_dims: int = 0
) -> dict[str, Variable]:
    """Parameters, or numbers about each, as variables.

    This also checks their ``dims``.
    """
    return {
        naming.variables[name]: (
            (
                *("chain", "draw")[:num_draw_dims],
                *naming.dimensions.of(
                    name, np.ndim(leaf) - num_draw_dims, "a value of parameter"
                ),
            ),
            storable(leaf),
        )
        for name, leaf in _leaves(params).items()
    }


def _check_posterior(leaves: Mapping[str, Any]) -> None:
    leads = {name: np.shape(leaf)[:2] for name, leaf in leaves.items()}
    if len(set(leads.values())) > 1 or any(len(lead) < 2 for lead in leads.values()):
        shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
        raise ValueError(
            f"Posterior draws have shapes {shapes}; expected (chain, draw, ...), the "
            "same two for all, as from mcmc.get_samples(group_by_chain=True)."
        )


def _check_draws(draws: Mapping[str, Any], data: Mapping[str, Observation]) -> None:
    for name, values in draws.items():
        if name not in data:
            raise ValueError(
                f"draws names site '{name}', where no data are; expected some of "
                f"{sorted(data)}."
            )
        event, found = data[name].distribution.event_shape, np.shape(values)
        if len(found) < 2 + len(event) or found[len(found) - len(event) :] != event:
            raise ValueError(
                f"draws['{name}'] has shape {found}; expected (chain, draw, ...) and "
                f"last the event shape {event}."
            )
