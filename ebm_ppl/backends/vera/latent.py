"""Chains in a generator's latent space, whose x follows the fitted energy."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.reparam import LocScaleReparam, TransformReparam

from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.wrappers import innermost
from ebm_ppl.generators.fitting import fitted_score, score_for
from ebm_ppl.generators.program import Generator
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.model.binding import bind_model
from ebm_ppl.model.program import Model, Params
from ebm_ppl.training.fit import Fit


def latent_model(
    rng_key: Array,
    fit: Fit,
    model: Model | EnergyDistribution,
    *args: Any,
    correct: bool = True,
    score: ImportanceScore | None = None,
    num_lent: int = 64,
    **kwargs: Any,
) -> Callable[[], Array]:
    r"""A NumPyro program for chains in the latent space of a generator of VERA's.

    It is the generator at its fitted parameters and one factor, ``exp(−U(x)) / q̂(x)``,
    so that its x follows the model's density while chains move in latents and noise,
    where modes of x may be one:

    .. math::
        p(z)\, q(x \mid z)\, e^{-U(x)} / q(x) = e^{-U(x)}\, q(z \mid x).

    q̂ is the importance-sampling estimate of ``score`` with fixed random numbers, so x
    follows the model up to the error of log q̂.  Its noise falls with
    ``score.num_samples`` and ``num_lent``; runs with another ``rng_key`` reveal it.
    They do not reveal a mode of z given x that all samples miss: compare the mean
    energy with that of :func:`sample`.

    Run it like any other program; ``init_to_sample`` starts chains at draws of the
    generator::

        refined = ebm_ppl.latent_model(key, fit, model, x)
        kernel = NUTS(refined, init_strategy=init_to_sample)
        mcmc = MCMC(kernel, num_warmup=500, num_samples=1000, num_chains=4)

    Latents and noise are its sample sites (a normal x given z becomes its standard
    noise), x a deterministic site.  A generator without latents, a flow, has noise
    alone and an exact q (Hoffman et al. 2019). ``HMC(refined, num_steps=1,
    trajectory_length=None)`` is MALA. ``to_arviz(..., draws={name:
    mcmc.get_samples(group_by_chain=True)[name]})`` exports x,
    ``arviz.from_numpyro(mcmc, log_likelihood=False)`` everything (the factor is no
    likelihood of data).  q̂ is as smooth as the derivative of the generator: nets with
    swish or tanh, not ReLU, let chains take longer steps.

    Args:
        rng_key: A JAX PRNG key, for the random numbers of q̂.
        fit: A fit by :class:`VERA`.
        model: The model that was fitted.
        args: Its positional arguments.
        correct: False leaves ``1 / q̂`` out.  x then follows q(x) exp(−U(x)), the
            square of the model's density where the generator is exact, so its draws
            look better than the model's.
        score: Estimator of q̂; None takes :class:`ImportanceScore` with its defaults.
            A generator without latents needs none.
        num_lent: Draws of the prior among the samples of q̂, for posteriors of z with
            several modes.
        kwargs: The model's keyword arguments.

    Returns:
        A program without arguments that returns x.

    Raises:
        TypeError: A fit by another backend, or a score that is not an
            :class:`ImportanceScore`.
        ValueError: A model without the generator's site.

    Source: Grathwohl et al. (2021) for chains in latent space, without 1 / q̂; Che et
    al. (2020) for energies that are already relative to the generator, which need none.

    One body: the program that it returns closes over what is found first.
    """
    state = fit.state
    if not isinstance(state, VERAState):
        raise TypeError(
            "latent_model moves in a generator's latents, but this fit's state is a "
            f"{type(state).__name__}. Fit with VERA, or draw x itself: "
            "ebm_ppl.sample(key, model, fit.params, ..., method='nuts')."
        )

    key_bind, key_lent, key_fit, key_noise = random.split(rng_key, 4)
    _, found = bind_model(key_bind, model, fit.params, args, kwargs)
    generator, params = state.generator, state.generator_params
    name = generator.name
    if name not in found:
        raise ValueError(
            f"The generator draws '{name}', but the model's energy sites are "
            f"{sorted(found)}."
        )

    score = ImportanceScore() if score is None else score
    if not isinstance(score, ImportanceScore):
        raise TypeError(
            f"score is a {type(score).__name__}; expected an ImportanceScore, whose "
            "log q̂ can be followed by chains."
        )

    log_q = score_for(score, generator)
    energy, (lent, _) = found[name], state.draws(key_lent, num_lent)
    score_state = fitted_score(log_q, key_fit, generator, params) if correct else None

    def program() -> Array:
        with handlers.trace() as trace, handlers.reparam(config=_standard_noise(name)):
            _fixed(generator, params)()
        latents, _ = ravel_pytree(
            {site: trace[site]["value"] for site in generator.latents}
        )
        x = trace[name]["value"]

        # The generator runs again inside q̂: its sites stay hidden from inference.
        with handlers.block():
            potential = energy.unchecked_potential(x[None])[0]
            log_weight = -jnp.where(energy.support(x), potential, jnp.inf)
            if score_state is not None:
                pair = generator.pair(params)
                log_weight -= log_q.log_density(
                    key_noise, score_state, pair, latents, x, lent
                )

        numpyro.factor(f"{name}_log_weight", log_weight)
        return x

    return program


def _fixed(generator: Generator, params: Params) -> Callable[[], Any]:
    """The generator's program at fixed parameters, its ``param`` sites hidden."""
    return handlers.block(
        generator.at(params), hide_fn=lambda site: site["type"] == "param"
    )


def _standard_noise(name: str) -> Callable[[dict], Any]:
    """A ``reparam`` configuration by which a normal x is drawn as standard noise."""

    def configure(site: dict) -> Any:
        # TransformReparam draws the untransformed value at a site with suffix "_base".
        if site["name"] != name + "_base" * site["name"].removeprefix(name).count(
            "_base"
        ):
            return None
        found = innermost(site["fn"])
        if isinstance(found, dist.TransformedDistribution):
            return TransformReparam()
        return LocScaleReparam(0.0) if isinstance(found, dist.Normal) else None

    return configure
