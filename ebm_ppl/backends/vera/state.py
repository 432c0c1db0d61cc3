"""The state of the VERA backend."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.vera.defensive import Defence
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.generators.program import Generator
from ebm_ppl.model.program import Params
from ebm_ppl.training.state import Population, State

# Nats that a bound of a good generator may lie under log Z.
MAX_GAP = 0.2
# A generator's draws are independent; ArviZ needs the two dimensions (chain, draw).
POPULATION = (4, 1000)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "generator",
        "generator_params",
        "generator_optim_state",
        "score_state",
        "coordinates",
        "log_normalizer_bound",
        "defence",
        "rng_key",
    ],
    meta_fields=["entropy_weight", "gradient_penalty"],
)
@dataclass(frozen=True)
class VERAState(State):
    """Everything that the next update needs.

    Attributes:
        params: Unconstrained parameters of the model, by site name.
        transforms: Unconstrained to constrained, by site name.
        optim_state: State of the model's optimiser.
        generator: The generator as functions.
        generator_params: The generator's unconstrained parameters φ.
        generator_optim_state: State of the generator's optimiser.
        score_state: State of the score estimator.
        coordinates: The map from base-standard coordinates to x, frozen at the initial
            parameters.
        log_normalizer_bound: Running mean of ``E_q[−U] + H(q)``.
        defence: What defensive draws need; None without them.
        rng_key: The key of the next update.
        entropy_weight: λ; the generator approximates exp(−U/λ).
        gradient_penalty: γ of the run; over 0 the fit is a penalised one.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    generator: Generator
    generator_params: Params
    generator_optim_state: Any
    score_state: Any
    coordinates: Transform
    log_normalizer_bound: Array
    defence: Defence | None
    rng_key: Array
    entropy_weight: float
    gradient_penalty: float

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, EnergyDistribution],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """Independent draws of the generator."""
        if self.generator.name in given:
            return {}
        _, values = self.draws(rng_key, POPULATION[0] * POPULATION[1])
        values = values.reshape(*POPULATION, *values.shape[1:])
        what = "of the generator, not of the model"
        return {self.generator.name: Population(values, what)}

    def attributes(self) -> dict[str, float]:
        """What was fitted (λ and γ), and the generator's bound on log Z."""
        return {
            "entropy_weight": float(self.entropy_weight),
            "gradient_penalty": float(self.gradient_penalty),
            "log_normalizer_bound": float(self.log_normalizer_bound),
        }

    def contradictions(self, log_normalizer: LogNormalizer) -> tuple[str, ...]:
        """A certified log Z far above the generator's bound on it.

        None where draws around rows stood in for what the generator misses.
        """
        if self.defence is not None:
            return ()
        name, bound = self.generator.name, float(self.log_normalizer_bound)
        lower = float(log_normalizer.lower[name])
        if not lower - bound > MAX_GAP:
            return ()
        return (
            f"log Z of energy site '{name}' is {lower:.3g} at least, and the generator's "
            f"bound on it {bound:.3g}: its draws, which stood for the model's in the "
            "gradient, are not the model's.",
        )

    def draws(self, rng_key: Array, num_draws: int) -> tuple[Array, Array]:
        """Draws ``(z, x)`` of the generator.

        Shapes: ``(num_draws, num_latents)`` and ``(num_draws, *event_shape)``.
        """
        return self.generator.draws(
            self.generator_params, random.split(rng_key, num_draws)
        )

    def constrained_generator_params(self) -> Params:
        """Constrained values at the generator's ``param`` sites.

        ``numpyro.infer.Predictive`` takes them as ``params``.
        """
        return self.generator.constrain(self.generator_params)


class GeneratorProgress(NamedTuple):
    """The part of the state that the generator's steps carry."""

    params: Params
    optim_state: Any
    score_state: Any
    bound: Array
