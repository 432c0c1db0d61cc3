"""Whether a model has the same energies for two sets of rows."""

import jax
import numpy as np
from jax import random

from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.model.repeatable import (
    energies_at_points,
    moved_along,
    random_direction,
)


def have_same_energies(one: BoundModel, other: BoundModel, params: Params) -> bool:
    """Whether the same log Z's serve both.

    Args:
        one: The model on some rows.
        other: The same on others.
        params: Unconstrained parameters, or constrained ones where the models have no
            transforms.

    Raises:
        ValueError: A site has one log Z for all of its rows, and another one for others.
    """
    # Parameters may start where much of the energy is hidden, as by a last layer of 0.
    key_move, key_points = random.split(random.key(0))
    params = jax.tree.map(jax.numpy.asarray, params)
    moved = moved_along(params, random_direction(key_move, params), 0.1)
    ours, _ = energies_at_points(one, moved, key_points)
    theirs, _ = energies_at_points(other, moved, key_points)

    are_same = True
    for name, energy in one.energies(params).items():
        here, there = np.asarray(ours[name]), np.asarray(theirs.get(name, np.nan))
        if here.shape == there.shape and np.array_equal(here, there, equal_nan=True):
            continue
        are_same = False
        if not energy.batch_shape:
            raise ValueError(
                f"The energy or the base at site '{name}' is another one for the "
                "held-out rows than for those that are trained on: it is computed from "
                "the rows that the model is given (their mean, say). Compute that outside "
                "of the model, from the training rows, or take it as an argument."
            )
    return are_same
