"""A NumPyro model with energy sites as pure functions of unconstrained parameters.

The only module that runs models.  The normaliser enters in one place: every energy site is replaced by a copy of
itself with a known ``log_normalizer``, so plates, subsampling, scales, masks and priors keep NumPyro's meaning.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer.util import log_density, transform_fn
from numpyro.primitives import Messenger

from ebm_ppl.distribution import EnergyDistribution, rewrap, unwrap
from ebm_ppl.snapshot import snapshot
from ebm_ppl.supports import points_in_support

Model = Callable[..., Any]
Params = dict[str, Any]
Normalize = Callable[[str, EnergyDistribution], EnergyDistribution]
"""An energy site's name and its distribution to the same with a known normaliser."""


class EnergySites(Messenger):
    """Record every energy distribution; give unobserved ones a value, so that nothing samples them.

    Args:
        fn: A model.
        moved: A site whose value, observed or not, is replaced by random points of its support: what changes then
            depends on it.
        rng_key: For these points.
    """

    def __init__(self, fn: Model, moved: str | None = None, rng_key: Array | None = None) -> None:
        super().__init__(fn)
        self.found: dict[str, EnergyDistribution] = {}
        self.unobserved: list[str] = []
        self.moved = moved
        self.rng_key = rng_key

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] != "sample":
            return
        energy = unwrap(msg["fn"])
        if energy is None:
            return
        self.found[msg["name"]] = energy
        if msg["value"] is None:
            self.unobserved.append(msg["name"])
            msg["value"] = jnp.zeros(msg["fn"].shape())
        if msg["name"] == self.moved:
            assert self.rng_key is not None
            num = math.prod(msg["fn"].shape()) // max(1, math.prod(energy.batch_shape + energy.event_shape))
            points = points_in_support(energy.base, self.rng_key, num)
            msg["value"] = points.reshape(msg["fn"].shape())


class KnownNormalizers(Messenger):
    """Put ``normalize(name, distribution)`` in the place of every energy whose log Z is unknown."""

    def __init__(self, fn: Model, normalize: Normalize) -> None:
        super().__init__(fn)
        self.normalize = normalize

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] != "sample":
            return
        energy = unwrap(msg["fn"])
        if energy is not None and energy.log_normalizer is None:
            known = self.normalize(msg["name"], energy)
            # On the whole space a support check only finds NaN and infinity, and those reach the loss anyway.
            if _is_unbounded(energy.support):
                known._validate_args = False
            msg["fn"] = rewrap(msg["fn"], known)


def _is_unbounded(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


class FullPlates(Messenger):
    """Switch subsampling off: every plate has all its rows."""

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "plate" and msg["value"] is None:
            size = msg["args"][0]
            msg["args"] = (size, size)
            msg["value"] = jnp.arange(size)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Arguments:
    """What a model is called with; a pytree whose arrays are leaves and whose other values are static."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Arrays are traced; strings, flags and sizes are part of the structure, so a new value retraces."""
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
        arrays = tuple(leaf if yes else None for leaf, yes in zip(leaves, is_array, strict=True))
        static = tuple(None if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True))
        return arrays, (treedef, static)

    @classmethod
    def tree_unflatten(cls, aux: tuple, arrays: tuple) -> "Arguments":
        """Inverse of :meth:`tree_flatten`."""
        treedef, static = aux
        leaves = [array if fixed is None else fixed for array, fixed in zip(arrays, static, strict=True)]
        return cls(*jax.tree.unflatten(treedef, leaves))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["transforms", "rng_key", "arguments"],
    meta_fields=["model"],
)
@dataclass(frozen=True)
class BoundModel:
    """A model, its data and one random key (for subsampling), as functions of unconstrained parameters."""

    model: Model
    transforms: dict[str, Transform]
    rng_key: Array
    arguments: Arguments

    def __post_init__(self) -> None:
        # Programs are cached by the model: one whose closure has changed is another.
        object.__setattr__(self, "model", snapshot(self.model))

    def constrain(self, params: Params) -> Params:
        """Values at the model's ``param`` and unobserved sample sites."""
        return transform_fn(self.transforms, params)

    def energies(self, params: Params, moved: str | None = None) -> dict[str, EnergyDistribution]:
        """The energy distributions at these parameters, by site name; with another value at site ``moved``."""
        recorder = EnergySites(handlers.seed(self.model, self.rng_key), moved, self.rng_key)
        handlers.substitute(recorder, data=self.constrain(params))(*self.arguments.args, **self.arguments.kwargs)
        return recorder.found

    def negative_log_joint(self, params: Params, normalize: Normalize) -> Array:
        """NumPyro's negative log joint, sums, scales and masks included, with the normalisers given.

        Sample sites among the parameters enter by their prior density at the constrained value, without a
        Jacobian: the convention of ``AutoDelta``.
        """
        model = KnownNormalizers(handlers.seed(self.model, self.rng_key), normalize)
        log_joint, _ = log_density(model, self.arguments.args, self.arguments.kwargs, self.constrain(params))
        return -log_joint


@dataclass(frozen=True)
class Observation:
    """Data at one observed site: its value, the names of its leading (plate) dimensions, and its distribution."""

    value: Array
    dims: tuple[str, ...]
    distribution: dist.Distribution


def observations(
    rng_key: Array, model: Model, params: Params, arguments: Arguments, *, full_plates: bool = True
) -> dict[str, Observation]:
    """Data at the observed sample sites, auxiliary sites left out, by default with every plate at its full size."""
    with FullPlates() if full_plates else nullcontext():
        recorder = EnergySites(handlers.seed(model, rng_key))
        trace = handlers.trace(handlers.substitute(recorder, data=params)).get_trace(
            *arguments.args, **arguments.kwargs
        )
    found = {}
    for name, site in trace.items():
        auxiliary = site["type"] != "sample" or site["infer"].get("is_auxiliary", False)
        if auxiliary or not site["is_observed"] or isinstance(site["fn"], dist.Unit):
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
        num_batch_dims = jnp.ndim(site["value"]) - len(site["fn"].event_shape)
        energy = unwrap(site["fn"])
        # Dimensions that are the energy's own are counted as on the walkers.
        own = 0 if energy is None else len((*energy.batch_shape, *energy.event_shape)) - len(site["fn"].event_shape)
        shared = num_batch_dims - own
        dims = tuple(plates.get(k - num_batch_dims, f"{name}_batch_{k - shared}") for k in range(num_batch_dims))
        found[name] = Observation(site["value"], dims, site["fn"])
    return found
