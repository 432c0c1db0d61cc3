"""Fits as ArviZ data: ``InferenceData`` on ArviZ 0.23, ``DataTree`` on 1.x.

The only module that knows ArviZ.  ArviZ and xarray are imported inside functions: they cost seconds.
"""

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import log_likelihood

from ebm_ppl.certificate import LogNormalizer
from ebm_ppl.distribution import EnergyDistribution, rewrap
from ebm_ppl.fingerprint import require_same_energy
from ebm_ppl.inspection import unmasked_rows
from ebm_ppl.jarzynski import JarzynskiState
from ebm_ppl.model import Arguments, BoundModel, FullPlates, Model, Observation, observations
from ebm_ppl.normalized import normalized
from ebm_ppl.pointwise import require_pointwise
from ebm_ppl.resampling import systematic
from ebm_ppl.training import Fit
from ebm_ppl.vera import VERAState
from ebm_ppl.walkers import Walkers
from ebm_ppl.weights import ess_fraction, pareto_khat

if TYPE_CHECKING:
    if sys.version_info >= (3, 12):
        from xarray import DataTree as ArvizData
    else:
        from arviz import InferenceData as ArvizData
else:
    ArvizData = Any

Variable = tuple[tuple[str, ...], np.ndarray]

# Draws of a generator, which are independent: chains so that ArviZ finds its two dimensions.
GENERATED = (4, 1000)


