"""Inspection of a model: parameters, energy sites, and checks that it can be fitted."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.pointwise import require_no_rows
from ebm_ppl.energy.start import check_start_covers, starting_distribution
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.every_row import with_every_row
from ebm_ppl.model.handlers import EnergySites
from ebm_ppl.model.jumps import check_no_moving_jump
from ebm_ppl.model.masks import unmasked
from ebm_ppl.model.parameters import (
    check_init_params,
    initial_value,
    parameters_of,
    run_once,
    unconstrained,
)
from ebm_ppl.model.plates import with_full_plates
from ebm_ppl.model.program import Model, Params
from ebm_ppl.model.repeatable import check_repeatable
from ebm_ppl.model.rows_follow import check_same_rows
from ebm_ppl.programs.arguments import Arguments


@dataclass(frozen=True)
class Inspection:
    """Initial parameters (unconstrained), their transforms, and the energy sites."""

    params: Params
    transforms: dict[str, Transform]
    energies: dict[str, EnergyDistribution]


def inspect_model(
    rng_key: Array,
    model: Model,
    arguments: Arguments,
    *,
    init_params: Params | None = None,
    needs_walkers: bool = True,
    needs_start: bool = True,
    kept: str | None = "walkers",
) -> Inspection:
    """Run the model once on its data, check it, and find parameters and energy sites.

    Args:
        rng_key: A JAX PRNG key, for initial values and subsampling.
        model: A NumPyro model.
        arguments: The model's arguments.
        init_params: Constrained values for any ``param`` or sample site, instead of its
            initial value.
        needs_walkers: Whether Langevin walkers are to move under the energies.
        needs_start: Whether anything is drawn from their bases, or starts.
        kept: What is kept from update to update for each log Z of an energy, in words;
            None where nothing is.

    Raises:
        ValueError: The model is ill-posed; the message names the site, what was found
            and what to write.
    """
    init_params = {} if init_params is None else dict(init_params)
    recorder, trace = _first_run(rng_key, model, arguments, init_params)
    if not recorder.found:
        raise ValueError(
            "The model has no energy site. Declare one: numpyro.sample('x', "
            "ebm_ppl.EnergyDistribution(energy, base), obs=x); a model without "
            "energies is fitted by numpyro.infer.SVI."
        )

    for name in recorder.unobserved:
        raise ValueError(
            f"Energy site '{name}' is not observed. Fitting needs data there: pass "
            "obs= (not obs_mask=, which turns rows into latents; use handlers.mask to "
            "leave rows out). A latent energy with fixed parameters is an energy "
            "prior: give it log_normalizer= and use NUTS."
        )

    values, transforms = parameters_of(trace)
    for name, distribution in recorder.found.items():
        if needs_start:
            starting_distribution(distribution, name)
        _check_energy_site(name, distribution, trace, needs_walkers, kept)

    params = unconstrained(transforms, values)
    bound = BoundModel(model, transforms, rng_key, arguments)
    checked, energies = bound, recorder.found
    if kept is None:
        own_plates = {
            name: plates
            for name, energy in recorder.found.items()
            if (plates := _own_plates(trace, name, energy))
        }
        if own_plates:
            every_plate = _subsampled_plates(trace)
            check_same_rows(rng_key, bound, params, own_plates, every_plate)
        checked, energies = with_every_row(bound, params, recorder.found)
    check_repeatable(rng_key, checked, params, energies)
    check_no_moving_jump(rng_key, checked, params, energies)
    return Inspection(params, transforms, recorder.found)


def initial_params(
    rng_key: Array, model: Model, arguments: Arguments
) -> tuple[Params, dict[str, Transform], list[str]]:
    """A model without a check of its data.

    Returns:
        Constrained values at which its parameters start, the maps to their constraints,
        and the names of the energy sites that have no known log Z.
    """
    full = with_full_plates(model)  # the rows may be fewer than a batch
    recorder, trace = _first_run(rng_key, full, arguments, {})
    sites = [n for n, e in recorder.found.items() if e.log_normalizer is None]
    return *parameters_of(trace), sites


def _first_run(
    rng_key: Array, model: Model, arguments: Arguments, init_params: Params
) -> tuple[EnergySites, dict[str, dict]]:
    """One run at initial values: the energies that it came by, and its sites."""
    args, kwargs = arguments.args, arguments.kwargs
    recorder = EnergySites(handlers.seed(model, rng_key))
    with_initial = handlers.substitute(recorder, substitute_fn=initial_value)
    if init_params:
        check_init_params(init_params, partial(run_once, with_initial, args, kwargs))
    return recorder, run_once(
        handlers.substitute(with_initial, data=init_params), args, kwargs
    )


def _check_energy_site(
    name: str,
    distribution: EnergyDistribution,
    trace: dict[str, dict],
    needs_walkers: bool,
    kept: str | None,
) -> None:
    """Refuse an energy site, or data at it, that cannot be fitted.

    One body: the checks, in the order in which they are reported.
    """
    site = trace[name]
    wrapped = site["fn"]
    value = site["value"]
    if needs_walkers and distribution.support.is_discrete:
        raise ValueError(
            f"Energy site '{name}' has a discrete support ({distribution.support}); "
            "Langevin walkers need a continuous one. Choose a continuous base, or "
            "dequantise the data."
        )

    if distribution.log_normalizer is not None:
        raise ValueError(
            f"Energy site '{name}' already has a log_normalizer, so its density is "
            "normalised: fit it with numpyro.infer.SVI or MCMC, or leave "
            "log_normalizer out to have it estimated."
        )

    if jnp.shape(value) != wrapped.shape():
        raise ValueError(
            f"Data at energy site '{name}' has shape {jnp.shape(value)}; expected "
            f"{wrapped.shape()}: plates and batch shape {wrapped.batch_shape}, event "
            f"shape {wrapped.event_shape} from the base. Reshape the data, or "
            ".expand/.to_event the base."
        )

    check_start_covers(distribution, name)
    require_no_rows(name, distribution)
    plates = _own_plates(trace, name, distribution)
    if kept is not None and plates:
        raise ValueError(
            f"Energy site '{name}' has one normaliser per row of plate '{plates[0]}', which "
            f"is subsampled: {kept} of absent rows could not follow. Drop "
            "subsample_size, give the base no batch shape (one shared Z), or fit with "
            "ebm_ppl.MonteCarloMLE(model, ...), whose draws are fresh in every update."
        )

    if isinstance(value, jax.core.Tracer):
        return
    _refuse_rows(
        name,
        wrapped,
        np.isfinite(np.asarray(value)),
        "is NaN or infinite",
        "Drop or impute those rows, or exclude them with handlers.mask and fill in "
        "any finite value.",
    )

    _refuse_rows(
        name,
        wrapped,
        np.asarray(distribution.support(value)),
        f"lies outside the base's support ({distribution.support})",
        "Choose a base whose support holds the data, or transform the data into it.",
    )


def _subsampled_plates(trace: dict[str, dict]) -> dict[str, Array]:
    """The rows that subsampled plates have chosen, by name."""
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate" and len(site["value"]) != site["args"][0]
    }


def _own_plates(
    trace: dict[str, dict], name: str, distribution: EnergyDistribution
) -> list[str]:
    """The subsampled plates of whose rows an energy has one log Z each."""
    subsampled, own_dims = _subsampled_plates(trace), len(distribution.batch_shape)
    return [
        frame.name
        for frame in trace[name]["cond_indep_stack"]
        if -frame.dim <= own_dims and frame.name in subsampled
    ]


def _refuse_rows(
    name: str, wrapped: Any, good: np.ndarray, finding: str, remedy: str
) -> None:
    """Raise where any element of an unmasked row is not ``good``."""
    counts = unmasked(wrapped)
    bad = ~good.reshape((*counts.shape, -1)).all(-1) & counts
    bad = bad.any(tuple(range(len(wrapped.batch_shape), bad.ndim)))
    if bad.any():
        first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        where = f" (first: row {first})" if first else ""
        raise ValueError(
            f"Data at energy site '{name}' {finding} in {int(bad.sum())} of {bad.size} "
            f"rows{where}. {remedy}"
        )
