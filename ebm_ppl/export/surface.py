"""The energy over a plane."""

import jax.numpy as jnp
import numpy as np
from jax import random
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.supports import is_improper
from ebm_ppl.export.axes import Axes, finite_rows, new_axes, unwrapped

MAX_NATS = 10.0

NUM_START_DRAWS = 2_000


def plot_energy_surface(
    distribution: EnergyDistribution,
    *,
    samples: ArrayLike | None = None,
    limits: ArrayLike | None = None,
    num_points: int = 200,
    ax: Axes | None = None,
    max_samples: int = 1000,
) -> Axes:
    """Draw an energy over one or two dimensions, with samples on top.

    One dimension: the curve of ``exp(−(U − min U))``, the density up to its normaliser,
    with samples as a rug. Two: filled contours of ``U − min U``, clipped at ten nats,
    with samples as dots.  U is :meth:`EnergyDistribution.potential`; its minimum is
    taken over the grid.  Points outside the support are blank.

    Args:
        distribution: The energy, at fixed parameters, without a batch shape.
        samples: Shape ``(..., *event_shape)``; points that are not finite are left out.
        limits: ``(low, high)`` of each dimension, shape ``(size, 2)``, or one pair for
            all.  By default the samples' range and a tenth of it on either side, or
            else the 0.1% to 99.9% quantiles of 2,000 draws from the base (or
            ``start``).
        num_points: Grid points per dimension.
        ax: A matplotlib Axes; a new figure by default.
        max_samples: Samples beyond this number are thinned evenly.

    Returns:
        The Axes.

    Raises:
        TypeError: ``distribution`` is not an energy.
        ValueError: There is a batch shape, a discrete support or another event size;
            samples or limits do not fit; limits are needed but not given; or U is
            finite nowhere on the grid.

    One body: the drawing steps, in order.
    """
    distribution = unwrapped(distribution)
    _check_drawable(distribution)
    points = None if samples is None else finite_rows(distribution, samples)
    bounds = _limits(distribution, points, limits)
    grids = [np.linspace(low, high, num_points) for low, high in bounds]
    mesh = np.meshgrid(*grids)
    above = _above_minimum(
        distribution, np.stack([grid.ravel() for grid in mesh], -1), bounds
    ).reshape(mesh[0].shape)
    if points is not None and len(points) > max_samples:
        points = points[np.linspace(0, len(points) - 1, max_samples).astype(int)]

    ax = new_axes() if ax is None else ax
    if len(bounds) == 1:
        ax.plot(grids[0], np.exp(-above))
        if points is not None:
            ax.plot(
                points[:, 0],
                np.full(len(points), 0.02),
                "|",
                color="C1",
                transform=ax.get_xaxis_transform(),
            )

        ax.set_ylim(bottom=0.0)
        ax.set_xlabel("x")
        ax.set_ylabel("exp(−(U(x) − min U))")
    else:
        contours = ax.contourf(
            *grids,
            np.minimum(above, MAX_NATS),
            levels=np.linspace(0.0, MAX_NATS, 21).tolist(),
        )

        colorbar = ax.figure.colorbar(
            contours, ax=ax, label="U(x) − min U [nats], clipped"
        )
        colorbar.set_ticks([0, 2, 4, 6, 8, 10])
        if points is not None:
            ax.plot(
                *points.T,
                "o",
                markersize=2.5,
                color="white",
                markeredgecolor="black",
                markeredgewidth=0.3,
            )

        ax.set_ylim(*bounds[1])
        ax.set_xlabel("x[0]")
        ax.set_ylabel("x[1]")

    ax.set_xlim(*bounds[0])
    return ax


# The grid of a surface


def _check_drawable(distribution: EnergyDistribution) -> None:
    if distribution.batch_shape:
        raise ValueError(
            f"The energy has batch shape {distribution.batch_shape}, one surface per "
            "element; take one element: build the EnergyDistribution from one "
            "element's energy and a base without a batch shape."
        )

    size = int(np.prod(distribution.event_shape))
    if size not in (1, 2):
        raise ValueError(
            f"The energy has event shape {distribution.event_shape}, which is {size} "
            "numbers; a surface can be drawn over one or two. Compare energies with "
            "plot_energies(distribution, values, draws), or hold all but two numbers "
            "fixed: EnergyDistribution(lambda v: energy(fill_in(v)), base_of_two)."
        )

    if distribution.support.is_discrete:
        raise ValueError(
            "The energy has a discrete support; a surface needs a continuous one. "
            "Compare energies with plot_energies(distribution, values, draws)."
        )


def _limits(
    distribution: EnergyDistribution,
    samples: np.ndarray | None,
    limits: ArrayLike | None,
) -> np.ndarray:
    """Lower and upper end of each dimension, shape ``(size, 2)``."""
    size = int(np.prod(distribution.event_shape))
    if limits is not None:
        given = np.asarray(limits, float)
        if given.shape not in ((2,), (size, 2)) or not (
            np.isfinite(given).all() and np.all(np.diff(given) > 0)
        ):
            raise ValueError(
                f"limits = {given.tolist()}; expected finite (low, high) with low < "
                f"high, one pair or {size} of them, such as {[(-3.0, 3.0)] * size}."
            )

        return np.broadcast_to(given, (size, 2))
    if samples is not None:
        low, high = samples.min(0), samples.max(0)
        margin = np.where(high > low, 0.1 * (high - low), 1.0)
        return np.stack([low - margin, high + margin], -1)
    start = distribution.base if distribution.start is None else distribution.start
    if is_improper(start):
        raise ValueError(
            "The energy's base is improper and has no start, so it does not say where "
            f"to draw; give limits={[(-3.0, 3.0)] * size} or samples=."
        )

    rows = np.asarray(start.sample(random.key(0), (NUM_START_DRAWS,)), float).reshape(
        NUM_START_DRAWS, size
    )
    return np.quantile(rows, [0.001, 0.999], axis=0).T


def _above_minimum(
    distribution: EnergyDistribution, rows: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """``U − min U`` at each row; NaN outside the support, where U is not evaluated."""
    points = jnp.asarray(rows.reshape(-1, *distribution.event_shape))
    inside = np.asarray(distribution.support(points))
    potential = np.full(len(rows), np.nan)
    if inside.any():
        potential[inside] = distribution.potential(points[inside])
    finite = potential[np.isfinite(potential)]
    if not len(finite):
        raise ValueError(
            f"U(x) is finite at none of {len(rows)} points within {bounds.tolist()} "
            f"({int(inside.sum())} of them in the support); give limits= that meet the "
            "support, and check the parameters inside the energy."
        )

    # An unbounded density would hide everything else.
    potential[potential == -np.inf] = np.nan
    return potential - finite.min()