def to_arviz(
    source: Fit | Mapping[str, Any],
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | None = None,
    draws: Mapping[str, Any] | None = None,
    allow_uncertified: bool = False,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> ArvizData:
    """Export a fit, or posterior draws of an energy's parameters.

    A :class:`Jarzynski` fit has walkers as draws and islands as chains:

    - ``posterior_predictive``: draws of x with equal weights, each island resampled on its own (duplicates adjacent).
    - ``sample_stats``: of the *weighted* walkers: ``log_weight``, ``energy``, ``energy_<factor>`` where factors are
      named, and ``ancestor``, the walker that each draw of ``posterior_predictive`` is a copy of.
    - ``islands``: ``ess`` and Pareto ``khat`` of every island's weights, and which were ``held_out``.
    - ``observed_data``: the data at observed sites, every plate at its full size, and nothing else.
    - ``training``: ``Fit.history`` over ``step``.

    A :class:`VERA` fit has 4 × 1,000 independent draws of its generator (or ``draws``), ``sample_stats`` with their
    energies, and no ``islands``; its attributes hold ``entropy_weight`` and the running ``log_normalizer_bound``, and
    no log Z unless one is given.

    A point fit has no posterior draws of the parameters, so there is no ``posterior`` and no
    ``log_likelihood`` (LOO needs both).  With a ``log_normalizer`` the data's normalised mean log density goes to the
    attributes.  With several
    energy sites, variables that every site has end in ``_<site>``.

    Posterior draws, a dict of arrays ``(chain, draw, ...)``, give ``posterior``, ``observed_data`` and, with a
    ``log_normalizer`` of the same draws (``batch_ndims=2``), ``log_likelihood``.

    A number that rests on a log Z with flags is left out, and a warning says why.

    Args:
        source: From :meth:`Jarzynski.run` or :meth:`VERA.run`, or parameter draws by site name.
        model: The model that was fitted.
        args: Its positional arguments.
        log_normalizer: From :func:`log_normalizer` at ``fit.params`` or at the draws.  Without it there are no
            normalised numbers; a Jarzynski fit's attributes then hold the running held-out log Z, for what it is worth.
        draws: Draws of x by site name, ``(chain, draw, ...)``, from :func:`sample`: ``posterior_predictive`` is then
            made of them.
        allow_uncertified: Write numbers that rest on an uncertified log Z; the flags go to the attributes.
        coords: Coordinate values by dimension name.
        dims: Names of an event's dimensions by site name; ``<site>_dim_<k>`` otherwise.
        kwargs: The model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x); ``to_netcdf`` works on both.

    Raises:
        ValueError: ``log_normalizer`` lacks a site or belongs to other parameters, or ``dims`` do not fit an event.
    """
    import xarray as xr

    arguments = Arguments(args, kwargs)
    if isinstance(source, Fit):
        rng_key, params = source.state.rng_key, source.params
    else:
        rng_key, params = random.key(0), dict(source)
    key_model, key_resample = random.split(rng_key)
    one = params if isinstance(source, Fit) else jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], params)
    data = observations(key_model, model, one, arguments)
    event_dims = _event_dims(data, dims or {})
    bound = BoundModel(model, {}, key_model, arguments)
    energies = bound.energies(one)
    for name, energy in energies.items():
        require_pointwise(name, energy)
    if log_normalizer is not None:
        _check_belongs(log_normalizer, energies, params)
        for name, expected in log_normalizer.fingerprints.items():
            require_same_energy(name, energies[name], expected)
    usable = log_normalizer is not None and (log_normalizer.is_certified or allow_uncertified)
    groups: dict[str, dict[str, Variable]] = {"posterior_predictive": {}}
    state = source.state if isinstance(source, Fit) else None
    running = state.log_normalizer() if isinstance(state, JarzynskiState) and log_normalizer is None else None
    reported = running if log_normalizer is None else log_normalizer
    attributes = _attributes(reported, energies)
    if isinstance(source, Fit):
        groups |= {"sample_stats": {}, "islands": {}, "training": _training(source.history)}
    if isinstance(state, VERAState):
        generated, more = _generated(key_resample, state, draws, event_dims, energies)
        groups |= generated
        attributes |= more
    if isinstance(state, JarzynskiState):
        for index, (name, site) in enumerate(state.walkers.items()):
            suffix = _suffix(name, energies)
            found = _walkers(random.fold_in(key_resample, index), name, site, event_dims[name], energies[name], suffix)
            for group, variables in found.items():
                groups[group] |= variables
            num_chains = site.log_weight.shape[0]
            attributes[f"holdout_chains{suffix}"] = json.dumps(list(range(site.num_training_chains, num_chains)))
    if isinstance(source, Fit):
        if usable:
            assert log_normalizer is not None
            attributes |= _mean_log_densities(log_normalizer, energies, data)
    else:
        groups["posterior"] = _posterior(params)
        if usable:
            assert log_normalizer is not None
            groups["log_likelihood"] = _log_likelihood(model, arguments, log_normalizer, data)
    if log_normalizer is not None and not usable:
        reasons = "; ".join(f"site '{name}': {flag}" for name, flags in log_normalizer.flags.items() for flag in flags)
        missing = "mean_log_density" if isinstance(source, Fit) else "log_likelihood"
        warnings.warn(
            f"{missing} is left out, because log Z ({log_normalizer.method}) is not certified: {reasons} "
            "Pass log_normalizer=ebm_ppl.log_normalizer(...) at these parameters, or allow_uncertified=True.",
            stacklevel=2,
        )
    for name, values in (draws or {}).items():
        leading = _batch_dims(name, np.ndim(values) - 2 - len(event_dims[name]))
        groups["posterior_predictive"][_plain(name)] = (
            ("chain", "draw", *leading, *event_dims[name]),
            np.array(values),
        )
    groups["observed_data"] = {
        _plain(name): ((*found.dims, *event_dims[name]), np.array(found.value)) for name, found in data.items()
    }
    datasets = {group: _dataset(xr, variables, coords or {}) for group, variables in groups.items() if variables}
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs.update(attributes)
    if importlib.metadata.version("arviz") < "1":
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


def _check_belongs(log_normalizer: LogNormalizer, energies: dict[str, Any], params: Mapping[str, Any]) -> None:
    """A log Z is of use for its own sites and parameters only."""
    for name in energies:
        if name not in log_normalizer.estimate:
            raise ValueError(
                f"log_normalizer has sites {sorted(log_normalizer.estimate)}, but the model has energy site '{name}'; "
                "estimate it with ebm_ppl.log_normalizer(rng_key, model, params, ...) on this model."
            )
    for name in set(log_normalizer.params) | set(params):
        ours, theirs = (jax.tree.leaves(where.get(name)) for where in (params, log_normalizer.params))
        same = len(ours) == len(theirs) and all(
            np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-5, atol=1e-8)
            for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            raise ValueError(
                f"log_normalizer belongs to other parameters: '{name}' differs. Estimate it at these: "
                "ebm_ppl.log_normalizer(rng_key, model, fit.params, ...), or with batch_ndims=2 at draws (chain, draw)."
            )


