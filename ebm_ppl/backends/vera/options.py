"""Validation of the VERA backend's options."""

from typing import Any

from ebm_ppl.generators.scores.base import Score
from ebm_ppl.generators.scores.hmc import HMCScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.variational import VariationalScore
from ebm_ppl.training.optimizers import check_optimizer

SCORES = {
    "importance": ImportanceScore,
    "variational": VariationalScore,
    "hmc": HMCScore,
}


def check_options(backend: Any) -> None:
    """Check the options of a :class:`VERA`.

    Raises:
        ValueError: The message names the option, and what it may be.
        TypeError: An optimiser is not an optax gradient transformation.
    """
    for option in ("optim", "generator_optim"):
        check_optimizer(option, getattr(backend, option))
    for option in ("num_particles", "num_energy_steps", "num_generator_steps"):
        if getattr(backend, option) < 1:
            raise ValueError(
                f"{option} = {getattr(backend, option)}; expected at least 1."
            )

    if not backend.entropy_weight > 0:
        raise ValueError(
            f"entropy_weight = {backend.entropy_weight}; expected a positive number: "
            "without entropy the generator falls onto one mode."
        )

    if backend.importance_weights and backend.num_particles == 1:
        raise ValueError(
            "num_particles = 1 with importance_weights=True: one draw has weight 1 "
            "whatever it is. Take 64 or more."
        )

    if backend.defensive and backend.importance_weights:
        raise ValueError(
            "defensive=True weighs its draws already; leave importance_weights out."
        )
    if backend.defensive and not (
        backend.score == "importance" or isinstance(backend.score, ImportanceScore)
    ):
        raise ValueError(
            "defensive=True needs the generator's density at values that it has not "
            "drawn, which score='importance' knows; found another score."
        )

    if not backend.gradient_penalty >= 0:
        raise ValueError(
            f"gradient_penalty = {backend.gradient_penalty}; expected 0 or more."
        )


def resolve_score(score: str | Score) -> Score:
    """The score estimator, from its name or as given.

    Raises:
        ValueError: An unknown name.
    """
    if not isinstance(score, str):
        return score
    if score not in SCORES:
        raise ValueError(
            f"score = {score!r}; expected one of {', '.join(SCORES)}, or an "
            "ImportanceScore."
        )
    return SCORES[score]()
