"""A generator as pure functions: a NumPyro program that draws latents z, then x given z
at an energy site's name.

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
from jax import Array, lax, random
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to
from numpyro.infer.util import transform_fn
from numpyro.primitives import Messenger

from ebm_ppl.distribution import EnergyDistribution
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import as_real
from ebm_ppl.model import Params
from ebm_ppl.score import ExactScore, Pair, Score
from ebm_ppl.snapshot import Snapshot, snapshot
from ebm_ppl.supports import same_support

Program = Callable[[], Any]
T = TypeVar("T")

# Evaluations of a score that its estimator is fitted in.
NUM_FITTING_STEPS = 150

# How near to an end of an interval a parameter counts as standing at it, as a share of
# the interval.
AT_BOUND = 0.01


def standardized_normal(
    base: dist.Distribution, loc: Array, scale: Array | float
) -> dist.Distribution:
    """``T(N(loc, scale²))``, T the map from base-standard coordinates to x: what a
    generator draws x given z from.

    Every base then sees the same generator: a net that returns 0 is at the base's
    centre, ``scale`` is in units of its spread, and draws stay in its support.

    Args:
        base: The energy's base, or any proper distribution of its shape; without a
            batch shape.
        loc: A net's output at z, of the shape of the coordinates (for a base on the
            whole space, its event shape).
        scale: Standard deviation in base-standard units, scalar or like ``loc``.

    Returns:
        A distribution of the base's event shape, with reparametrised draws and a
        density.
    """
    transform = standardizing_transform(base)
    noise = dist.Normal(loc, scale).to_event(jnp.ndim(loc))
    return dist.TransformedDistribution(noise, transform)


class _Conditional(Messenger):
    """Record the distribution at one site and give it a value, so that nothing samples it."""

    def __init__(self, fn: Program, name: str) -> None:
        super().__init__(fn)
        self.name = name
        self.found: Any = None

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["name"] == self.name:
            self.found = msg["fn"]
            msg["value"] = jnp.zeros(msg["fn"].shape())


def _standard_residual(found: Any, value: Array) -> Array | None:
    """``value`` in coordinates where a normal (of any shape, through any transforms) is standard; None for others."""
    while isinstance(found, dist.Independent | dist.ExpandedDistribution):
        found = found.base_dist
    if isinstance(found, dist.TransformedDistribution):
        for transform in reversed(found.transforms):
            value = transform.inv(value)
        return _standard_residual(found.base_dist, value)
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
    """A generator program as functions of unconstrained parameters φ, one draw at a
    time.

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
        """Elements of z."""
        return sum(leaf.size for leaf in self.latents.values())

    def constrain(self, params: Params) -> Params:
        """Values at the program's ``param`` sites."""
        return transform_fn(self.transforms, params)

    def draw(self, params: Params, rng_key: Array) -> tuple[Array, Array]:
        """One ``(z, x)``, both differentiable in φ."""
        trace = handlers.trace(handlers.seed(self.at(params), rng_key)).get_trace()
        latents = {name: trace[name]["value"] for name in self.latents}
        return ravel_pytree(latents)[0], trace[self.name]["value"]

    def draws(self, params: Params, keys: Array) -> tuple[Array, Array]:
        """One :meth:`draw` per key: ``(num, num_latents)`` and ``(num, *event_shape)``."""
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
        """Latents and value of one pair in coordinates where their normals are standard."""
        priors, conditional = self._at(params, latents)
        of_latents = [_standard_residual(found, given) for found, given in priors]
        of_value = _standard_residual(conditional, value)
        assert of_value is not None
        return jnp.concatenate([r for r in of_latents if r is not None]), of_value

    def pair(self, params: Params) -> Pair:
        """What a score's estimator needs, at fixed parameters."""
        residuals = partial(self.residuals, params) if self.is_normal else None
        return Pair(
            partial(self.log_prior, params), partial(self.log_joint, params), residuals
        )

    def at_bounds(self, params: Params) -> dict[str, Array]:
        """The share of elements that stand at an end of their interval: below minus above, by bounded parameter."""
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
        """The latents' distributions with their values, and the distribution of x given them."""
        given = ravel_pytree(self.latents)[1](latents)
        recorder = _Conditional(
            handlers.substitute(self.at(params), data=given), self.name
        )
        trace = handlers.trace(recorder).get_trace()
        return [
            (trace[name]["fn"], trace[name]["value"]) for name in sorted(self.latents)
        ], recorder.found

    def at(self, params: Params) -> Program:
        """The program at these parameters."""
        return handlers.substitute(self.program, data=self.constrain(params))


