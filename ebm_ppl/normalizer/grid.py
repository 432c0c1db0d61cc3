"""Grids of one or two parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike
from numpyro.distributions.transforms import Transform

from ebm_ppl.model.data import trace_at
from ebm_ppl.model.parameters import transform_of
from ebm_ppl.model.program import Model, Params
from ebm_ppl.programs.arguments import Arguments

MIN_VALUES = 4


@dataclass(frozen=True)
class Grid:
    """Values of parameters, and what the others are.

    Points are of unconstrained parameters, ``(num_points, num_parameters)``.

    Attributes:
        values: Of each parameter, ascending.
        transforms: From the real line to the parameters' supports.
        fixed: The model's other parameters.
        nodes: Every combination of the values, the last parameter fastest.
        between: The middles of the grid's cells.
    """

    values: dict[str, np.ndarray]
    transforms: dict[str, Transform]
    fixed: Params
    nodes: np.ndarray
    between: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of values of each parameter."""
        return tuple(len(values) for values in self.values.values())

    def draws_at(self, points: np.ndarray) -> Params:
        """Constrained parameters, all of them, with the points as leading axis."""
        draws = {
            name: _constrained(transform, points[:, k], self.values[name])
            for k, (name, transform) in enumerate(self.transforms.items())
        }
        return draws | jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (len(points), *jnp.shape(leaf))),
            self.fixed,
        )

    def log_slopes(self, points: np.ndarray) -> Array:
        """Log volume of constrained parameters per unconstrained one, by point."""
        draws = self.draws_at(points)
        return sum(
            transform.log_abs_det_jacobian(
                jnp.asarray(points[:, k], float), draws[name]
            )
            for k, (name, transform) in enumerate(self.transforms.items())
        )

    def to_unit(self, points: np.ndarray) -> np.ndarray:
        """Points with the grid's ends at −1 and 1."""
        low, high = self.nodes.min(0), self.nodes.max(0)
        return 2.0 * (points - low) / (high - low) - 1.0


def make_grid(
    model: Model, given: Mapping[str, ArrayLike], fixed: Params, arguments: Arguments
) -> Grid:
    """A grid, checked.

    Args:
        model: Whose parameters they are.
        given: Values by name.
        fixed: The model's other parameters.
        arguments: The model's.

    Raises:
        ValueError: Not one or two parameters, too few values, some that do not ascend
            or are not inside of the support, or a name that the model does not have.
    """
    values = _checked(given)
    transforms = _transforms(model, values, fixed, arguments)
    return Grid(values, transforms, fixed, *_points(values, transforms))


def _checked(grid: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Ascending values of one or two parameters."""
    values = {name: np.asarray(given, float) for name, given in grid.items()}
    if len(values) not in (1, 2):
        raise ValueError(
            f"grid has {len(values)} parameters, {sorted(values)}; expected one or two, "
            "such as {'rate': np.linspace(0.5, 3.0, 17)}."
        )
    for name, given in values.items():
        is_good = given.ndim == 1 and np.all(np.isfinite(given))
        if not (is_good and len(given) >= MIN_VALUES and np.all(np.diff(given) > 0)):
            raise ValueError(
                f"grid['{name}'] has shape {given.shape}; expected at least {MIN_VALUES} "
                "finite values that ascend."
            )
    return values


def _transforms(
    model: Model, values: Mapping[str, Any], fixed: Params, arguments: Arguments
) -> dict[str, Transform]:
    """The parameters' maps from the real line."""
    middle = {name: jnp.asarray(v[len(v) // 2]) for name, v in values.items()}
    trace = trace_at(random.key(0), model, fixed | middle, arguments)
    found = {}
    for name in values:
        site = trace.get(name)
        if site is None or site["type"] not in ("param", "sample"):
            raise ValueError(
                f"grid names '{name}', which is no parameter or latent of the model; it "
                f"has {sorted(n for n, s in trace.items() if s['type'] == 'param')} and "
                f"{sorted(n for n, s in trace.items() if s['type'] == 'sample')}."
            )
        found[name] = transform_of(name, site)
    return found


def _points(
    values: Mapping[str, np.ndarray], transforms: Mapping[str, Transform]
) -> tuple[np.ndarray, np.ndarray]:
    """Unconstrained points of the grid and the middles of its cells."""
    lines = [
        np.asarray(transforms[n].inv(jnp.asarray(v)), float) for n, v in values.items()
    ]
    for line, (name, given) in zip(lines, values.items(), strict=True):
        if not np.all(np.isfinite(line)):
            outside = given[~np.isfinite(line)][0]
            raise ValueError(
                f"grid['{name}'] has the value {outside:g}, which is not inside of the "
                "parameter's support; the table is a function of its unconstrained "
                "value. Let the grid begin, and end, inside, as np.geomspace(0.05, 3.0, "
                "9) does."
            )
    middles = [(line[1:] + line[:-1]) / 2 for line in lines]
    grids = [np.meshgrid(*axes, indexing="ij") for axes in (lines, middles)]
    nodes, between = (np.stack([g.ravel() for g in grid], -1) for grid in grids)
    return nodes, between


def _constrained(transform: Transform, line: np.ndarray, values: np.ndarray) -> Array:
    """Constrained values, the given ones to the last bit where they are given."""
    found = np.array(transform(jnp.asarray(line, float)))
    nearest = values[np.abs(found[:, None] - values).argmin(1)]
    is_given = np.isclose(found, nearest, rtol=1e-6, atol=0.0)
    return jnp.asarray(np.where(is_given, nearest, found), float)
