"""What a finished run shows, by fresh draws of its energies' bases."""

from collections.abc import Iterator

from jax import random

from ebm_ppl.backends.base_draws import own_draws
from ebm_ppl.backends.monte_carlo.warnings import draws_astray
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.convergence import still_moving
from ebm_ppl.normalizer.own_draws import distance_from_maximum, is_checked
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.findings import Finding
from ebm_ppl.training.fit import Fit


def judged_by_base(
    fit: Fit, model: Model, arguments: Arguments, has_every_row: bool
) -> Iterator[Finding]:
    """Of a fit whose log Z rests on the base: its reach, the loss and the maximum."""
    state = fit.state
    bound = BoundModel(model, state.transforms, state.rng_key, arguments)
    held = own_draws(bound, state.params, random.fold_in(state.rng_key, 2))
    yield from draws_astray(bound, state.params, held)
    if has_every_row:
        yield from still_moving(fit, model, arguments)
    if has_every_row and is_checked(fit):
        yield from distance_from_maximum(fit, model, arguments, held, "")
