"""Energies of data and of draws, as histograms.

Matplotlib is imported inside functions: it costs time.
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.export.axes import Axes, new_axes, unwrapped


def plot_energies(
    distribution: EnergyDistribution,
    values: ArrayLike,
    draws: ArrayLike,
    *,
    bins: int | str | Sequence[float] = 50,
    ax: Axes | None = None,
    labels: tuple[str, str] = ("data", "model"),
) -> Axes:
    """Compare the energies E(x) of data with those of the model's draws.

    Two histograms on shared bins.

    Draws need equal weights, as those in ``to_arviz(...)["posterior_predictive"]``
    have; a fit's walkers do not. Energies that are not finite are left out and counted
    in the legend.

    Args:
        distribution: The energy, at fixed parameters.
        values: Data, shape ``(..., *batch_shape, *event_shape)``.
        draws: Draws, of the same shape up to any leading dimensions such as ``(chain,
            draw)``.
        bins: Their number, edges or rule, as for ``numpy.histogram_bin_edges``.
        ax: A matplotlib Axes; a new figure by default.
        labels: Legend labels of ``values`` and ``draws``.

    Returns:
        The Axes.

    Raises:
        TypeError: ``distribution`` is not an energy.
        ValueError: ``values`` or ``draws`` do not fit the event shape, or have no
            finite energy at all.
    """
    distribution = unwrapped(distribution)
    finite, names = [], []
    for points, label in zip((values, draws), labels, strict=True):
        energies = np.asarray(distribution.energy(np.asarray(points)), float).ravel()
        kept = energies[np.isfinite(energies)]
        if not len(kept):
            raise ValueError(
                f"None of the {len(energies)} energies of '{label}' is finite, so "
                "there is no histogram to draw; check the parameters inside the "
                "energy and that the values lie in its support."
            )

        missing = len(energies) - len(kept)
        finite.append(kept)
        names.append(f"{label} ({missing} not finite)" if missing else label)

    ax = new_axes() if ax is None else ax
    edges = np.histogram_bin_edges(np.concatenate(finite), bins)
    for kept, name in zip(finite, names, strict=True):
        ax.hist(kept, bins=edges.tolist(), density=True, alpha=0.5, label=name)
    ax.set_xlabel("energy E(x) [nats]")
    ax.set_ylabel("density [1/nats]")
    ax.legend()
    return ax
