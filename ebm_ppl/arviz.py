"""Fits as ArviZ data: ``InferenceData`` on ArviZ 0.23, ``DataTree`` on 1.x.

The only module that knows ArviZ.  ArviZ and xarray are imported inside functions: they cost seconds.
"""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from ebm_ppl.distribution import rewrap, unwrap
from ebm_ppl.inspection import unmasked_rows
from ebm_ppl.model import Arguments, BoundModel, Model, Observation, observations
from ebm_ppl.normalizer import LogNormalizer
from ebm_ppl.resampling import systematic
from ebm_ppl.training import Fit
from ebm_ppl.walkers import Walkers

if TYPE_CHECKING:
    if sys.version_info >= (3, 12):
        from xarray import DataTree as ArvizData
    else:
        from arviz import InferenceData as ArvizData
else:
    ArvizData = Any

Variable = tuple[tuple[str, ...], np.ndarray]


def to_arviz(
    fit: Fit,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | None = None,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> ArvizData:
    """Export a fit: walkers as draws, islands as chains.

    - ``posterior_predictive``: draws of x with equal weights, each island resampled on its own (duplicates adjacent).
    - ``sample_stats``: of the *weighted* walkers: ``log_weight``, ``energy``, ``energy_<factor>`` where factors are
      named, and ``ancestor``, the walker that each draw of ``posterior_predictive`` is a copy of.
    - ``observed_data``: the data at observed sites, every plate at its full size, and nothing else.
    - ``training``: ``Fit.history`` over ``step``.

    A point fit has no posterior draws of the parameters, so there is no ``posterior`` and no
    ``log_likelihood`` (LOO needs both).  The data's normalised mean log density goes to the attributes.  With several
    energy sites, variables that every site has end in ``_<site>``.

    Args:
        fit: From :meth:`Jarzynski.run`.
        model: The model that was fitted.
        args: Its positional arguments.
        log_normalizer: From :func:`log_normalizer` at ``fit.params``: log Z in the attributes is then this one,
            rather than the running held-out value.
        coords: Coordinate values by dimension name.
        dims: Names of an event's dimensions by site name; ``<site>_dim_<k>`` otherwise.
        kwargs: The model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x); ``to_netcdf`` works on both.

    Raises:
        ValueError: ``log_normalizer`` lacks one of the fit's energy sites, or ``dims`` do not fit an event.
    """
    import xarray as xr

    walkers: dict[str, Walkers] = fit.state.walkers
    arguments = Arguments(args, kwargs)
    key_model, key_resample = random.split(fit.state.rng_key)
    data = observations(key_model, model, fit.params, arguments)
    event_dims = _event_dims(data, dims or {})
    bound = BoundModel(model, {}, key_model, arguments)
    predictive: dict[str, Variable] = {}
    stats: dict[str, Variable] = {}
    for index, (name, site) in enumerate(walkers.items()):
        suffix = f"_{_plain(name)}" if len(walkers) > 1 else ""
        num_batch_dims = site.log_weight.ndim - 2
        # `to_event` around an energy with a batch shape makes the event's first dimensions those of its normalisers.
        num_declared = len(event_dims[name]) - (site.values.ndim - site.log_weight.ndim)
        batch_dims = [f"{_plain(name)}_batch_{k}" for k in range(num_batch_dims - num_declared)]
        leading = ("chain", "draw", *batch_dims, *event_dims[name][:num_declared])
        ancestors = _ancestors(random.fold_in(key_resample, index), site)
        values = np.array(site.values)
        indices = ancestors.reshape(ancestors.shape + (1,) * (values.ndim - ancestors.ndim))
        draws = np.take_along_axis(values, indices, axis=1)
        predictive[_plain(name)] = ((*leading, *event_dims[name][num_declared:]), draws)
        factors = bound.energies(fit.params)[name].factor_energies(site.values)
        stats[f"log_weight{suffix}"] = (leading, np.array(site.log_weight))
        stats[f"energy{suffix}"] = (leading, np.array(sum(factors.values())))
        stats[f"ancestor{suffix}"] = (leading, ancestors)
        if len(factors) > 1:
            for factor, energy in factors.items():
                stats[f"energy_{_plain(factor)}{suffix}"] = (leading, np.array(energy))
    observed = {_plain(name): ((*found.dims, *event_dims[name]), np.array(found.value)) for name, found in data.items()}
    coords = coords or {}
    datasets = {
        "posterior_predictive": _dataset(xr, predictive, coords),
        "sample_stats": _dataset(xr, stats, coords),
        "observed_data": _dataset(xr, observed, coords),
        "training": _dataset(xr, _training(fit.history), coords),
    }
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs.update(_attributes(fit, walkers, data, log_normalizer))
    if importlib.metadata.version("arviz") < "1":
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


def _ancestors(rng_key: jax.Array, walkers: Walkers) -> np.ndarray:
    """Ancestor indices per island and batch element, of the log weights' shape."""
    rows = jnp.moveaxis(walkers.log_weight, 1, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    picked = jax.vmap(systematic)(random.split(rng_key, flat.shape[0]), flat)
    return np.moveaxis(np.array(picked).reshape(rows.shape), -1, 1)


def _event_dims(data: dict[str, Observation], dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    named = {}
    for name, found in data.items():
        count = len(found.distribution.event_shape)
        names = tuple(dims.get(name, [f"{_plain(name)}_dim_{k}" for k in range(count)]))
        if len(names) != count:
            raise ValueError(f"dims['{name}'] = {list(names)}; an event of site '{name}' has {count} dimensions.")
        named[name] = names
    return named


def _training(history: dict[str, Any]) -> dict[str, Variable]:
    variables: dict[str, Variable] = {}
    for key, entry in history.items():
        if not isinstance(entry, dict):
            variables[key] = (("step",), np.array(entry))
            continue
        for name, values in entry.items():
            suffix = f"_{_plain(name)}" if len(entry) > 1 else ""
            batch_dims = tuple(f"{_plain(name)}_batch_{k}" for k in range(np.ndim(values) - 1))
            variables[f"{key}{suffix}"] = (("step", *batch_dims), np.array(values))
    return variables


def _dataset(xr: Any, variables: dict[str, Variable], coords: Mapping[str, Sequence]) -> Any:
    sizes = {dim: size for dims, values in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
    # Plots of ArviZ 1.x fail on dimensions without coordinates.
    index = {dim: np.asarray(coords[dim]) if dim in coords else np.arange(size) for dim, size in sizes.items()}
    return xr.Dataset(variables).assign_coords(index)


def _attributes(
    fit: Fit, walkers: dict[str, Walkers], data: dict[str, Observation], log_normalizer: LogNormalizer | None
) -> dict[str, Any]:
    """Flat strings and numbers only: netCDF takes nothing else."""
    attributes: dict[str, Any] = {
        "inference_library": "ebm_ppl",
        "inference_library_version": importlib.metadata.version("ebm-ppl"),
        "log_normalizer_source": "running held-out islands" if log_normalizer is None else "annealing of fresh walkers",
    }
    for name, site in walkers.items():
        suffix = f"_{_plain(name)}" if len(walkers) > 1 else ""
        num_chains = site.log_weight.shape[0]
        attributes[f"holdout_chains{suffix}"] = json.dumps(list(range(site.num_training_chains, num_chains)))
        if log_normalizer is None:
            estimate, stderr = site.log_normalizer()
        elif name in log_normalizer.estimate:
            estimate, stderr = log_normalizer.estimate[name], log_normalizer.stderr[name]
        else:
            raise ValueError(
                f"log_normalizer has sites {sorted(log_normalizer.estimate)}, but the fit has energy site '{name}'; "
                "estimate it with ebm_ppl.log_normalizer(rng_key, model, fit.params, ...) on the fitted model."
            )
        attributes[f"log_normalizer{suffix}"] = _attribute(estimate)
        attributes[f"log_normalizer_stderr{suffix}"] = _attribute(stderr)
        wrapped = data[name].distribution
        energy = unwrap(wrapped)
        assert energy is not None
        log_density = rewrap(wrapped, energy.with_log_normalizer(estimate)).log_prob(data[name].value)
        attributes[f"mean_log_density{suffix}"] = float(jnp.sum(log_density) / np.sum(unmasked_rows(wrapped)))
    return attributes


def _attribute(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else np.array(value)


def _plain(name: str) -> str:
    # A slash separates groups in a DataTree.
    return name.replace("/", ".")
