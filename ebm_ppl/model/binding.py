"""A model at fixed parameters."""

import copy
from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.tree_util import Partial
from numpyro import handlers

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.pointwise import doubt_of, in_company, require_no_rows
from ebm_ppl.energy.start import check_start_covers
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.every_row import with_every_row
from ebm_ppl.model.handlers import EnergySites
from ebm_ppl.model.parameters import run_once
from ebm_ppl.model.program import Model, Params
from ebm_ppl.model.repeatable import check_repeatable, energies_at_points
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.snapshot import snapshot


def _energy_alone(distribution: EnergyDistribution) -> None:
    """The model of a bare distribution; one function, so executables are shared."""
    numpyro.sample("x", distribution)


def bind_model(
    rng_key: Array,
    model: Model | EnergyDistribution,
    params: Params,
    args: tuple,
    kwargs: dict,
    *,
    compiled: bool = True,
) -> tuple[BoundModel, dict[str, EnergyDistribution]]:
    """Bind a model to its data, and evaluate its energies at ``params``.

    A bare distribution becomes a model with one site 'x'.  With ``compiled=False`` it
    is checked without ``jit``, so it may hold tracers.

    Raises:
        TypeError: ``model`` is another distribution.
        ValueError: Parameters are missing or unknown, or there is no energy site.
    """
    if isinstance(model, dist.Distribution) and not isinstance(
        model, EnergyDistribution
    ):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a NumPyro model, or the "
            "EnergyDistribution itself, without wrappers: .expand, .mask and "
            ".to_event belong inside a model, transforms inside the energy's base."
        )

    if isinstance(model, EnergyDistribution):
        if params or args or kwargs:
            raise ValueError(
                "A bare EnergyDistribution holds its parameters; expected no params "
                f"and no arguments, found {sorted(params)}, {len(args)} arguments and "
                f"{sorted(kwargs)}."
            )

        check_start_covers(model, "x")
        require_no_rows("x", model, traced=compiled)
        frozen = _with_present_content(model)
        bound = BoundModel(_energy_alone, {}, rng_key, Arguments((frozen,)))
        company = (
            energies_at_points(bound, {}, rng_key)[1]["x"]
            if compiled
            else in_company(model)
        )
        doubt_of("x", model, company)
        return bound, {"x": frozen}

    bound = BoundModel(model, {}, rng_key, Arguments(args, kwargs))
    bound, found = check_params(bound, params)
    if not found:
        raise ValueError(
            "The model has no energy site: declare one with numpyro.sample('x', "
            "EnergyDistribution(...))."
        )
    for name, distribution in found.items():
        check_start_covers(distribution, name)
    return bound, found


def _with_present_content(distribution: EnergyDistribution) -> EnergyDistribution:
    """A copy whose pytree structure differs once an object inside has changed."""
    frozen = copy.copy(distribution)
    frozen.factors = {
        name: Partial(snapshot(factor.func), *factor.args, **factor.keywords)
        for name, factor in distribution.factors.items()
    }
    return frozen


def check_params(
    bound: BoundModel, params: Params
) -> tuple[BoundModel, dict[str, EnergyDistribution]]:
    """Refuse parameters that do not determine the energies on their own.

    Returns:
        The model and its energies by site: where they have one log Z per row, of every
        row.

    Raises:
        ValueError: Parameters are missing or unknown; the message names them.
    """
    # Loops index substituted values with tracers, which NumPy arrays do not support.
    params = jax.tree.map(jnp.asarray, params)
    recorder = EnergySites(handlers.seed(bound.model, bound.rng_key))
    trace = run_once(
        handlers.substitute(recorder, data=params),
        bound.arguments.args,
        bound.arguments.kwargs,
    )
    # An observed site is not a parameter: substituting it would replace the data.
    for name, distribution in recorder.found.items():
        require_no_rows(name, distribution)

    require_all(params, trace, recorder.found)
    full, _ = with_every_row(bound, params, recorder.found)
    if full is not bound:
        return check_params(full, params)
    check_repeatable(bound.rng_key, bound, params, recorder.found)
    _check_given(conditions(bound, params, recorder.found), recorder.unobserved)
    return bound, recorder.found


def require_all(params: Params, trace: dict, found: Container[str]) -> None:
    """Refuse parameters that a model lacks, and a model's that were not given.

    Args:
        params: By site name.
        trace: Of a run of the model with them.
        found: Names of the energy sites.

    Raises:
        ValueError: The message names them.
    """
    unknown = {
        name
        for name in params
        if name not in trace or trace[name].get("is_observed") or name in found
    }
    missing = {name for name, site in trace.items() if site["type"] == "param"} - set(
        params
    )
    if unknown or missing:
        raise ValueError(
            f"params lacks {sorted(missing)} and holds {sorted(unknown)}, which the "
            "model does not have; expected every parameter of the model by its site's "
            "name, such as fit.params."
        )


def conditions(
    bound: BoundModel, params: Params, found: dict[str, EnergyDistribution]
) -> dict[str, tuple[str, ...]]:
    """For each energy site, the other sites whose values its energy depends on.

    Args:
        bound: The model.
        params: Its parameters.
        found: The energies there.
    """
    depends: dict[str, tuple[str, ...]] = dict.fromkeys(found, ())
    if len(found) < 2:
        return depends

    key = random.fold_in(bound.rng_key, 1)
    first, _ = energies_at_points(bound, params, key)
    for moved in found:
        other, _ = energies_at_points(bound, params, key, moved)
        for name in set(found) - {moved}:
            if not np.array_equal(
                np.asarray(first[name]), np.asarray(other[name]), equal_nan=True
            ):
                depends[name] += (moved,)
    return depends


def _check_given(depends: dict[str, tuple[str, ...]], unobserved: list[str]) -> None:
    """Refuse an energy that depends on another energy site without a value."""
    for name, others in depends.items():
        for other in others:
            if other in unobserved:
                raise ValueError(
                    f"The energy at site '{name}' depends on the value of energy site "
                    f"'{other}', which has none here. Its log Z and its draws are "
                    f"those at one value of '{other}': call with data at '{other}' (or "
                    f"first draw '{other}' from a model of it alone, and give a draw "
                    "as its data)."
                )
