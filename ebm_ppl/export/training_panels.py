"""Panels of a training history."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ebm_ppl.export.axes import Axes
from ebm_ppl.training.fit import Fit

Series = dict[str, np.ndarray]


def plot_training(
    history: Mapping[str, Any] | Fit,
    *,
    site: str | None = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw a training's diagnostics over its steps, one panel each.

    Loss, densities of training and validation rows, ESS, log Z and update scale.

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
                f"{len(draws)} panels; give plt.subplots({len(draws)}, 1, "
                "sharex=True)[1], or leave axes out."
            )

    for ax, draw in zip(panels, draws, strict=True):
        draw(ax, series)
    for ax in panels[-1:] if axes is None else panels:
        ax.set_xlabel("step")
    return panels


# Panels of a training


def _series(history: Mapping[str, Any], site: str | None) -> Series:
    """The history entries to draw for one site, each with one number per step."""
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


def _draw_density(ax: Axes, series: Series) -> None:
    for key, label, color in (
        ("density_training", "training rows", "C0"),
        ("density_validation", "validation rows", "C1"),
    ):
        values = series.get(key, np.zeros(0))
        (seen,) = np.nonzero(np.isfinite(values))
        ax.plot(seen, values[seen], label=label, color=color, marker=".")
    ax.set_ylabel("log density [nats a row]")
    ax.legend()


def _draw_monitor(ax: Axes, series: Series) -> None:
    (seen,) = np.nonzero(np.isfinite(series["monitor"]))
    ax.plot(seen, series["monitor"][seen], marker=".")
    ax.set_ylabel("monitor")


def _draw_ess(ax: Axes, series: Series) -> None:
    for key, label, color in (
        ("ess", "training islands", "C0"),
        ("ess_holdout", "held-out islands", "C1"),
    ):
        if key in series:
            ax.plot(series[key], label=label, color=color)
    ax.set_ylim(0.0, 1.0)

    # Draws of the base have no islands.
    has_islands = "ess_holdout" in series
    ax.set_ylabel("ESS / walkers" if has_islands else "ESS / draws")
    if has_islands:
        ax.legend()


def _draw_log_normalizer(ax: Axes, series: Series) -> None:
    if "log_normalizer" in series:
        value = series["log_normalizer"]
        has_islands = "log_normalizer_training" in series
        label = "held-out islands" if has_islands else "at every update"
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
    "density_training": np.mean,
    "density_validation": np.mean,
    "monitor": np.mean,
    "ess": np.min,
    "ess_holdout": np.min,
    "log_normalizer": np.mean,
    "log_normalizer_stderr": np.mean,
    "log_normalizer_training": np.mean,
    "update_scale": np.min,
}

_PANELS: list[tuple[tuple[str, ...], Callable[[Axes, Series], None]]] = [
    (("loss",), _draw_loss),
    (("density_validation",), _draw_density),
    (("monitor",), _draw_monitor),
    (("ess", "ess_holdout"), _draw_ess),
    (("log_normalizer", "log_normalizer_training"), _draw_log_normalizer),
    (("update_scale",), _draw_update_scale),
]