def estimator(score: T, generator: Generator) -> T | ExactScore:
    """``score``, or the exact one of a generator without latents."""
    return score if generator.latents else ExactScore()


def fit_score(
    score: Score,
    rng_key: Array,
    generator: Generator,
    params: Params,
    num_draws: int,
    tell: Callable[[Array, Array], Any],
) -> tuple[Any, Any]:
    """A score's estimator fitted to a generator that stays as it is.

    Returns:
        Its state, and what ``tell(values, log_density)`` said of every evaluation's
        draws.
    """
    pair = generator.pair(params)

    def evaluate(state: Any, rng_key: Array) -> tuple[Any, Any]:
        key_draw, key_score = random.split(rng_key)
        latents, values = generator.draws(params, random.split(key_draw, num_draws))
        found, state = score.evaluate(key_score, state, pair, latents, values)
        return state, tell(values, found.log_density)

    return lax.scan(
        evaluate,
        score.init(generator.num_latents),
        random.split(rng_key, NUM_FITTING_STEPS),
    )


def _bounds(transform: Transform) -> tuple[float, float] | None:
    codomain = transform.codomain
    while isinstance(codomain, constraints.independent):
        codomain = codomain.base_constraint
    lower, upper = (
        getattr(codomain, end, None) for end in ("lower_bound", "upper_bound")
    )
    return None if lower is None or upper is None else (lower, upper)


def inspect_generator(
    rng_key: Array, program: Program, name: str, distribution: EnergyDistribution
) -> tuple[Generator, Params]:
    """Run a generator program once, check it against its energy site, and find
    parameters and latents.

    Args:
        rng_key: A JAX PRNG key, for initial values.
        program: A NumPyro program without arguments.
        name: The energy site's name.
        distribution: The energy there.

    Returns:
        The generator and its initial unconstrained parameters.

    Raises:
        ValueError: A program that cannot generate this site; the message names what was
            found and what to write.
    """
    if not callable(program):
        raise TypeError(
            f"generator is a {type(program).__name__}; expected a NumPyro program "
            "without arguments that samples "
            f"latents and then numpyro.sample('{name}', ...)."
        )
    trace = handlers.trace(handlers.seed(program, rng_key)).get_trace()
    params, transforms, latents = {}, {}, {}
    seen: list[str] = []
    for found, site in trace.items():
        seen.append(found)
        if site["type"] == "mutable":
            raise ValueError(
                f"Generator site '{found}' is mutable state (batch norm, running "
                "statistics): its draws would change "
                "with every call. Use a net without state, such as layer norm."
            )
        if site["type"] == "param":
            constraint = site["kwargs"].get("constraint", constraints.real)
            params[found] = as_real(found, site["value"], constraint)
            transforms[found] = biject_to(constraint)
        elif site["type"] == "sample":
            if site["is_observed"]:
                raise ValueError(
                    f"Generator site '{found}' is observed, or a factor: the density "
                    "of z and x would have an unknown "
                    "normaliser. A generator only draws: leave obs= and numpyro.factor "
                    "out."
                )
            if found != name:
                if name in seen:
                    raise ValueError(
                        f"Generator latent '{found}' is drawn after '{name}': x must "
                        "be given all latents. Draw it "
                        "before, or leave it out."
                    )
                _check_latent(found, site["fn"])
                latents[found] = site["value"]
    if name not in trace or trace[name]["type"] != "sample":
        samples = sorted(
            found for found, site in trace.items() if site["type"] == "sample"
        )
        raise ValueError(
            f"The generator has sample sites {samples}, but none named '{name}', the "
            "model's energy site. Draw x given "
            f"the latents there: numpyro.sample('{name}', "
            "ebm_ppl.standardized_normal(base, net(z), scale))."
        )
    _check_conditional(
        rng_key, name, trace[name]["fn"], trace[name]["value"], distribution
    )
    if not params:
        raise ValueError(
            "The generator has no parameters to learn: no numpyro.param and no module."
        )
    unconstrained = transform_fn(transforms, params, invert=True)
    unconstrained = jax.tree.map(
        lambda value: jnp.asarray(value, jnp.result_type(value)), unconstrained
    )
    is_normal = all(
        _standard_residual(trace[site]["fn"], trace[site]["value"]) is not None
        for site in (name, *latents)
    )
    return Generator(
        snapshot(program), name, transforms, latents, is_normal
    ), unconstrained


