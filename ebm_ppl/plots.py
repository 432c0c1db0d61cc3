"""The plots that ArviZ lacks: a training's diagnostics, energies of data and draws, an
energy's surface.

Matplotlib is imported inside functions: it costs time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import random
from jax.typing import ArrayLike

from ebm_ppl.distribution import EnergyDistribution, is_improper, unwrap
from ebm_ppl.training import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

MAX_NATS = 10.0
NUM_START_DRAWS = 2_000

Series = dict[str, np.ndarray]


def plot_training(
    history: Mapping[str, Any] | Fit,
    *,
    site: str | None = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw a training's diagnostics over its steps: loss, ESS, log Z and update scale,
    one panel each.

    The band around log Z is ± one standard error of the held-out islands.  Where a site
    has a batch shape, the ESS is that of the worst element, and log Z and its standard
    error are means over elements (the mean of the errors bounds the error of the mean,
    however elements are correlated).

    Args:
        history: ``Fit.history`` or the :class:`Fit` itself.  Keys that another backend
            does not have are skipped, and a panel without data is not drawn.
        site: Which energy site to draw, where there are several.
        axes: One matplotlib Axes per panel that has data, of any shape; a new figure by
            default.

    Returns:
        The Axes drawn on, shape ``(num_panels,)``.

    Raises:
        ValueError: There are several energy sites and ``site`` names none of them, the
            history has nothing to draw, or the number of ``axes`` is not that of the
            panels.
    """
    import matplotlib.pyplot as plt

    series = _series(history.history if isinstance(history, Fit) else history, site)
    draws = [draw for keys, draw in _PANELS if any(key in series for key in keys)]
    if not draws:
        expected = [key for keys, _ in _PANELS for key in keys]
        raise ValueError(
            "The history has nothing to draw: expected at least one step of any of "
            f"{expected}."
        )
    if axes is None:
        size = (7.0, 0.6 + 1.9 * len(draws))
        figure, panels = plt.subplots(
            len(draws),
            1,
            sharex=True,
            squeeze=False,
            figsize=size,
            layout="constrained",
        )
        panels = panels.ravel()
        figure.align_ylabels(panels)
    else:
        panels = np.ravel(np.asarray(axes, dtype=object))
        if len(panels) != len(draws):
            raise ValueError(
                f"axes holds {len(panels)} Axes, but this history has data for "
                f"{len(draws)} panels; give "
                f"plt.subplots({len(draws)}, 1, sharex=True)[1], or leave axes out."
            )
    for ax, draw in zip(panels, draws, strict=True):
        draw(ax, series)
    for ax in panels[-1:] if axes is None else panels:
        ax.set_xlabel("step")
    return panels


