"""Types of models and their parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from numpyro.distributions.transforms import Transform
from numpyro.infer.util import transform_fn

Model = Callable[..., Any]

Params = dict[str, Any]


def constrain(transforms: Mapping[str, Transform], params: Params) -> Params:
    """Values on the sites' own supports; sites without a transform are as they are."""
    return transform_fn(transforms, params)
