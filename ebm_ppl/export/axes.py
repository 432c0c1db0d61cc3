"""Axes and data that plots share."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution, unwrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any


def new_axes() -> Axes:
    """Axes of a new figure."""
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def unwrapped(distribution: Any) -> EnergyDistribution:
    """The energy distribution inside NumPyro's wrappers; anything else is refused."""
    energy = unwrap(distribution)
    if energy is None:
        raise TypeError(
            f"distribution is a {type(distribution).__name__}; expected an "
            "EnergyDistribution at fixed parameters, such as "
            "EnergyDistribution(lambda x: net(params, x), base)."
        )
    return energy


def finite_rows(distribution: EnergyDistribution, samples: ArrayLike) -> np.ndarray:
    """Samples as rows of one or two numbers."""
    values, event_shape = np.asarray(samples, float), distribution.event_shape
    if values.shape[values.ndim - len(event_shape) :] != event_shape:
        raise ValueError(
            f"samples has shape {values.shape}; expected (..., *event_shape) with "
            f"event shape {event_shape}."
        )
    rows = values.reshape(-1, int(np.prod(event_shape)))
    rows = rows[np.isfinite(rows).all(1)]
    if not len(rows):
        raise ValueError(
            f"samples, of shape {values.shape}, holds no finite point; leave it out, "
            "or give draws."
        )
    return rows
