"""Optax optimisers: checks and the update call."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ebm_ppl.model.program import Params

# Optax's messages where an update needs more than grads, params, value and grad.
_WANTS_MORE = re.compile(
    r"missing \d+ required (?:keyword-only|positional) argument|must be provided"
)


def check_optimizer(option: str, optim: Any) -> None:
    """Refuse a non-optax optimiser, or one that re-evaluates the loss.

    Args:
        option: The argument's name, for messages.
        optim: Its value.

    Raises:
        TypeError: It is no gradient transformation, or it re-evaluates the loss (line
            searches).
    """
    if not isinstance(optim, optax.GradientTransformation):
        raise TypeError(
            f"{option} is a {type(optim).__name__}; expected an optax gradient "
            "transformation such as optax.adam(1e-3)."
        )
    try:
        _rehearse(option, optim, {"x": jnp.zeros(2)})
    except _WantsMoreError:
        raise
    except Exception:
        return  # it may depend on parameter names or shapes: see `check_on_params`


def check_on_params(
    option: str, optim: optax.GradientTransformation, params: Params
) -> None:
    """Trace one update on the parameters, before any expensive work.

    Raises:
        TypeError: As :func:`check_optimizer`; the optimiser's other errors propagate.
    """
    _rehearse(option, optim, params)


def updates_of(
    optim: optax.GradientTransformation,
    grads: Params,
    optim_state: Any,
    params: Params,
    loss: Array,
) -> tuple[Params, Any]:
    """Call ``optim.update``, as NumPyro's SVI does.

    The loss is passed as ``value=`` and the gradient as ``grad=`` where the optimiser
    takes them.

    Args:
        optim: The optimiser.
        grads: Gradients of the loss.
        optim_state: The optimiser's state.
        params: Parameters at which the gradients were taken.
        loss: The loss at ``params``, a scalar.

    Returns:
        Updates and the next state.
    """
    told = {
        name: given
        for name, given in (("value", loss), ("grad", grads))
        if _takes(optim, name)
    }
    return optim.update(grads, optim_state, params, **told)


def carries_on(optim: optax.GradientTransformation, params: Params) -> bool:
    """Whether updates go on in a direction in which the gradient has ended: momentum."""

    @jax.jit
    def falls_on(params: Params) -> Array:
        zeros = jax.tree.map(jnp.zeros_like, params)
        ones = jax.tree.map(jnp.ones_like, params)
        optim_state = optim.init(zeros)
        for grads in (ones, ones, zeros):
            updates, optim_state = updates_of(
                optim, grads, optim_state, zeros, jnp.ones(())
            )
        falls = [jnp.any(leaf < 0) for leaf in jax.tree.leaves(updates)]
        return jnp.any(jnp.stack(falls))

    return bool(falls_on(params))


class _WantsMoreError(TypeError):
    pass


def _rehearse(option: str, optim: optax.GradientTransformation, params: Params) -> None:
    def once(params: Params) -> Any:
        return updates_of(optim, params, optim.init(params), params, jnp.zeros(()))

    try:
        jax.eval_shape(once, params)
    except (TypeError, ValueError) as error:
        if not _WANTS_MORE.search(str(error)):
            raise
        raise _WantsMoreError(
            f"{option} cannot be used here: its update is told the gradient and "
            f"value=loss, and wants more ({error}). Line searches evaluate the loss "
            "again at other parameters, where walkers, or a generator's draws, do not "
            "say what it is. Use a rate that is given (optax.adam, "
            "optax.lbfgs(learning_rate, linesearch=None)) or that follows the loss "
            "(optax.contrib.reduce_on_plateau, optax.polyak_sgd)."
        ) from None


def _takes(optim: optax.GradientTransformation, name: str) -> bool:
    if not isinstance(optim, optax.GradientTransformationExtraArgs):
        return False
    arguments = inspect.signature(optim.update).parameters.values()
    return any(
        argument.name == name or argument.kind is argument.VAR_KEYWORD
        for argument in arguments
    )
