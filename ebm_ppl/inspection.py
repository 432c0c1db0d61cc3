"""What a model holds, and every reason why it could not be fitted, found before the first step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to
from numpyro.infer import init_to_median
from numpyro.infer.util import transform_fn

from ebm_ppl.distribution import (
    EnergyDistribution,
    check_start_covers,
    starting_distribution,
    unwrap,
)
from ebm_ppl.fingerprint import Fingerprint, fingerprint
from ebm_ppl.model import Arguments, BoundModel, EnergySites, Model, Params
from ebm_ppl.pointwise import (
    Company,
    doubt_of,
    in_company,
    require_equal,
    require_no_rows,
)
from ebm_ppl.snapshot import snapshot
from ebm_ppl.supports import points_in_support


@dataclass(frozen=True)
class Inspection:
    """What a model holds: initial parameters (unconstrained), their transforms and the energy sites."""

    params: Params
    transforms: dict[str, Transform]
    energies: dict[str, EnergyDistribution]


def inspect_model(
    rng_key: Array,
    model: Model,
    arguments: Arguments,
    *,
    init_params: Params | None = None,
) -> Inspection:
    """Run the model once on its data, check it, and find parameters and energy sites.

    Args:
        rng_key: A JAX PRNG key, for initial values and subsampling.
        model: A NumPyro model.
        arguments: What to call it with.
        init_params: Constrained values for any ``param`` or sample site, instead of its
            initial value.

    Raises:
        ValueError: Every ill-posed model; the message names the site, what was found
            and what to write.
    """
    init_params = {} if init_params is None else dict(init_params)
    args, kwargs = arguments.args, arguments.kwargs
    recorder = EnergySites(handlers.seed(model, rng_key))
    with_initial = handlers.substitute(recorder, substitute_fn=_initial_value)
    if init_params:
        _check_init_params(init_params, partial(_run, with_initial, args, kwargs))
    trace = _run(handlers.substitute(with_initial, data=init_params), args, kwargs)
    if not recorder.found:
        raise ValueError(
            "The model has no energy site. Declare one: numpyro.sample('x', "
            "ebm_ppl.EnergyDistribution(energy, base), "
            "obs=x); a model without energies is fitted by numpyro.infer.SVI."
        )
    for name in recorder.unobserved:
        raise ValueError(
            f"Energy site '{name}' is not observed. Fitting needs data there: pass "
            "obs= (not obs_mask=, which "
            "turns rows "
            "into latents; use handlers.mask to leave rows out). A latent energy with "
            "fixed parameters is an energy "
            "prior: give it log_normalizer= and use NUTS."
        )
    values, transforms = _parameters(trace)
    for name, distribution in recorder.found.items():
        _check_energy_site(name, distribution, trace)
    params = jax.tree.map(
        lambda value: jnp.asarray(value, jnp.result_type(value)),
        transform_fn(transforms, values, invert=True),
    )
    _check_repeatable(
        rng_key,
        BoundModel(model, transforms, rng_key, arguments),
        params,
        recorder.found,
    )
    return Inspection(params, transforms, recorder.found)


_median = init_to_median(num_samples=15)


def _initial_value(site: dict) -> Array | None:
    return None if site["value"] is not None else _median(site)


def _run(model: Callable, args: tuple, kwargs: dict) -> dict[str, dict]:
    try:
        return handlers.trace(model).get_trace(*args, **kwargs)
    except AssertionError as error:
        if "size of plate should be positive" not in str(error):
            raise
        name = _local_of_last_frame(error, "name")
        raise ValueError(
            f"Plate '{name}' has size 0: there are no rows to fit. Check the data that "
            "the model was given; leave a "
            "plate without rows out of the model."
        ) from error


def _local_of_last_frame(error: BaseException, variable: str) -> Any:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_locals.get(variable) if traceback is not None else None


def _parameters(trace: dict[str, dict]) -> tuple[Params, dict[str, Transform]]:
    values: Params = {}
    transforms: dict[str, Transform] = {}
    for name, site in trace.items():
        if site["type"] == "mutable":
            raise ValueError(
                f"Site '{name}' is mutable state (batch norm, running statistics): the "
                "energy would change with every "
                "call and walkers' weights would be wrong. Use a net without state, "
                "such as layer norm."
            )
        if site["type"] == "param":
            constraint = site["kwargs"].get("constraint", constraints.real)
            values[name] = as_real(name, site["value"], constraint)
            transforms[name] = biject_to(constraint)
        elif (
            site["type"] == "sample"
            and not site["is_observed"]
            and unwrap(site["fn"]) is None
        ):
            _check_latent(name, site)
            values[name] = site["value"]
            transforms[name] = biject_to(site["fn"].support)
    if not values:
        raise ValueError(
            "The model has no parameters to fit: no numpyro.param, module or "
            "unobserved sample site."
        )
    return values, transforms


def as_real(name: str, value: Any, constraint: constraints.Constraint) -> Any:
    """The initial value of a parameter, a whole number as a float; what no gradient can
    move is refused.

    Raises:
        ValueError: Parameters over integers, or a tree with leaves that are not real
            numbers.
    """
    if constraint.is_discrete:
        raise ValueError(
            f"Parameter '{name}' has the discrete constraint {constraint}; gradients "
            "need a continuous one. Write "
            f"numpyro.param('{name}', ..., constraint=constraints.positive) for "
            "example, or pass it as an argument."
        )
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if is_leaf and jnp.issubdtype(jnp.result_type(value), jnp.integer):
        return jnp.asarray(value, jnp.result_type(float))
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"Parameter '{name}'{jax.tree_util.keystr(path)} starts at {dtype} "
                "values; expected floats, which a "
                f"gradient can move: numpyro.param('{name}', 1.0). What is not to be "
                "learned is no parameter."
            )
    return value


def _check_init_params(
    init_params: Params, run_without: Callable[[], dict[str, dict]]
) -> None:
    """Given values must have names that the model has, and the shapes of its own values."""
    try:
        trace = run_without()
    except Exception:
        return  # the model may need the values it was given; if not, it fails with them too, and says why
    unknown = set(init_params) - set(trace)
    if unknown:
        raise ValueError(
            f"init_params names {sorted(unknown)}, which the model does not have."
        )
    for name, given in init_params.items():
        found, expected = (
            jax.tree.map(jnp.shape, value) for value in (given, trace[name]["value"])
        )
        if found != expected:
            raise ValueError(
                f"init_params['{name}'] has shape {found}; expected {expected}, as the "
                "model has it."
            )


def _check_latent(name: str, site: dict) -> None:
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"Latent site '{name}' is discrete; beside an energy its gradient is not "
            "defined. Marginalise it by hand "
            "(logsumexp over its values inside the energy), or observe it."
        )
    if site["cond_indep_stack"]:
        plates = ", ".join(frame.name for frame in site["cond_indep_stack"])
        raise ValueError(
            f"Latent site '{name}' is local to plate {plates}. This backend fits "
            "global sites only (MAP): move it "
            "out of the plate, or marginalise it."
        )


def _check_energy_site(
    name: str, distribution: EnergyDistribution, trace: dict[str, dict]
) -> None:
    site = trace[name]
    wrapped = site["fn"]
    value = site["value"]
    starting_distribution(distribution, name)
    if distribution.support.is_discrete:
        raise ValueError(
            f"Energy site '{name}' has a discrete support ({distribution.support}); "
            "Langevin walkers need a continuous "
            "one. Choose a continuous base, or dequantise the data."
        )
    if distribution.log_normalizer is not None:
        raise ValueError(
            f"Energy site '{name}' already has a log_normalizer, so its density is "
            "normalised: fit it with "
            "numpyro.infer.SVI or MCMC, or leave log_normalizer out to have it "
            "estimated."
        )
    if jnp.shape(value) != wrapped.shape():
        raise ValueError(
            f"Data at energy site '{name}' has shape {jnp.shape(value)}; expected "
            f"{wrapped.shape()}: plates and batch "
            f"shape {wrapped.batch_shape}, event shape {wrapped.event_shape} from the "
            "base. Reshape the data, or "
            ".expand/.to_event the base."
        )
    check_start_covers(distribution, name)
    require_no_rows(name, distribution)
    own_dims = len(distribution.batch_shape)
    for frame in site["cond_indep_stack"]:
        size = trace[frame.name]["args"][0]
        if -frame.dim <= own_dims and frame.size != size:
            raise ValueError(
                f"Energy site '{name}' has one normaliser per row of plate "
                f"'{frame.name}', which is subsampled: "
                "walkers of absent rows could not follow. "
                "Drop subsample_size, or give the base no batch shape (one shared Z)."
            )
    if isinstance(value, jax.core.Tracer):
        return
    _refuse_rows(
        name,
        wrapped,
        np.isfinite(np.asarray(value)),
        "is NaN or infinite",
        "Drop or impute those rows, or exclude them with handlers.mask and fill in any "
        "finite value.",
    )
    _refuse_rows(
        name,
        wrapped,
        np.asarray(distribution.support(value)),
        f"lies outside the base's support ({distribution.support})",
        "Choose a base whose support holds the data, or transform the data into it.",
    )


def _refuse_rows(
    name: str, wrapped: Any, good: np.ndarray, finding: str, remedy: str
) -> None:
    """Raise where any element of an unmasked row is not ``good``."""
    counts = unmasked(wrapped)
    bad = ~good.reshape((*counts.shape, -1)).all(-1) & counts
    bad = bad.any(tuple(range(len(wrapped.batch_shape), bad.ndim)))
    if bad.any():
        first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"Data at energy site '{name}' {finding} in {int(bad.sum())} of {bad.size} "
            "rows "
            f"(first: row {first}). {remedy}"
        )


def _energy_alone(distribution: EnergyDistribution) -> None:
    """The model of a bare distribution; one function, so that equal shapes share executables."""
    numpyro.sample("x", distribution)


def bind(
    rng_key: Array,
    model: Model | EnergyDistribution,
    params: Params,
    args: tuple,
    kwargs: dict,
    *,
    compiled: bool = True,
) -> tuple[BoundModel, dict[str, EnergyDistribution]]:
    """A model on its data and its energies at ``params``; a bare distribution becomes
    the model of a site 'x'.

    ``compiled=False`` evaluates a bare distribution as it stands, which may be traced.

    Raises:
        ValueError: Parameters that are missing or unknown, or no energy site.
    """
    if isinstance(model, dist.Distribution) and not isinstance(
        model, EnergyDistribution
    ):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a NumPyro model, or the "
            "EnergyDistribution itself, without "
            "wrappers: .expand, .mask and .to_event belong inside a model, transforms "
            "inside the energy's base."
        )
    if isinstance(model, EnergyDistribution):
        if params or args or kwargs:
            raise ValueError(
                "A bare EnergyDistribution holds its parameters; expected no params "
                "and no arguments, found "
                f"{sorted(params)}, {len(args)} arguments and {sorted(kwargs)}."
            )
        check_start_covers(model, "x")
        require_no_rows("x", model, traced=compiled)
        frozen = _with_present_content(model)
        bound = BoundModel(_energy_alone, {}, rng_key, Arguments((frozen,)))
        company = (
            _energies_at_points(bound, {}, rng_key)[1]["x"]
            if compiled
            else in_company(model)
        )
        doubt_of("x", model, company)
        return bound, {"x": frozen}

    bound = BoundModel(model, {}, rng_key, Arguments(args, kwargs))
    found = check_params(bound, params)
    if not found:
        raise ValueError(
            "The model has no energy site: declare one with numpyro.sample('x', "
            "EnergyDistribution(...))."
        )
    for name, distribution in found.items():
        check_start_covers(distribution, name)
    return bound, found


def _with_present_content(distribution: EnergyDistribution) -> EnergyDistribution:
    """The same distribution, as a pytree that differs when an object inside its energy has changed."""
    frozen = copy.copy(distribution)
    frozen.factors = {
        name: Partial(snapshot(factor.func), *factor.args, **factor.keywords)
        for name, factor in distribution.factors.items()
    }
    return frozen


def check_params(bound: BoundModel, params: Params) -> dict[str, EnergyDistribution]:
    """Refuse parameters that the model does not have, lacks, or that do not decide the
    energies alone.

    Returns:
        The energies, by site.

    Raises:
        ValueError: The message names them.
    """
    # Loops index what is substituted in them, which NumPy's arrays refuse under a
    # trace.
    params = jax.tree.map(jnp.asarray, params)
    recorder = EnergySites(handlers.seed(bound.model, bound.rng_key))
    trace = handlers.trace(handlers.substitute(recorder, data=params)).get_trace(
        *bound.arguments.args, **bound.arguments.kwargs
    )
    # Data are not parameters: fixed, they would leave the likelihood.
    for name, distribution in recorder.found.items():
        require_no_rows(name, distribution)

    unknown = {
        name
        for name in params
        if name not in trace or trace[name].get("is_observed") or name in recorder.found
    }
    missing = {name for name, site in trace.items() if site["type"] == "param"} - set(
        params
    )
    if unknown or missing:
        raise ValueError(
            f"params lacks {sorted(missing)} and holds {sorted(unknown)}, which the "
            "model does not have; expected "
            "every parameter of the model by its site's name, such as fit.params."
        )
    _check_repeatable(bound.rng_key, bound, params, recorder.found)
    _check_given(conditions(bound, params, recorder.found), recorder.unobserved)
    return recorder.found


def conditions(
    bound: BoundModel, params: Params, found: dict[str, EnergyDistribution]
) -> dict[str, tuple[str, ...]]:
    """The energy sites whose values every site's energy depends on.

    Args:
        bound: The model.
        params: Its parameters.
        found: The energies there.
    """
    depends: dict[str, tuple[str, ...]] = dict.fromkeys(found, ())
    if len(found) < 2:
        return depends

    key = random.fold_in(bound.rng_key, 1)
    first, _ = _energies_at_points(bound, params, key)
    for moved in found:
        other, _ = _energies_at_points(bound, params, key, moved)
        for name in set(found) - {moved}:
            if not np.array_equal(
                np.asarray(first[name]), np.asarray(other[name]), equal_nan=True
            ):
                depends[name] += (moved,)
    return depends


def _check_given(depends: dict[str, tuple[str, ...]], unobserved: list[str]) -> None:
    """A log Z, and draws, of a site that depends on another's value need that value."""
    for name, others in depends.items():
        for other in others:
            if other in unobserved:
                raise ValueError(
                    f"The energy at site '{name}' depends on the value of energy site "
                    f"'{other}', which has none here. "
                    f"Its log Z and its draws are those at one value of '{other}': "
                    f"call with data at '{other}' (or "
                    f"first draw '{other}' from a model of it alone, and give a draw "
                    "as its data)."
                )