def _walkers(
    rng_key: jax.Array, name: str, site: Walkers, event_dims: tuple[str, ...], energy: EnergyDistribution, suffix: str
) -> dict[str, dict[str, Variable]]:
    """One energy site's part of ``posterior_predictive``, ``sample_stats`` and ``islands``."""
    num_batch_dims = site.log_weight.ndim - 2
    # `to_event` around an energy with a batch shape makes the event's first dimensions those of its normalisers.
    num_declared = len(event_dims) - (site.values.ndim - site.log_weight.ndim)
    batch_dims = (*_batch_dims(name, num_batch_dims - num_declared), *event_dims[:num_declared])
    leading = ("chain", "draw", *batch_dims)
    ancestors = _ancestors(rng_key, site)
    values = np.array(site.values)
    indices = ancestors.reshape(ancestors.shape + (1,) * (values.ndim - ancestors.ndim))
    draws = np.take_along_axis(values, indices, axis=1)
    factors = energy.factor_energies(site.values)
    stats: dict[str, Variable] = {
        f"log_weight{suffix}": (leading, np.array(site.log_weight)),
        f"energy{suffix}": (leading, np.array(sum(factors.values()))),
        f"ancestor{suffix}": (leading, ancestors),
    }
    if len(factors) > 1:
        for factor, values_of_factor in factors.items():
            stats[f"energy_{_plain(factor)}{suffix}"] = (leading, np.array(values_of_factor))
    num_chains = site.log_weight.shape[0]
    islands: dict[str, Variable] = {
        f"ess{suffix}": (("chain", *batch_dims), np.array(ess_fraction(site.log_weight, axis=1))),
        f"khat{suffix}": (("chain", *batch_dims), np.array(pareto_khat(jnp.moveaxis(site.log_weight, 1, 0)))),
        f"held_out{suffix}": (("chain",), (np.arange(num_chains) >= site.num_training_chains).astype(int)),
    }
    predictive: dict[str, Variable] = {_plain(name): ((*leading, *event_dims[num_declared:]), draws)}
    return {"posterior_predictive": predictive, "sample_stats": stats, "islands": islands}


def _generated(
    rng_key: jax.Array,
    state: VERAState,
    draws: Mapping[str, Any] | None,
    event_dims: dict[str, tuple[str, ...]],
    energies: dict[str, EnergyDistribution],
) -> tuple[dict[str, dict[str, Variable]], dict[str, Any]]:
    """Groups and attributes of a generator's draws, or of those given in their place."""
    name, num_chains = state.generator.name, GENERATED[0]
    if draws is not None and name in draws:
        values = jnp.asarray(draws[name])
    else:
        _, values = state.draws(rng_key, num_chains * GENERATED[1])
        values = values.reshape(num_chains, -1, *values.shape[1:])
    factors = energies[name].factor_energies(values)
    stats: dict[str, Variable] = {"energy": (("chain", "draw"), np.array(sum(factors.values())))}
    if len(factors) > 1:
        stats |= {f"energy_{_plain(factor)}": (("chain", "draw"), np.array(v)) for factor, v in factors.items()}
    predictive: dict[str, Variable] = {_plain(name): (("chain", "draw", *event_dims[name]), np.array(values))}
    attributes = {
        "entropy_weight": float(state.entropy_weight),
        "log_normalizer_bound": float(state.log_normalizer_bound),
    }
    return {"posterior_predictive": predictive, "sample_stats": stats}, attributes