def plot_energies(
    distribution: EnergyDistribution,
    values: ArrayLike,
    draws: ArrayLike,
    *,
    bins: int | str | Sequence[float] = 50,
    ax: Axes | None = None,
    labels: tuple[str, str] = ("data", "model"),
) -> Axes:
    """Compare the energies E(x) of data with those of the model's draws, as two
    histograms on shared bins.

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
        labels: What ``values`` and ``draws`` are called.

    Returns:
        The Axes.

    Raises:
        TypeError: ``distribution`` is not an energy.
        ValueError: ``values`` or ``draws`` do not fit the event shape, or have no
            finite energy at all.
    """
    distribution = _unwrapped(distribution)
    finite, names = [], []
    for points, label in zip((values, draws), labels, strict=True):
        energies = np.asarray(distribution.energy(np.asarray(points)), float).ravel()
        kept = energies[np.isfinite(energies)]
        if not len(kept):
            raise ValueError(
                f"None of the {len(energies)} energies of '{label}' is finite, so "
                "there is no histogram to draw; check "
                "the parameters inside the energy and that the values lie in its "
                "support."
            )
        missing = len(energies) - len(kept)
        finite.append(kept)
        names.append(f"{label} ({missing} not finite)" if missing else label)
    ax = _new_axes() if ax is None else ax
    edges = np.histogram_bin_edges(np.concatenate(finite), bins)
    for kept, name in zip(finite, names, strict=True):
        ax.hist(kept, bins=edges.tolist(), density=True, alpha=0.5, label=name)
    ax.set_xlabel("energy E(x) [nats]")
    ax.set_ylabel("density [1/nats]")
    ax.legend()
    return ax


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
    """
    distribution = _unwrapped(distribution)
    _check_drawable(distribution)
    points = None if samples is None else _finite_rows(distribution, samples)
    bounds = _limits(distribution, points, limits)
    grids = [np.linspace(low, high, num_points) for low, high in bounds]
    mesh = np.meshgrid(*grids)
    above = _above_minimum(
        distribution, np.stack([grid.ravel() for grid in mesh], -1), bounds
    ).reshape(mesh[0].shape)
    if points is not None and len(points) > max_samples:
        points = points[np.linspace(0, len(points) - 1, max_samples).astype(int)]

    ax = _new_axes() if ax is None else ax
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


def _new_axes() -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _unwrapped(distribution: Any) -> EnergyDistribution:
    energy = unwrap(distribution)
    if energy is None:
        raise TypeError(
            f"distribution is a {type(distribution).__name__}; expected an "
            "EnergyDistribution at fixed parameters, "
            "such as EnergyDistribution(lambda x: net(params, x), base)."
        )
    return energy


# Panels of a training


def _series(history: Mapping[str, Any], site: str | None) -> Series:
    """The entries that panels draw, of one site, each with one number per step."""
    sites = list(
        dict.fromkeys(
            name
            for entry in history.values()
            if isinstance(entry, Mapping)
            for name in entry
        )
    )
    if site is None and len(sites) > 1:
        raise ValueError(
            f"The history has energy sites {sites}; name one of them: "
            f"site='{sites[0]}'."
        )
    if site is not None and site not in sites:
        raise ValueError(
            f"site = '{site}' is not among the history's energy sites {sites}; name "
            "one of those."
        )
    chosen = next(iter(sites), None) if site is None else site
    series: Series = {}
    for key, over_elements in _OVER_ELEMENTS.items():
        entry = history.get(key, ())
        if isinstance(entry, Mapping):
            entry = entry.get(chosen, ())
        values = np.asarray(entry, float)
        if values.size:
            series[key] = (
                values
                if values.ndim == 1
                else over_elements(values.reshape(len(values), -1), axis=1)
            )
    return series


def _draw_loss(ax: Axes, series: Series) -> None:
    ax.plot(series["loss"])
    ax.set_ylabel("loss [nats]")


def _draw_ess(ax: Axes, series: Series) -> None:
    for key, label, color in (
        ("ess", "training islands", "C0"),
        ("ess_holdout", "held-out islands", "C1"),
    ):
        if key in series:
            ax.plot(series[key], label=label, color=color)
    ax.set_ylim(0.0, 1.0)
    ax.set_ylabel("ESS / walkers")
    ax.legend()


def _draw_log_normalizer(ax: Axes, series: Series) -> None:
    if "log_normalizer" in series:
        value = series["log_normalizer"]
        label = "held-out islands"
        if "log_normalizer_stderr" in series:
            stderr = series["log_normalizer_stderr"]
            ax.fill_between(
                np.arange(len(value)),
                value - stderr,
                value + stderr,
                color="C1",
                alpha=0.3,
                linewidth=0,
            )
            label += " ± 1 standard error"
        ax.plot(value, label=label, color="C1")
    if "log_normalizer_training" in series:
        ax.plot(
            series["log_normalizer_training"],
            label="training islands (biased)",
            color="C0",
            linewidth=0.7,
        )
    ax.set_ylabel("log Z [nats]")
    ax.legend()


def _draw_update_scale(ax: Axes, series: Series) -> None:
    scale = series["update_scale"]
    ax.plot(scale)
    positive = scale[scale > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        ax.set_yscale("log")
    ax.set_ylabel("update scale")


_OVER_ELEMENTS: dict[str, Callable[..., np.ndarray]] = {
    "loss": np.mean,
    "ess": np.min,
    "ess_holdout": np.min,
    "log_normalizer": np.mean,
    "log_normalizer_stderr": np.mean,
    "log_normalizer_training": np.mean,
    "update_scale": np.min,
}
_PANELS: list[tuple[tuple[str, ...], Callable[[Axes, Series], None]]] = [
    (("loss",), _draw_loss),
    (("ess", "ess_holdout"), _draw_ess),
    (("log_normalizer", "log_normalizer_training"), _draw_log_normalizer),
    (("update_scale",), _draw_update_scale),
]


# The grid of a surface


def _check_drawable(distribution: EnergyDistribution) -> None:
    if distribution.batch_shape:
        raise ValueError(
            f"The energy has batch shape {distribution.batch_shape}, one surface per "
            "element; take one element: build "
            "the EnergyDistribution from one element's energy and a base without a "
            "batch shape."
        )
    size = int(np.prod(distribution.event_shape))
    if size not in (1, 2):
        raise ValueError(
            f"The energy has event shape {distribution.event_shape}, which is {size} "
            "numbers; a surface can be drawn "
            "over one or two. Compare energies with plot_energies(distribution, "
            "values, draws), or hold all but two "
            "numbers fixed: EnergyDistribution(lambda v: energy(fill_in(v)), "
            "base_of_two)."
        )
    if distribution.support.is_discrete:
        raise ValueError(
            "The energy has a discrete support; a surface needs a continuous one. "
            "Compare energies with "
            "plot_energies(distribution, values, draws)."
        )


def _finite_rows(distribution: EnergyDistribution, samples: ArrayLike) -> np.ndarray:
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
                f"high, one pair or {size} of them, "
                f"such as {[(-3.0, 3.0)] * size}."
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
            "to draw; give limits="
            f"{[(-3.0, 3.0)] * size} or samples=."
        )
    rows = np.asarray(start.sample(random.key(0), (NUM_START_DRAWS,)), float).reshape(
        NUM_START_DRAWS, size
    )
    return np.quantile(rows, [0.001, 0.999], axis=0).T


def _above_minimum(
    distribution: EnergyDistribution, rows: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """``U − min U`` at each row; NaN outside the support, where the energy is not even called."""
    points = jnp.asarray(rows.reshape(-1, *distribution.event_shape))
    inside = np.asarray(distribution.support(points))
    potential = np.full(len(rows), np.nan)
    if inside.any():
        potential[inside] = distribution.potential(points[inside])
    finite = potential[np.isfinite(potential)]
    if not len(finite):
        raise ValueError(
            f"U(x) is finite at none of {len(rows)} points within {bounds.tolist()} "
            f"({int(inside.sum())} of them in "
            "the support); give limits= that meet the support, and check the "
            "parameters inside the energy."
        )
    # A density without bound would hide everything else.
    potential[potential == -np.inf] = np.nan
    return potential - finite.min()