def _check_mask(name: str, found: Any) -> None:
    while hasattr(found, "base_dist"):
        if isinstance(found, dist.MaskedDistribution):
            raise ValueError(
                f"Generator site '{name}' is masked: its draws have no density. Take "
                "the mask away."
            )
        found = found.base_dist


def _check_latent(name: str, found: Any) -> None:
    _check_mask(name, found)
    unbounded = same_support(found.support, constraints.real) or same_support(
        found.support, constraints.real_vector
    )
    if found.support.is_discrete or not unbounded:
        raise ValueError(
            f"Generator latent '{name}' has support {found.support}; its posterior is "
            "reached by normal proposals, "
            "which need latents on the whole real line. Draw a standard normal and "
            "transform it inside the program."
        )
    if not found.has_rsample:
        raise ValueError(
            f"Generator latent '{name}' is a {type(found).__name__}, whose draws are "
            "not reparametrised. Draw a "
            "standard normal and transform it inside the program."
        )


def _check_conditional(
    rng_key: Array,
    name: str,
    found: Any,
    value: Array,
    distribution: EnergyDistribution,
) -> None:
    _check_mask(name, found)
    if found.support.is_discrete or not found.has_rsample:
        kind = "discrete" if found.support.is_discrete else "not reparametrised"
        raise ValueError(
            f"The generator's x given z at site '{name}' is a {type(found).__name__}, "
            f"which is {kind}: gradients must "
            "flow through its draws. Use ebm_ppl.standardized_normal(base, net(z), "
            "scale), or another continuous "
            "distribution with reparametrised draws."
        )
    if found.batch_shape or found.event_shape != distribution.event_shape:
        raise ValueError(
            f"The generator's x given z at site '{name}' has batch shape "
            f"{found.batch_shape} and event shape "
            f"{found.event_shape}; expected one event of shape "
            f"{distribution.event_shape}, as the energy's base has. "
            "The program makes one draw (many are made by jax.vmap): use "
            ".to_event(...), and no plates."
        )
    try:
        found.log_prob(value)
    except NotImplementedError as error:
        raise ValueError(
            f"The generator's x given z at site '{name}' is a {type(found).__name__} "
            "whose density at a given value is "
            "not implemented: one of its transforms has no inverse. Use a flow that is "
            "inverted in closed form, of "
            "couplings for example."
        ) from error
    outside = ~distribution.support(found.sample(rng_key, (64,)))
    if bool(jnp.any(outside)):
        raise ValueError(
            f"The generator's x given z at site '{name}' leaves the base's support "
            f"({distribution.support}) in "
            f"{int(jnp.sum(outside))} of 64 draws, where the energy is infinite. Use "
            "ebm_ppl.standardized_normal(base, net(z), scale), which stays in it."
        )