@jax.jit
def _moved(rng_key: Array, params: Params) -> Params:
    """Parameters up to a tenth larger, so that what is positive stays so; zeros up to a tenth."""
    leaves, treedef = jax.tree.flatten(params)
    keys = random.split(rng_key, len(leaves))
    steps = [
        0.1 * random.uniform(key, jnp.shape(leaf))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    moved = [
        leaf + (jnp.where(leaf == 0, 1.0, leaf) * step).astype(jnp.result_type(leaf))
        for leaf, step in zip(leaves, steps, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def _check_repeatable(
    rng_key: Array,
    bound: BoundModel,
    params: Params,
    found: dict[str, EnergyDistribution],
) -> None:
    """An energy must be one function of its parameters: not of a random key, nor of the
    rows of a mini-batch.

    ``found`` are the energies at ``params``.
    """
    key_params, key_start, key_other = random.split(rng_key, 3)
    # A last layer of zeros would hide what the layers before it do.
    original, params = params, _moved(key_params, params)
    first, companies = _energies_at_points(bound, params, key_start)
    second, _ = _energies_at_points(
        replace(bound, rng_key=key_other), params, key_start
    )
    may_move = any(_has_parameters(energy.support) for energy in found.values())
    agree = _supports_agree(bound, original, params, key_start) if may_move else {}
    for name, inside in agree.items():
        if not bool(inside):
            raise ValueError(
                f"The support of the base at site '{name}' changes with the "
                "parameters: walkers cannot follow it, and "
                "∇log Z lacks what the moving boundary adds. Fix the base's support, "
                "or rescale x to a fixed one."
            )
    for name, values in first.items():
        if not np.array_equal(
            np.asarray(values), np.asarray(second[name]), equal_nan=True
        ):
            raise ValueError(
                f"The energy at site '{name}' changes with the random key. Either it "
                "is stochastic (dropout: switch it "
                "off, deterministic=True), or it depends on a latent site that has no "
                "value here, or on the rows of a "
                "subsampled plate (then give the base their batch shape, without "
                "subsampling): walkers need one energy "
                "per parameter value."
            )
    # Last: what changes by chance changes in other company too.
    for name, company in companies.items():
        require_equal(name, found[name], company)


def _has_parameters(support: constraints.Constraint) -> bool:
    try:
        return bool(jax.tree.leaves(support))
    except NotImplementedError:  # a constraint of the user's own that does not say
        return True


@partial(jax.jit, static_argnames=("moved",))
def _energies_at_points(
    bound: BoundModel, params: Params, rng_key: Array, moved: str | None = None
) -> tuple[dict[str, Array], dict[str, Company]]:
    """Potentials at scattered points, and energies at few points in different company, by site."""
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
    """What tells the model's energies from others, by site; at ``more`` points where a site has them."""
    return {
        name: fingerprint(energy, more.get(name))
        for name, energy in bound.energies(params).items()
    }


@jax.jit
def _supports_agree(
    bound: BoundModel, params: Params, moved: Params, rng_key: Array
) -> dict[str, Array]:
    """Whether points of either support lie in the other, by site."""
    there = bound.energies(moved)
    return {
        name: jnp.all(there[name].support(points_in_support(energy.base, rng_key, 64)))
        & jnp.all(energy.support(points_in_support(there[name].base, rng_key, 64)))
        for name, energy in bound.energies(params).items()
    }


def unmasked(wrapped: Any) -> np.ndarray:
    """Which elements of a site count: a boolean array of its batch shape and, after it, what ``to_event`` declared."""
    if isinstance(wrapped, dist.Independent):
        return unmasked(wrapped.base_dist)
    if not isinstance(wrapped, dist.ExpandedDistribution | dist.MaskedDistribution):
        return np.ones(wrapped.batch_shape, bool)
    inside = unmasked(wrapped.base_dist)
    declared = inside.shape[len(wrapped.base_dist.batch_shape) :]
    if isinstance(wrapped, dist.MaskedDistribution) and not isinstance(
        wrapped._mask, jax.core.Tracer
    ):
        mask = np.asarray(wrapped._mask)
        inside = inside & mask.reshape(mask.shape + (1,) * len(declared))
    return np.broadcast_to(inside, wrapped.batch_shape + declared)


def unmasked_rows(wrapped: Any) -> np.ndarray:
    """Which rows of a site count, at least in part: a boolean array of its batch shape."""
    elements = unmasked(wrapped)
    return elements.any(tuple(range(len(wrapped.batch_shape), elements.ndim)))
