"""A NumPyro model with energy sites as pure functions of unconstrained parameters.

The only module that runs models.  The normaliser enters in one place: every energy site
is replaced by a copy of itself with a known ``log_normalizer``, so plates, subsampling,
scales, masks and priors keep NumPyro's meaning.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.infer.util import log_density, transform_fn
from numpyro.primitives import Messenger

from ebm_ppl.arguments import Arguments, as_numbers
from ebm_ppl.distribution import EnergyDistribution, rewrap, unwrap
from ebm_ppl.snapshot import snapshot
from ebm_ppl.supports import points_in_support

Model = Callable[..., Any]
Params = dict[str, Any]
Normalize = Callable[[str, EnergyDistribution], EnergyDistribution]
"""An energy site's name and its distribution to the same with a known normaliser."""


def _is_sample(msg: dict) -> bool:
    """Whether a message is of a sample site, whose data are then numbers; sites that
    hide an energy are refused.

    Messages of ``subsample``, ``prng_key`` and control flow have no name.
    """
    if msg["type"] == "subsample":
        msg["value"] = as_numbers("numpyro.subsample", msg["value"])
    elif msg["type"] == "control_flow":
        # The body of a loop comes first; branches come after what decides between them.
        bodies = (1, 2) if msg["fn"].__name__ == "cond_wrapper" else (0,)
        msg["args"] = tuple(
            _NoEnergies(arg) if k in bodies else arg
            for k, arg in enumerate(msg["args"])
        )
    if msg["type"] != "sample":
        return False

    _refuse_nested(msg["name"], msg["fn"])
    if msg["is_observed"]:
        msg["value"] = as_numbers(f"site '{msg['name']}'", msg["value"])
    return True