def _posterior(params: Mapping[str, Any]) -> dict[str, Variable]:
    variables: dict[str, Variable] = {}
    for name, tree in params.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            full = _plain(name) + jax.tree_util.keystr(path)
            variables[full] = (
                ("chain", "draw", *(f"{full}_dim_{k}" for k in range(np.ndim(leaf) - 2))),
                np.array(leaf),
            )
    return variables


def _log_likelihood(
    model: Model, arguments: Arguments, log_normalizer: LogNormalizer, data: dict[str, Observation]
) -> dict[str, Variable]:
    if log_normalizer.batch_ndims != 2:
        raise ValueError(
            f"log_normalizer has {log_normalizer.batch_ndims} axes of draws; expected 2, one log Z for every (chain, "
            "draw): ebm_ppl.log_normalizer(..., batch_ndims=2)."
        )
    with FullPlates():
        found = log_likelihood(
            normalized(model, log_normalizer, allow_uncertified=True),
            log_normalizer.samples,
            *arguments.args,
            batch_ndims=2,
            **arguments.kwargs,
        )
    return {
        _plain(name): (("chain", "draw", *data[name].dims), np.array(value))
        for name, value in found.items()
        if name in data
    }


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
            variables[f"{key}{suffix}"] = (("step", *_batch_dims(name, np.ndim(values) - 1)), np.array(values))
    return variables


def _dataset(xr: Any, variables: dict[str, Variable], coords: Mapping[str, Sequence]) -> Any:
    sizes = {dim: size for dims, values in variables.values() for dim, size in zip(dims, values.shape, strict=True)}
    # Plots of ArviZ 1.x fail on dimensions without coordinates.
    index = {dim: np.asarray(coords[dim]) if dim in coords else np.arange(size) for dim, size in sizes.items()}
    return xr.Dataset(variables).assign_coords(index)


def _attributes(log_normalizer: LogNormalizer | None, energies: dict[str, EnergyDistribution]) -> dict[str, Any]:
    """Flat strings and numbers only: netCDF takes nothing else."""
    attributes: dict[str, Any] = {
        "inference_library": "ebm_ppl",
        "inference_library_version": importlib.metadata.version("ebm-ppl"),
    }
    if log_normalizer is None:
        return attributes
    attributes["log_normalizer_source"] = log_normalizer.method
    for name in energies:
        suffix = _suffix(name, energies)
        attributes[f"log_normalizer_flags{suffix}"] = json.dumps(log_normalizer.flags[name], ensure_ascii=False)
        if log_normalizer.batch_ndims:
            # One number per draw: it is in the log-likelihood; the attributes say how far to trust it.
            attributes[f"log_normalizer_stderr{suffix}"] = float(jnp.max(log_normalizer.stderr[name]))
            continue
        for key, value in (
            ("log_normalizer", log_normalizer.estimate),
            ("log_normalizer_stderr", log_normalizer.stderr),
            ("log_normalizer_lower", log_normalizer.lower),
            ("log_normalizer_upper", log_normalizer.upper),
        ):
            attributes[f"{key}{suffix}"] = _attribute(value[name])
    return attributes


def _mean_log_densities(
    log_normalizer: LogNormalizer, energies: dict[str, EnergyDistribution], data: dict[str, Observation]
) -> dict[str, float]:
    means = {}
    for name, energy in energies.items():
        if name not in data:
            continue
        wrapped = data[name].distribution
        log_density = rewrap(wrapped, energy.with_log_normalizer(log_normalizer.estimate[name])).log_prob(
            data[name].value
        )
        num_rows = np.sum(unmasked_rows(wrapped))
        if num_rows:
            means[f"mean_log_density{_suffix(name, energies)}"] = float(jnp.sum(log_density) / num_rows)
    return means


def _suffix(name: str, energies: Mapping[str, Any]) -> str:
    return f"_{_plain(name)}" if len(energies) > 1 else ""


def _batch_dims(name: str, num_dims: int) -> tuple[str, ...]:
    return tuple(f"{_plain(name)}_batch_{k}" for k in range(num_dims))


def _attribute(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else np.array(value)


def _plain(name: str) -> str:
    # A slash separates groups in a DataTree.
    return name.replace("/", ".")
