"""A generator as pure functions of its parameters.

The NumPyro program draws latents z, then x given z at an energy site's name.

Its parameters are its ``param`` sites, its latents all other sample sites.  z is one
flat vector here, whatever sites the program draws it at, and empty where x has a
density of its own, as a flow has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from numpyro import handlers
from numpyro.distributions.transforms import Transform
from numpyro.primitives import Messenger

from ebm_ppl.energy.wrappers import elementwise, innermost
from ebm_ppl.generators.scores.base import Pair
from ebm_ppl.model.program import Params, constrain
from ebm_ppl.programs.snapshot import Snapshot

Program = Callable[[], Any]

T = TypeVar("T")

# A parameter counts as at a bound within this share of its interval.
AT_BOUND = 0.01


class _Conditional(Messenger):
    """Record one site's distribution, and set its value so that it is not sampled."""

    def __init__(self, fn: Program, name: str) -> None:
        super().__init__(fn)
        self.name = name
        self.found: Any = None

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["name"] == self.name:
            self.found = msg["fn"]
            msg["value"] = jnp.zeros(msg["fn"].shape())


def standard_residual(found: Any, value: Array) -> Array | None:
    """``value`` in coordinates where its normal is standard; None for other distributions.

    The normal may have any shape, and any transforms.
    """
    found = innermost(found)
    if isinstance(found, dist.TransformedDistribution):
        for transform in reversed(found.transforms):
            value = transform.inv(value)
        return standard_residual(found.base_dist, value)
    if isinstance(found, dist.Normal):
        return jnp.ravel((value - found.loc) / found.scale)
    if isinstance(found, dist.MultivariateNormal):
        distance = value - found.loc
        root = jnp.broadcast_to(found.scale_tril, (*distance.shape, distance.shape[-1]))
        return jnp.ravel(solve_triangular(root, distance[..., None], lower=True))
    return None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["transforms", "latents"],
    meta_fields=["program", "name", "is_normal"],
)
@dataclass(frozen=True)
class Generator:
    """A generator program as functions of unconstrained parameters φ, of one draw.

    Attributes:
        program: Takes no arguments.
        name: The site of x given z.
        transforms: Unconstrained to constrained parameters, by site name.
        latents: One value of every latent site.
        is_normal: Whether all its sites are normals, transformed ones included, so that
            :meth:`residuals` exist.
    """

    program: Snapshot
    name: str
    transforms: dict[str, Transform]
    latents: dict[str, Array]
    is_normal: bool

    @property
    def num_latents(self) -> int:
        """Number of elements of z."""
        return sum(leaf.size for leaf in self.latents.values())

    def constrain(self, params: Params) -> Params:
        """Values at the program's ``param`` sites."""
        return constrain(self.transforms, params)

    def draw(self, params: Params, rng_key: Array) -> tuple[Array, Array]:
        """One ``(z, x)``, both differentiable in φ."""
        with handlers.block():
            trace = handlers.trace(handlers.seed(self.at(params), rng_key)).get_trace()
        latents = {name: trace[name]["value"] for name in self.latents}
        return ravel_pytree(latents)[0], trace[self.name]["value"]

    def draws(self, params: Params, keys: Array) -> tuple[Array, Array]:
        """One draw per key: z ``(num, num_latents)``, x ``(num, *event_shape)``."""
        return jax.vmap(partial(self.draw, params))(keys)

    def log_joint(self, params: Params, latents: Array, value: Array) -> Array:
        """``log p(z) + log q(x | z)`` of one pair."""
        return self.log_prior(params, latents) + self._at(params, latents)[1].log_prob(
            value
        )

    def log_prior(self, params: Params, latents: Array) -> Array:
        """``log p(z)``."""
        priors, _ = self._at(params, latents)
        return sum(
            (jnp.sum(found.log_prob(given)) for found, given in priors),
            jnp.array(0.0, latents.dtype),
        )

    def residuals(
        self, params: Params, latents: Array, value: Array
    ) -> tuple[Array, Array]:
        """Standardised residuals of z, ``(L,)``, and of x, ``(d,)``, for one pair."""
        priors, conditional = self._at(params, latents)
        of_latents = [standard_residual(found, given) for found, given in priors]
        of_value = standard_residual(conditional, value)
        assert of_value is not None
        return jnp.concatenate([r for r in of_latents if r is not None]), of_value

    def pair(self, params: Params) -> Pair:
        """The densities that a score estimator needs, at fixed parameters."""
        residuals = partial(self.residuals, params) if self.is_normal else None
        return Pair(
            partial(self.log_prior, params), partial(self.log_joint, params), residuals
        )

    def at_bounds(self, params: Params) -> dict[str, Array]:
        """Share of elements at an end of their interval, by bounded parameter.

        At the lower end minus at the upper one.
        """
        shares = {}
        for name, transform in self.transforms.items():
            bounds = _bounds(transform)
            if bounds is not None:
                place = (transform(params[name]) - bounds[0]) / (bounds[1] - bounds[0])
                shares[name] = jnp.mean(
                    (place < AT_BOUND).astype(place.dtype) - (place > 1 - AT_BOUND)
                )
        return shares

    def _at(
        self, params: Params, latents: Array
    ) -> tuple[list[tuple[Any, Array]], Any]:
        """Distributions of the latents with their values, and that of x given z."""
        given = ravel_pytree(self.latents)[1](latents)
        recorder = _Conditional(
            handlers.substitute(self.at(params), data=given), self.name
        )
        with handlers.block():
            trace = handlers.trace(recorder).get_trace()
        return [
            (trace[name]["fn"], trace[name]["value"]) for name in sorted(self.latents)
        ], recorder.found

    def at(self, params: Params) -> Program:
        """The program at these parameters."""
        return handlers.substitute(self.program, data=self.constrain(params))


def _bounds(transform: Transform) -> tuple[float, float] | None:
    codomain = elementwise(transform.codomain)
    lower, upper = (
        getattr(codomain, end, None) for end in ("lower_bound", "upper_bound")
    )
    return None if lower is None or upper is None else (lower, upper)