class _NoEnergies(Messenger):
    """Refuse energies and parameters in the body of a loop or a branch, which no handler around it reaches."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            raise ValueError(
                f"Parameter '{msg['name']}' is declared inside numpyro's scan or cond, "
                "where it would keep its initial "
                "value for ever. Declare it outside."
            )
        if msg["type"] != "sample":
            return
        _refuse_nested(msg["name"], msg["fn"])
        energy = unwrap(msg["fn"])
        if energy is not None and energy.log_normalizer is None:
            raise ValueError(
                f"Energy site '{msg['name']}' is inside numpyro's scan or cond, where "
                "its normaliser can't be given. "
                "Sample it outside: the whole series as one event with one energy "
                "(jax.lax.scan or cond inside the "
                "energy), or, for independent steps, in a plate."
            )


def _refuse_nested(name: str, fn: Any) -> None:
    """Refuse a distribution that is made of an energy whose normaliser is unknown."""
    energy = unwrap(fn)
    parts = (
        {"the site's distribution": fn}
        if energy is None
        else {"base": energy.base, "start": energy.start}
    )
    for part, found in parts.items():
        path = find_energy(found)
        if path is None:
            continue
        if energy is not None:
            remedy = (
                "Add the energies up instead, on the inner one's own base: "
                "EnergyDistribution({'inner': ..., 'outer': "
                "...}, base)."
            )
        elif isinstance(_unexpanded(fn), dist.TransformedDistribution):
            remedy = (
                "Transform the base and undo it in the energy, which is the same "
                "density with the same log Z: "
                "EnergyDistribution(lambda y: energy(transform.inv(y)), "
                "dist.TransformedDistribution(base, transform))."
            )
        else:
            remedy = (
                "Mixtures and other compounds need every component's normaliser. Write "
                "one energy of the whole on one "
                "base, such as -logsumexp(log_weights - energies), or give the "
                "component a known log_normalizer=."
            )
        raise ValueError(
            f"Site '{name}' holds an energy with an unknown normaliser inside another "
            f"distribution ({part}: "
            f"{' of '.join(reversed(path))}): nothing could find or normalise it "
            f"there. {remedy}"
        )


def find_energy(found: Any) -> list[str] | None:
    """Types on the way to an energy with an unknown normaliser, among a distribution and all that it is made of."""
    if isinstance(found, EnergyDistribution) and found.log_normalizer is None:
        return ["EnergyDistribution"]
    if isinstance(found, dist.Distribution):
        parts, step = list(vars(found).values()), [type(found).__name__]
    elif isinstance(found, list | tuple | dict):
        parts, step = list(found.values() if isinstance(found, dict) else found), []
    else:
        return None
    for part in parts:
        path = find_energy(part)
        if path is not None:
            return step + path
    return None


def _unexpanded(fn: Any) -> Any:
    while isinstance(
        fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent
    ):
        fn = fn.base_dist
    return fn


class EnergySites(Messenger):
    """Record every energy distribution; give unobserved ones a value, so that nothing
    samples them.

    Args:
        fn: A model.
        moved: A site whose value, observed or not, is replaced by random points of its
            support: what changes then depends on it.
        rng_key: For these points.
    """

    def __init__(
        self, fn: Model, moved: str | None = None, rng_key: Array | None = None
    ) -> None:
        super().__init__(fn)
        self.found: dict[str, EnergyDistribution] = {}
        self.unobserved: list[str] = []
        self.moved = moved
        self.rng_key = rng_key
        self.is_plate: dict[str, bool] = {}

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        self._refuse_shared_name(msg)
        if not _is_sample(msg):
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
            num = math.prod(msg["fn"].shape()) // max(
                1, math.prod(energy.batch_shape + energy.event_shape)
            )
            points = points_in_support(energy.base, self.rng_key, num)
            msg["value"] = points.reshape(msg["fn"].shape())

    def _refuse_shared_name(self, msg: dict) -> None:
        is_plate = msg["type"] == "plate"
        if not is_plate and msg["type"] not in ("sample", "param", "deterministic"):
            return
        if self.is_plate.setdefault(msg["name"], is_plate) != is_plate:
            raise ValueError(
                f"A plate and another site are both called '{msg['name']}': each would "
                "be given the other's value. "
                "Rename the plate."
            )


class KnownNormalizers(Messenger):
    """Put ``normalize(name, distribution)`` in the place of every energy whose log Z is unknown."""

    def __init__(self, fn: Model, normalize: Normalize) -> None:
        super().__init__(fn)
        self.normalize = normalize

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if not _is_sample(msg):
            return
        energy = unwrap(msg["fn"])
        if energy is not None and energy.log_normalizer is None:
            known = self.normalize(msg["name"], energy)
            # On the whole space a support check only finds NaN and infinity, and those
            # reach the loss anyway.
            if _is_unbounded(energy.support):
                known._validate_args = False
            msg["fn"] = rewrap(msg["fn"], known)


def _is_unbounded(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


class FullPlates(Messenger):
    """Switch subsampling off: every plate has all its rows.

    A batch that came in from outside stays one: its site is as large as its data.
    """

    def __init__(self, fn: Model | None = None) -> None:
        super().__init__(fn)
        self.switched: set[str] = set()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "plate" and msg["value"] is None:
            size = msg["args"][0]
            msg["args"] = (size, size)
            msg["value"] = jnp.arange(size)
            self.switched.add(msg["name"])

        elif (
            msg["type"] == "sample"
            and msg["is_observed"]
            and isinstance(msg["fn"], dist.ExpandedDistribution)
        ):
            fn, shape = msg["fn"], jnp.shape(msg["value"])
            rows = shape[: len(shape) - fn.event_dim]
            is_switched = any(
                frame.name in self.switched for frame in msg["cond_indep_stack"]
            )
            if (
                is_switched
                and len(rows) == len(fn.batch_shape)
                and rows != fn.batch_shape
            ):
                msg["fn"] = fn.base_dist.expand(rows)


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

    def energies(
        self, params: Params, moved: str | None = None
    ) -> dict[str, EnergyDistribution]:
        """The energy distributions at these parameters, by site name; with another value at site ``moved``."""
        recorder = EnergySites(
            handlers.seed(self.model, self.rng_key), moved, self.rng_key
        )
        handlers.substitute(recorder, data=self.constrain(params))(
            *self.arguments.args, **self.arguments.kwargs
        )
        return recorder.found

    def negative_log_joint(self, params: Params, normalize: Normalize) -> Array:
        """NumPyro's negative log joint, sums, scales and masks included, with the
        normalisers given.

        Sample sites among the parameters enter by their prior density at the
        constrained value, without a
        Jacobian: the convention of ``AutoDelta``.
        """
        model = KnownNormalizers(handlers.seed(self.model, self.rng_key), normalize)
        log_joint, _ = log_density(
            model, self.arguments.args, self.arguments.kwargs, self.constrain(params)
        )
        return -log_joint


@dataclass(frozen=True)
class Observation:
    """Data at one observed site: its value, its leading dimensions, and its
    distribution.

    A dimension is a plate's name, or, without a plate, its place among the
    distribution's own.
    """

    value: Array
    dims: tuple[str | int, ...]
    distribution: dist.Distribution


def observations(
    rng_key: Array,
    model: Model,
    params: Params,
    arguments: Arguments,
    *,
    full_plates: bool = True,
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
        own = (
            0
            if energy is None
            else len((*energy.batch_shape, *energy.event_shape))
            - len(site["fn"].event_shape)
        )
        shared = num_batch_dims - own
        dims = tuple(
            plates.get(k - num_batch_dims, k - shared) for k in range(num_batch_dims)
        )
        found[name] = Observation(site["value"], dims, site["fn"])
    return found
