"""Fits as ArviZ data: ``InferenceData`` on ArviZ 0.23, ``DataTree`` on 1.x.

The only module that knows ArviZ.  ArviZ and xarray are imported inside functions: they
cost seconds.
"""

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro import handlers
from numpyro.infer import log_likelihood

from ebm_ppl.certificate import LogNormalizer
from ebm_ppl.distribution import EnergyDistribution, rewrap
from ebm_ppl.fingerprint import require_same_energy
from ebm_ppl.groups import (
    Group,
    Naming,
    Variable,
    rows_that_count,
    sizes_of,
    without_masked,
)
from ebm_ppl.inspection import unmasked_rows
from ebm_ppl.jarzynski import JarzynskiState
from ebm_ppl.model import Arguments, BoundModel, Model, Observation, observations
from ebm_ppl.names import Dimensions, distinct, labels
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

# Draws of a generator, which are independent: chains so that ArviZ finds its two
# dimensions.
GENERATED = (4, 1000)

GIVEN = "given to to_arviz"

# What the names of a site's own attributes and variables begin with, beside those of
# its history.
ATTRIBUTES = (
    "log_normalizer",
    "log_normalizer_flags",
    "log_normalizer_stderr",
    "log_normalizer_lower",
    "log_normalizer_upper",
    "mean_log_density",
    "holdout_chains",
)
STATISTICS = ("log_weight", "energy", "ancestor", "ess", "khat", "held_out")
SHARED = (
    "inference_library",
    "inference_library_version",
    "log_normalizer_source",
    "log_normalizer_bound",
    "entropy_weight",
)


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

    - ``posterior_predictive``: draws of x with equal weights, each island resampled on
      its own (duplicates adjacent).
    - ``sample_stats``: of the *weighted* walkers: ``log_weight``, ``energy``,
      ``energy_<factor>`` where factors are named, and ``ancestor``, the walker that
      each draw of ``posterior_predictive`` is a copy of.  The groups' attributes say
      so: ``draws_are_weighted`` (1 or 0), ``draws``, and ``log_weights`` (where these
      are).
    - ``islands``: ``ess`` and Pareto ``khat`` of every island's weights, and which were
      ``held_out``.
    - ``observed_data``: the data at observed sites, every plate at its full size, and
      nothing else.  What a mask leaves out is NaN.
    - ``training``: ``Fit.history`` over ``step``.

    A :class:`VERA` fit has 4 × 1,000 independent draws of its generator (or ``draws``),
    ``sample_stats`` with their energies, and no ``islands``; its attributes hold
    ``entropy_weight`` and the running ``log_normalizer_bound``, and no log Z unless one
    is given.

    A point fit has no posterior draws of the parameters, so there is no ``posterior``
    and no ``log_likelihood`` (LOO needs both).  With a ``log_normalizer`` the data's
    normalised mean log density goes to the attributes.  With several energy sites,
    variables that every site has end in ``_<site>``.

    Posterior draws, a dict of arrays ``(chain, draw, ...)``, give ``posterior``,
    ``observed_data`` and, with a ``log_normalizer`` of the same draws
    (``batch_ndims=2``), ``log_likelihood``.  Rows that a mask leaves out are absent
    from that, so that LOO does not count them; coordinates say which rows are left.  A
    mask over several plates that leaves no whole slices out gives one dimension
    ``<site>_row``, with ``<site>_<plate>`` along it.

    Names are the model's, but for two: a slash becomes a dot, and a name that is then
    taken (by another one, or by ``chain``, ``draw`` and ``step``) gets an underscore.

    A number that rests on a log Z with flags is left out, and a warning says why.

    Args:
        source: From :meth:`Jarzynski.run` or :meth:`VERA.run`, or parameter draws by
            site name.
        model: The model that was fitted.
        args: Its positional arguments.
        log_normalizer: From :func:`log_normalizer` at ``fit.params`` or at the draws.
            Without it there are no normalised numbers; a Jarzynski fit's attributes
            then hold the running held-out log Z, for what it is worth.
        draws: Draws of x by site name, ``(chain, draw, ...)``, from :func:`sample`:
            ``posterior_predictive`` is then made of them.
        allow_uncertified: Write numbers that rest on an uncertified log Z; the flags go
            to the attributes.
        coords: Coordinate values by dimension name, plates' included.
        dims: Names of an event's dimensions by site name, and of a parameter's (of
            every leaf, where it is a tree); ``<name>_dim_<k>`` otherwise.
        kwargs: The model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x); ``to_netcdf``
        works on both.

    Raises:
        ValueError: ``log_normalizer`` lacks a site or belongs to other parameters;
            ``dims`` or ``coords`` name what is not there or do not fit; a mask differs
            from draw to draw.
    """
    import xarray as xr

    arguments = Arguments(args, kwargs)
    held = _contents(source, model, arguments, log_normalizer, draws, dims)
    usable = log_normalizer is not None and (
        log_normalizer.is_certified or allow_uncertified
    )

    if isinstance(source, Fit):
        groups, attributes = _of_fit(source, held, log_normalizer, usable)
    else:
        groups, attributes = _of_draws(model, arguments, held, log_normalizer, usable)
    if log_normalizer is not None and not usable:
        _warn_of_flags(
            log_normalizer,
            "mean_log_density" if isinstance(source, Fit) else "log_likelihood",
        )

    _add_draws(groups.setdefault("posterior_predictive", Group()), held)
    groups["observed_data"] = Group()
    for name, found in held.data.items():
        where = (*held.naming.rows(name, found), *held.event_dims[name])
        groups["observed_data"].variables[held.naming.variables[name]] = (
            where,
            without_masked(found),
        )

    groups = {name: group for name, group in groups.items() if group.variables}
    written = held.naming.dimensions.coordinates(coords, sizes_of(groups))
    tree = xr.DataTree.from_dict(
        {name: _dataset(xr, group, written) for name, group in groups.items()}
    )
    tree.attrs.update(attributes)
    if importlib.metadata.version("arviz") < "1":
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


@dataclass(frozen=True)
class _Contents:
    """What a source holds and what it is called: parameters, the data and energies there, given draws of x."""

    rng_key: jax.Array
    params: Mapping[str, Any]
    data: dict[str, Observation]
    energies: dict[str, EnergyDistribution]
    draws: Mapping[str, Any]
    naming: Naming
    event_dims: dict[str, tuple[str, ...]]
    parameters: dict[str, Variable]


def _contents(
    source: Fit | Mapping[str, Any],
    model: Model,
    arguments: Arguments,
    log_normalizer: LogNormalizer | None,
    draws: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> _Contents:
    """Run the model at the source's (first) parameters, check everything against it, and name it all."""
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
    energies = bound.energies(one)
    for name, energy in energies.items():
        require_pointwise(name, energy)
    if log_normalizer is not None:
        _check_belongs(log_normalizer, energies, params)
        for name, expected in log_normalizer.fingerprints.items():
            require_same_energy(name, energies[name], expected)

    leaves = _leaves(params)
    naming = _naming(energies, data, leaves, history, dims)
    event_dims = {name: naming.event(name, found) for name, found in data.items()}
    parameters = _parameters(leaves, naming, num_draw_dims=0 if is_fit else 2)
    _check_draws(draws or {}, data)
    return _Contents(
        key_resample,
        params,
        data,
        energies,
        draws or {},
        naming,
        event_dims,
        parameters,
    )


