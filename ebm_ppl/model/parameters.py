"""The sites of a model, their initial values and transforms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to
from numpyro.infer import init_to_median
from numpyro.infer.util import transform_fn

from ebm_ppl.energy.distribution import unwrap
from ebm_ppl.model.program import Params

_median = init_to_median(num_samples=15)


def initial_value(site: dict) -> Array | None:
    """The initial value of a site that has no value."""
    return None if site["value"] is not None else _median(site)


def run_once(model: Callable, args: tuple, kwargs: dict) -> dict[str, dict]:
    """Trace one run of the model, whatever surrounds it; refuse a plate of size 0."""
    try:
        with handlers.block():
            return handlers.trace(model).get_trace(*args, **kwargs)
    except AssertionError as error:
        if "size of plate should be positive" not in str(error):
            raise
        name = _local_of_last_frame(error, "name")
        raise ValueError(
            f"Plate '{name}' has size 0: there are no rows to fit. Check the data that "
            "the model was given; leave a plate without rows out of the model."
        ) from error


def _local_of_last_frame(error: BaseException, variable: str) -> Any:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_locals.get(variable) if traceback is not None else None


def parameters_of(trace: dict[str, dict]) -> tuple[Params, dict[str, Transform]]:
    """Values of a trace's parameters and latents, and their transforms."""
    values: Params = {}
    transforms: dict[str, Transform] = {}
    for name, site in trace.items():
        if site["type"] == "mutable":
            raise ValueError(
                f"Site '{name}' is mutable state (batch norm, running statistics): the "
                "energy would change with every call and walkers' weights would be "
                "wrong. Use a net without state, such as layer norm."
            )

        if site["type"] == "param":
            values[name], transforms[name] = value_and_transform(name, site)
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


def unconstrained(transforms: dict[str, Transform], values: Params) -> Params:
    """Unconstrained arrays for constrained values.

    Raises:
        ValueError: A value lies outside of its constraint, or is not finite.
    """
    found = jax.tree.map(
        lambda value: jnp.asarray(value, jnp.result_type(value)),
        transform_fn(transforms, values, invert=True),
    )
    for name, free in found.items():
        leaves = jax.tree.leaves(free)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            continue
        is_inside = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
        # Of a net, whose constraint holds for anything, the tree is no one array.
        if name in transforms and isinstance(values[name], Array | np.ndarray | float):
            is_inside &= bool(jnp.all(transforms[name].codomain(values[name])))
        if not is_inside:
            raise ValueError(
                f"Parameter '{name}' has values that are not finite, on the border of its "
                f"constraint, or outside of it ({transforms[name].codomain}): "
                f"{_few(values[name])}. Begin inside."
            )
    return found


def _few(value: Any) -> str:
    """A value in words, its first elements where there are many."""
    leaves = jax.tree.leaves(value)
    first = np.ravel(np.asarray(leaves[0]))[:3]
    shown = ", ".join(f"{float(element):.6g}" for element in first)
    return shown if len(leaves) == 1 and np.size(leaves[0]) <= 3 else f"{shown}, ..."


def value_and_transform(name: str, site: dict) -> tuple[Any, Transform]:
    """The initial value at a ``param`` site, and the map to its constraint.

    Raises:
        ValueError: See :func:`as_real`.
    """
    constraint = site["kwargs"].get("constraint", constraints.real)
    return as_real(name, site["value"], constraint), biject_to(constraint)


def transform_of(name: str, site: dict) -> Transform:
    """The map from the real line to a scalar parameter's or latent's values.

    Raises:
        ValueError: It is no scalar, or has no continuous support.
    """
    if site["type"] == "param":
        support = site["kwargs"].get("constraint", constraints.real)
    else:
        support = site["fn"].support
    if jnp.shape(site["value"]) or support.is_discrete:
        raise ValueError(
            f"Site '{name}' has values of shape {jnp.shape(site['value'])} in {support}; "
            "expected a scalar of a continuous support."
        )
    return biject_to(support)


def as_real(name: str, value: Any, constraint: constraints.Constraint) -> Any:
    """The initial value of a parameter; an integer array becomes a float array.

    Values without a gradient are refused.

    Raises:
        ValueError: The constraint is discrete, or a value is not real floating point.
    """
    if constraint.is_discrete:
        raise ValueError(
            f"Parameter '{name}' has the discrete constraint {constraint}; gradients "
            f"need a continuous one. Write numpyro.param('{name}', ..., "
            "constraint=constraints.positive) for example, or pass it as an argument."
        )

    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if is_leaf and jnp.issubdtype(jnp.result_type(value), jnp.integer):
        return jnp.asarray(value, jnp.result_type(float))

    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"Parameter '{name}'{jax.tree_util.keystr(path)} starts at {dtype} "
                "values; expected floats, which a gradient can move: "
                f"numpyro.param('{name}', 1.0). What is not to be learned is no "
                "parameter."
            )
    return value


def check_init_params(
    init_params: Params, run_without: Callable[[], dict[str, dict]]
) -> None:
    """Refuse initial values with names or shapes that the model does not have."""
    try:
        trace = run_without()
    except Exception:
        # The model may run only with the given values.  Otherwise it fails with them
        # too, with its own message.
        return

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
            "defined. Marginalise it by hand (logsumexp over its values inside the "
            "energy), or observe it."
        )
    if site["cond_indep_stack"]:
        plates = ", ".join(frame.name for frame in site["cond_indep_stack"])
        raise ValueError(
            f"Latent site '{name}' is local to plate {plates}. This backend fits "
            "global sites only (MAP): move it out of the plate, or marginalise it."
        )
