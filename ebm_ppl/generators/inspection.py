"""Checks of a generator program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.util import transform_fn

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import same_support
from ebm_ppl.generators.program import Generator, Program, standard_residual
from ebm_ppl.model.parameters import value_and_transform
from ebm_ppl.model.program import Params
from ebm_ppl.programs.snapshot import snapshot


def inspect_generator(
    rng_key: Array, program: Program, name: str, distribution: EnergyDistribution
) -> tuple[Generator, Params]:
    """Run a generator program once, and check it against its energy site.

    One body: the checks, in the order in which they are told.

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
            f"without arguments that samples latents and then numpyro.sample('{name}', "
            "...)."
        )

    with handlers.block():
        trace = handlers.trace(handlers.seed(program, rng_key)).get_trace()
    params, transforms, latents = {}, {}, {}
    seen: list[str] = []
    for found, site in trace.items():
        seen.append(found)
        if site["type"] == "mutable":
            raise ValueError(
                f"Generator site '{found}' is mutable state (batch norm, running "
                "statistics): its draws would change with every call. Use a net "
                "without state, such as layer norm."
            )

        if site["type"] == "param":
            params[found], transforms[found] = value_and_transform(found, site)
        elif site["type"] == "sample":
            if site["is_observed"]:
                raise ValueError(
                    f"Generator site '{found}' is observed, or a factor: the density "
                    "of z and x would have an unknown normaliser. A generator only "
                    "draws: leave obs= and numpyro.factor out."
                )

            if found != name:
                if name in seen:
                    raise ValueError(
                        f"Generator latent '{found}' is drawn after '{name}': x must "
                        "be given all latents. Draw it before, or leave it out."
                    )

                _check_latent(found, site["fn"])
                latents[found] = site["value"]
    if name not in trace or trace[name]["type"] != "sample":
        samples = sorted(
            found for found, site in trace.items() if site["type"] == "sample"
        )
        raise ValueError(
            f"The generator has sample sites {samples}, but none named '{name}', the "
            "model's energy site. Draw x given the latents there: "
            f"numpyro.sample('{name}', ebm_ppl.standardized_normal(base, net(z), "
            "scale))."
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
        standard_residual(trace[site]["fn"], trace[site]["value"]) is not None
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
            "reached by normal proposals, which need latents on the whole real line. "
            "Draw a standard normal and transform it inside the program."
        )

    if not found.has_rsample:
        raise ValueError(
            f"Generator latent '{name}' is a {type(found).__name__}, whose draws are "
            "not reparametrised. Draw a standard normal and transform it inside the "
            "program."
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
            f"which is {kind}: gradients must flow through its draws. Use "
            "ebm_ppl.standardized_normal(base, net(z), scale), or another continuous "
            "distribution with reparametrised draws."
        )

    if found.batch_shape or found.event_shape != distribution.event_shape:
        raise ValueError(
            f"The generator's x given z at site '{name}' has batch shape "
            f"{found.batch_shape} and event shape {found.event_shape}; expected one "
            f"event of shape {distribution.event_shape}, as the energy's base has. The "
            "program makes one draw (many are made by jax.vmap): use .to_event(...), "
            "and no plates."
        )

    try:
        jax.eval_shape(found.log_prob, value)
    except NotImplementedError as error:
        raise ValueError(
            f"The generator's x given z at site '{name}' is a {type(found).__name__} "
            "whose density at a given value is not implemented: one of its transforms "
            "has no inverse. Use a flow that is inverted in closed form, of couplings "
            "for example."
        ) from error

    draws = jax.jit(lambda key: found.sample(key, (64,)))(rng_key)
    outside = ~distribution.support(draws)
    if bool(jnp.any(outside)):
        raise ValueError(
            f"The generator's x given z at site '{name}' leaves the base's support "
            f"({distribution.support}) in {int(jnp.sum(outside))} of 64 draws, where "
            "the energy is infinite. Use ebm_ppl.standardized_normal(base, net(z), "
            "scale), which stays in it."
        )
