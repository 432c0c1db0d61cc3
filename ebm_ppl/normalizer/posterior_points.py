"""Points of a posterior of one or two parameters, spread by its own mass."""

from collections.abc import Callable

import numpy as np

# Of each variable, by their number; the mass is looked for in ever smaller boxes.
NUM_VALUES = {1: 65, 2: 21}
NUM_BOXES = 4
# Nats under the highest density that a box still holds.
MAX_UNLIKELY = 12.0


def points_by_mass(
    log_density: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    num: int,
) -> np.ndarray:
    """Evenly spaced quantiles, of one variable or of two in turn.

    The first variable's quantiles are evenly spaced; the second's, given the first, are
    spaced by the golden ratio, so that together they fill the plane.

    Args:
        log_density: Of ``(num_points, num_variables)`` points, up to a constant.
        low: Lower end of each variable.
        high: Upper end.
        num: Points wanted.

    Returns:
        ``(num, num_variables)``.
    """
    num_variables = len(low)
    low, high = np.array(low, float), np.array(high, float)
    for _ in range(NUM_BOXES):
        lines = [
            np.linspace(a, b, NUM_VALUES[num_variables])
            for a, b in zip(low, high, strict=True)
        ]
        grid = np.stack(np.meshgrid(*lines, indexing="ij"), -1)
        found = log_density(grid.reshape(-1, num_variables)).reshape(grid.shape[:-1])
        found = np.where(np.isfinite(found), found, -np.inf)
        is_likely = found >= found.max() - MAX_UNLIKELY

        # One value more on every side, where the grid has one
        for axis, line in enumerate(lines):
            others = tuple(k for k in range(num_variables) if k != axis)
            places = np.flatnonzero(is_likely.any(axis=others))
            low[axis] = line[max(places[0] - 1, 0)]
            high[axis] = line[min(places[-1] + 1, len(line) - 1)]

    mass = np.exp(found - found.max())
    shares = (np.arange(num) + 0.5) / num
    first = mass.sum(axis=tuple(range(1, num_variables)))
    points = [_quantiles(lines[0], first, shares)]
    if num_variables == 2:
        golden = (np.sqrt(5.0) - 1.0) / 2.0
        rows = np.abs(lines[0] - points[0][:, None]).argmin(1)
        points.append(
            np.array(
                [
                    _quantiles(lines[1], mass[row], np.array([share]))[0]
                    for row, share in zip(
                        rows, np.arange(1, num + 1) * golden % 1.0, strict=True
                    )
                ]
            )
        )
    return np.stack(points, -1)


def _quantiles(line: np.ndarray, mass: np.ndarray, shares: np.ndarray) -> np.ndarray:
    below = np.cumsum(mass) - 0.5 * mass
    return np.interp(shares * mass.sum(), below, line)
