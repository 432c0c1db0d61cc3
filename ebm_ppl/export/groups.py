"""An export as groups of named arrays, before it becomes ArviZ data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebm_ppl.export.names import Dimensions
from ebm_ppl.model.data import Observation
from ebm_ppl.model.masks import unmasked, unmasked_rows

Variable = tuple[tuple[str, ...], np.ndarray]


@dataclass
class Group:
    """One group under construction.

    Attributes:
        variables: Dimensions and values by name.
        attrs: Flat strings and numbers.
        places: Dimensions that hold a subset of another dimension: its name and the
            indices of the elements.
        labels: Coordinates along a dimension of rows, by name: the dimension, the
            plate, and the indices of the plate's elements.
    """

    variables: dict[str, Variable] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    labels: dict[str, tuple[str, str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Naming:
    """Names used in one export.

    Attributes:
        variables: Exported names of sites and parameter leaves, by the model's names.
        ends: Suffix of each energy site's own variables and attributes.
        dimensions: Names of dimensions.
    """

    variables: dict[str, str]
    ends: dict[str, str]
    dimensions: Dimensions

    def event(self, name: str, found: Observation) -> tuple[str, ...]:
        """Event dimensions of an observed site."""
        count = len(found.distribution.event_shape)
        return self.dimensions.of(
            name, count, "an event of site", self.rows(name, found)
        )

    def rows(self, name: str, found: Observation) -> tuple[str, ...]:
        """Batch dimensions of an observed site: plates' and the distribution's own."""
        return tuple(
            self.dimensions.plate(dim) if isinstance(dim, str) else self.own(name, dim)
            for dim in found.dims
        )

    def own(self, name: str, k: int) -> str:
        """The k-th dimension of a site's own normalisers."""
        return self.dimensions.default(name, "batch", k)

    def batch(self, name: str, count: int) -> tuple[str, ...]:
        """The first ``count`` dimensions of a site's own normalisers."""
        return tuple(self.own(name, k) for k in range(count))


def storable(value: Any) -> np.ndarray:
    """A copy of NumPy's own dtypes, the only ones that netCDF stores."""
    value = np.array(value)
    return value.astype(np.float32) if value.dtype.kind == "V" else value


def without_masked(found: Observation) -> np.ndarray:
    """Data with NaN where they are masked out."""
    value, counts = storable(found.value), unmasked(found.distribution)
    if counts.all():
        return value
    counts = counts.reshape(
        counts.shape + (1,) * (len(found.distribution.shape()) - counts.ndim)
    )
    value, counts = np.broadcast_arrays(value, counts)
    return np.where(
        counts, value, np.asarray(np.nan, np.result_type(value.dtype, np.float32))
    )


def rows_that_count(
    values: Mapping[str, np.ndarray], data: Mapping[str, Observation], naming: Naming
) -> Group:
    """Log likelihoods without the rows that a mask leaves out, which LOO would count.

    Where a mask drops whole slices of plates, every dimension keeps its name and a
    coordinate lists the remaining elements; where other variables keep different
    elements, the dimension gets a name of its own.  Any other mask gives one dimension
    of rows, with a coordinate for each plate.
    """
    kept = {}
    for name, value in values.items():
        rows = np.broadcast_to(unmasked_rows(data[name].distribution), value.shape[2:])
        if np.any(value[:, :, ~rows]):
            raise ValueError(masks_differ(name))

        if rows.any():
            kept[name] = _Kept(naming.rows(name, data[name]), rows)
    group = Group()
    for name, own in kept.items():
        others = [other for key, other in kept.items() if key != name]
        _add_kept(group, name, values[name], own, others, naming)
    return group


def masks_differ(name: str) -> str:
    """Message for a mask that depends on parameters."""
    return (
        f"The mask at site '{name}' is not the same for every draw, so that its rows "
        "that count are not either: LOO has no meaning there. Mask by data alone."
    )


@dataclass(frozen=True)
class _Kept:
    """Unmasked rows of one site."""

    dims: tuple[str, ...]
    rows: np.ndarray

    @property
    def slices(self) -> dict[str, np.ndarray]:
        """Indices along each dimension that have any unmasked row."""
        axes = range(self.rows.ndim)
        return {
            dim: np.flatnonzero(
                self.rows.any(tuple(other for other in axes if other != axis))
            )
            for axis, dim in enumerate(self.dims)
        }

    @property
    def is_product(self) -> bool:
        """Whether the mask drops whole slices only."""
        return int(self.rows.sum()) == int(
            np.prod([len(found) for found in self.slices.values()])
        )


def _add_kept(
    group: Group,
    name: str,
    value: np.ndarray,
    own: _Kept,
    others: Iterable[_Kept],
    naming: Naming,
) -> None:
    written = naming.variables[name]
    if not own.is_product:
        dim = naming.dimensions.new((name, "row"), f"{written}_row")
        group.variables[written] = (("chain", "draw", dim), value[:, :, own.rows])
        for plate, places in zip(own.dims, np.nonzero(own.rows), strict=True):
            group.labels[
                naming.dimensions.new((name, "row", plate), f"{written}_{plate}")
            ] = (dim, plate, places)
        return

    dims = []
    for axis, (plate, places) in enumerate(own.slices.items()):
        shared = [
            other.slices[plate]
            for other in others
            if plate in other.dims and other.is_product
        ]
        is_whole = len(places) == own.rows.shape[axis]
        if is_whole or all(np.array_equal(places, theirs) for theirs in shared):
            dims.append(plate)
        else:
            dims.append(
                naming.dimensions.new((name, "kept", plate), f"{written}_{plate}")
            )

        if not is_whole:
            group.places[dims[-1]] = (plate, places)
    group.variables[written] = (
        ("chain", "draw", *dims),
        value[np.ix_(*map(np.arange, value.shape[:2]), *own.slices.values())],
    )


def sizes_of(groups: Mapping[str, Group]) -> dict[str, set[int]]:
    """Full sizes of the dimensions; groups may hold subsets of them.

    Raises:
        ValueError: Two variables of one group disagree.
    """
    sizes: dict[str, set[int]] = {}
    for group in groups.values():
        seen: dict[str, tuple[int, str]] = {}
        for variable, (dims, values) in group.variables.items():
            for dim, size in zip(dims, values.shape, strict=True):
                known, other = seen.setdefault(dim, (size, variable))
                if known != size:
                    raise ValueError(
                        f"Dimension '{dim}' has {known} elements in '{other}' and "
                        f"{size} in '{variable}'. Give plates, and dimensions in "
                        "dims=, of different sizes different names."
                    )

        for dim, (size, _) in seen.items():
            if dim not in group.places:
                sizes.setdefault(dim, set()).add(size)
    return sizes
