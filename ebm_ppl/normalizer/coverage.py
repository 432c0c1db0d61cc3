"""Whether a grid of parameters covers their posterior."""

from collections.abc import Mapping

import numpy as np
from numpyro.distributions.transforms import Transform

# Share of the posterior beyond one end of the grid that is flagged.
MAX_BEYOND = 0.01


def flags_of_coverage(
    grid: Mapping[str, np.ndarray],
    transforms: Mapping[str, Transform],
    log_joint: np.ndarray,
) -> tuple[str, ...]:
    """Flags of ends beyond which the posterior goes on.

    Beyond an end, the density is taken to fall as it does inside, exponentially, and not
    further than the parameter's support.

    Args:
        grid: Ascending values of every parameter.
        transforms: From the real line to the parameters' supports.
        log_joint: Log joint density of the data and the parameters, up to a constant,
            with one axis for every parameter.
    """
    with np.errstate(invalid="ignore"):  # data that are impossible everywhere
        density = np.exp(log_joint - np.max(log_joint))
    flags = []
    for axis, (name, values) in enumerate(grid.items()):
        marginal = density
        for other, line in reversed(list(enumerate(grid.values()))):
            if other != axis:
                marginal = np.trapezoid(marginal, line, axis=other)
        inside = np.trapezoid(marginal, values)

        ends = np.asarray(transforms[name](np.array([-1e30, 1e30])), float)
        for end, place, step in ((ends[0], 0, 1), (ends[1], -1, -1)):
            here, next_ = marginal[place], marginal[place + step]
            spacing = abs(values[place + step] - values[place])
            slope = np.inf
            if here > 0:
                with np.errstate(divide="ignore", invalid="ignore"):
                    slope = np.log(next_ / here) / spacing
            length = min(abs(end - values[place]), 1 / slope if slope > 0 else np.inf)
            beyond = here * length / (inside + here * length) if here > 0 else 0.0
            if not beyond <= MAX_BEYOND:
                share = 100 * beyond if np.isfinite(beyond) else 100
                flags.append(
                    f"about {share:.0f}% of the posterior of '{name}' lie beyond "
                    f"{values[place]:.4g}, where the grid ends: go further."
                )
    return tuple(flags)
