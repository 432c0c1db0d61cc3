"""One step of an optimiser along the gradient of a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from ebm_ppl.training.optimizers import updates_of


class Step(NamedTuple):
    """What a step gave.

    Attributes:
        params: Updated.
        optim_state: The optimiser's next state.
        loss: At the parameters before.
        grad_norm: Norm of its gradient.
        aux: What else the loss returned.
    """

    params: Any
    optim_state: Any
    loss: Array
    grad_norm: Array
    aux: Any


def gradient_step(
    optim: optax.GradientTransformation,
    loss_of: Callable[[Any], tuple[Array, Any]],
    params: Any,
    optim_state: Any,
) -> Step:
    """Update parameters along the gradient of ``loss_of(params) -> (loss, aux)``."""
    (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, optim_state = updates_of(optim, grads, optim_state, params, loss)
    params = optax.apply_updates(params, updates)
    return Step(params, optim_state, loss, optax.tree.norm(grads), aux)
