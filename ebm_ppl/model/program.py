"""Types of models and their parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from numpyro.distributions.transforms import Transform
from numpyro.infer.util import transform_fn

Model = Callable[..., Any]

Params = dict[str, Any]


class Estimate:
    """What holds constrained parameters; it is taken wherever these are.

    Attributes:
        params: By site name.
    """

    params: Params


def constrain(transforms: Mapping[str, Transform], params: Params) -> Params:
    """Values on the sites' own supports; sites without a transform are as they are."""
    return transform_fn(transforms, params)


def params_of(source: Estimate | Params | None) -> Params:
    """Constrained parameters by site name, of a fit or given themselves.

    Raises:
        TypeError: ``source`` is something else.
    """
    if isinstance(source, Estimate):
        return dict(source.params)
    if isinstance(source, Mapping) or source is None:
        return dict(source or {})
    raise TypeError(
        f"params is a {type(source).__name__}; expected a Fit, or constrained parameters "
        "by site name, such as fit.params."
    )


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first parameter, by name, whose values differ by more than rounding."""
    for name in sorted(set(one) | set(other)):
        ours, theirs = (jax.tree.leaves(where.get(name)) for where in (one, other))
        same = len(ours) == len(theirs) and all(
            np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-5, atol=1e-8)
            for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            return name
    return None


def require_same_parameters(
    option: str, given: Mapping[str, Any], params: Mapping[str, Any], remedy: str
) -> None:
    """Refuse what was found at other parameters.

    Raises:
        ValueError: The message names the parameter.
    """
    name = first_difference(params, given)
    if name is not None:
        raise ValueError(
            f"{option} belongs to other parameters: '{name}' differs. {remedy}"
        )