def _of_fit(
    fit: Fit, held: _Contents, log_normalizer: LogNormalizer | None, usable: bool
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Groups and attributes of a fit, without data and given draws."""
    state, ends = fit.state, held.naming.ends
    groups = {
        name: Group() for name in ("posterior_predictive", "sample_stats", "islands")
    }
    groups["training"] = Group(_training(fit.history, held.naming))

    reported = log_normalizer
    if isinstance(state, JarzynskiState) and log_normalizer is None:
        reported = state.log_normalizer()
    attributes = _attributes(reported, ends)

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


def _of_draws(
    model: Model,
    arguments: Arguments,
    held: _Contents,
    log_normalizer: LogNormalizer | None,
    usable: bool,
) -> tuple[dict[str, Group], dict[str, Any]]:
    """Groups and attributes of posterior draws, without data and given draws of x."""
    groups = {"posterior": Group(held.parameters)}
    if usable:
        assert log_normalizer is not None
        groups["log_likelihood"] = _log_likelihood(
            model, arguments, log_normalizer, held
        )
    return groups, _attributes(log_normalizer, held.naming.ends)


def _warn_of_flags(log_normalizer: LogNormalizer, missing: str) -> None:
    reasons = "; ".join(
        f"site '{name}': {flag}"
        for name, flags in log_normalizer.flags.items()
        for flag in flags
    )
    warnings.warn(
        f"{missing} is left out, because log Z ({log_normalizer.method}) is not "
        f"certified: {reasons} "
        "Pass log_normalizer=ebm_ppl.log_normalizer(...) at these parameters, or "
        "allow_uncertified=True.",
        stacklevel=3,
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
            *(f"energy_{factor}" for factor in _factors(energy).values()),
        ]
        for name, energy in energies.items()
    }
    ends = labels(list(energies), stems, [*SHARED, *ATTRIBUTES, *STATISTICS, *history])
    plates = [
        dim for found in data.values() for dim in found.dims if isinstance(dim, str)
    ]
    return Naming(variables, ends, Dimensions(variables, plates, dims))


def _factors(energy: EnergyDistribution) -> dict[str, str]:
    return distinct(energy.factors, ())


def _check_belongs(
    log_normalizer: LogNormalizer, energies: dict[str, Any], params: Mapping[str, Any]
) -> None:
    """A log Z is of use for its own sites and parameters only."""
    for name in energies:
        if name not in log_normalizer.estimate:
            raise ValueError(
                f"log_normalizer has sites {sorted(log_normalizer.estimate)}, but the "
                f"model has energy site '{name}'; "
                "estimate it with ebm_ppl.log_normalizer(rng_key, model, params, ...) "
                "on this model."
            )
    for name in set(log_normalizer.params) | set(params):
        ours, theirs = (
            jax.tree.leaves(where.get(name))
            for where in (params, log_normalizer.params)
        )
        same = len(ours) == len(theirs) and all(
            np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-5, atol=1e-8)
            for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            raise ValueError(
                f"log_normalizer belongs to other parameters: '{name}' differs. "
                "Estimate it at these: "
                "ebm_ppl.log_normalizer(rng_key, model, fit.params, ...), or with "
                "batch_ndims=2 at draws (chain, draw)."
            )


def _add_walkers(
    groups: dict[str, Group],
    rng_key: jax.Array,
    name: str,
    site: Walkers,
    held: _Contents,
) -> None:
    """One energy site's part of ``posterior_predictive``, ``sample_stats`` and ``islands``."""
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
        for factor, written in _factors(energy).items():
            found[f"energy_{written}{end}"] = (dims, np.array(factors[factor]))
    return found


def _add_generated(
    groups: dict[str, Group], state: VERAState, held: _Contents
) -> dict[str, Any]:
    """A generator's draws, or those given in their place, with their energies; and its attributes."""
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


def _check_posterior(leaves: Mapping[str, Any]) -> None:
    leads = {name: np.shape(leaf)[:2] for name, leaf in leaves.items()}
    if len(set(leads.values())) > 1 or any(len(lead) < 2 for lead in leads.values()):
        shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
        raise ValueError(
            f"Posterior draws have shapes {shapes}; expected (chain, draw, ...), the "
            "same two for all, as from "
            "mcmc.get_samples(group_by_chain=True)."
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


def _add_draws(group: Group, held: _Contents) -> None:
    """Draws of x that were given, in the place of any others."""
    for name, values in held.draws.items():
        leading = held.naming.batch(
            name, np.ndim(values) - 2 - len(held.event_dims[name])
        )
        dims = ("chain", "draw", *leading, *held.event_dims[name])
        group.variables[held.naming.variables[name]] = (dims, np.array(values))
        group.attrs |= {"draws": GIVEN, "draws_are_weighted": 0}


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by site name, or, of a tree, by that of every leaf."""
    return {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in params.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _parameters(
    leaves: Mapping[str, Any], naming: Naming, num_draw_dims: int
) -> dict[str, Variable]:
    """Parameters as variables; their ``dims`` are checked in exports that have no group for them, too."""
    return {
        naming.variables[name]: (
            (
                *("chain", "draw")[:num_draw_dims],
                *naming.dimensions.of(
                    name, np.ndim(leaf) - num_draw_dims, "a value of parameter"
                ),
            ),
            np.array(leaf),
        )
        for name, leaf in leaves.items()
    }


def _log_likelihood(
    model: Model, arguments: Arguments, log_normalizer: LogNormalizer, held: _Contents
) -> Group:
    """Log densities of every row that counts, at every draw."""
    if log_normalizer.batch_ndims != 2:
        raise ValueError(
            f"log_normalizer has {log_normalizer.batch_ndims} axes of draws; expected "
            "2, one log Z for every (chain, "
            "draw): ebm_ppl.log_normalizer(..., batch_ndims=2)."
        )
    # Keys that the model asks for itself, for a net's initial values: nothing may be
    # sampled here.
    keyed = handlers.seed(
        normalized(model, log_normalizer, allow_uncertified=True),
        held.rng_key,
        hide_types=["sample", "plate"],
    )
    found = log_likelihood(
        keyed,
        log_normalizer.samples,
        *arguments.args,
        batch_ndims=2,
        **arguments.kwargs,
    )
    return rows_that_count(
        {name: np.array(value) for name, value in found.items() if name in held.data},
        held.data,
        held.naming,
    )


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


def _dataset(xr: Any, group: Group, coords: Mapping[str, Sequence]) -> Any:
    def along(dim: str, places: np.ndarray) -> np.ndarray:
        return np.asarray(coords[dim])[places] if dim in coords else places

    # Plots of ArviZ 1.x fail on dimensions without coordinates.
    index: dict[str, Any] = {}
    for dims, values in group.variables.values():
        for dim, size in zip(dims, values.shape, strict=True):
            if dim in group.places:
                index[dim] = along(*group.places[dim])
            elif dim in coords and len(coords[dim]) == size:
                index[dim] = np.asarray(coords[dim])
            else:
                index[dim] = np.arange(size)
    for name, (dim, plate, places) in group.labels.items():
        index[name] = (dim, along(plate, places))
    return xr.Dataset(group.variables, attrs=group.attrs).assign_coords(index)


def _attributes(
    log_normalizer: LogNormalizer | None, ends: Mapping[str, str]
) -> dict[str, Any]:
    """Flat strings and numbers only: netCDF takes nothing else."""
    attributes: dict[str, Any] = {
        "inference_library": "ebm_ppl",
        "inference_library_version": importlib.metadata.version("ebm-ppl"),
    }
    if log_normalizer is None:
        return attributes
    attributes["log_normalizer_source"] = log_normalizer.method
    for name, end in ends.items():
        attributes[f"log_normalizer_flags{end}"] = json.dumps(
            log_normalizer.flags[name], ensure_ascii=False
        )
        if log_normalizer.batch_ndims:
            # One number per draw: it is in the log-likelihood; the attributes say how
            # far to trust it.
            attributes[f"log_normalizer_stderr{end}"] = float(
                jnp.max(log_normalizer.stderr[name])
            )
            continue
        for key, value in (
            ("log_normalizer", log_normalizer.estimate),
            ("log_normalizer_stderr", log_normalizer.stderr),
            ("log_normalizer_lower", log_normalizer.lower),
            ("log_normalizer_upper", log_normalizer.upper),
        ):
            attributes[f"{key}{end}"] = _attribute(value[name])
    return attributes


def _mean_log_densities(
    log_normalizer: LogNormalizer,
    energies: dict[str, EnergyDistribution],
    data: dict[str, Observation],
    ends: Mapping[str, str],
) -> dict[str, float]:
    """Means over the rows that count."""
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


def _attribute(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else np.array(value)
