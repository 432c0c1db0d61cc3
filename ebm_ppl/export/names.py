"""Unique names in an export.

A slash, which separates groups, becomes a dot.  A name that is then taken, by another
name or by ``chain``, ``draw`` and ``step``, gets an underscore.  All other names stay
unchanged.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

RESERVED = ("chain", "draw", "step")


def plain(name: str) -> str:
    """A name with slashes replaced by dots; it may collide with another name."""
    return name.replace("/", ".")


def distinct(names: Iterable[str], taken: Iterable[str] = RESERVED) -> dict[str, str]:
    """Unique exported names, by the model's names."""
    used, written = set(taken), {}
    for name in sorted(
        set(names), key=lambda name: (plain(name) != name or name in used, name)
    ):
        written[name] = _free(plain(name), used)
        used.add(written[name])
    return written


def labels(
    sites: Sequence[str], stems: Mapping[str, Iterable[str]], taken: Iterable[str]
) -> dict[str, str]:
    """Suffix of each site's own names; empty where there is one site.

    With these suffixes, no two sites share a name.

    Args:
        sites: The sites.
        stems: Prefixes of each site's names.
        taken: Names that belong to no site.
    """
    if len(sites) < 2:
        return dict.fromkeys(sites, "")
    used, ends = set(taken), {}
    for site in sorted(sites, key=lambda site: ("/" in site, len(site), site)):
        end = f"_{plain(site)}"
        while used & {f"{stem}{end}" for stem in stems[site]}:
            end += "_"
        used |= {f"{stem}{end}" for stem in stems[site]}
        ends[site] = end
    return ends


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    return name


class Dimensions:
    """Names of dimensions: of plates, from users, or ``<variable>_dim_<k>``.

    Args:
        variables: Exported variable names, by the model's names.
        plates: The plates' names.
        dims: The user's dimension names by variable, under its model or exported name.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        plates: Iterable[str],
        dims: Mapping[str, Any] | None,
    ) -> None:
        self.variables = dict(variables)
        self.given: dict[str, tuple[str | None, ...]] = {}
        reserved = {*RESERVED, *variables.values()}
        self.plates = distinct(plates, reserved)

        for key, names in (dims or {}).items():
            variable = self._variable(key)
            names = (names,) if isinstance(names, str) else tuple(names)
            for name in names:
                if name in reserved or "/" in (name or ""):
                    raise ValueError(
                        f"dims[{key!r}] names a dimension '{name}', which "
                        + (
                            "has a slash."
                            if "/" in name
                            else "is the name of something else in the export."
                        )
                        + " Choose another name."
                    )
            self.given[variable] = names

        self._used = (
            reserved
            | set(self.plates.values())
            | {n for names in self.given.values() for n in names if n}
        )
        self._written: dict[Hashable, str] = {}

    def _variable(self, key: str) -> str:
        if key in self.variables:
            return key
        for name, written in self.variables.items():
            if written == key:
                return name
        raise ValueError(
            f"dims names '{key}', which is no variable here; expected one of "
            f"{sorted(self.variables)}. Parameters that are trees are named leaf by "
            "leaf."
        )

    def plate(self, name: str) -> str:
        """A plate's dimension."""
        return self.plates[name]

    def of(
        self, variable: str, count: int, kind: str, leading: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """The last ``count`` dimensions of a variable, after those of its plates.

        Args:
            variable: Its name in the model.
            count: Number of dimensions.
            kind: Description of the variable, for messages.
            leading: Plates' dimensions, which a user may list before the others, as in
                ArviZ.
        """
        names = self.given.get(variable, (None,) * count)
        if len(names) == len(leading) + count and names[: len(leading)] == tuple(
            leading
        ):
            names = names[len(leading) :]
        if len(names) != count:
            raise ValueError(
                f"dims['{variable}'] = {list(names)}; {kind} '{variable}' has {count} "
                "dimensions."
            )

        found = tuple(
            self.default(variable, "dim", k) if name is None else name
            for k, name in enumerate(names)
        )
        if len({*found, *leading}) != len(found) + len(leading):
            raise ValueError(
                f"dims['{variable}'] = {list(names)} gives two dimensions of "
                f"'{variable}' one name"
                + (f" (its plates are {list(leading)})." if leading else ".")
            )
        return found

    def default(self, variable: str, kind: str, k: int) -> str:
        """The default name of a dimension."""
        return self.new((variable, kind, k), f"{self.variables[variable]}_{kind}_{k}")

    def new(self, key: Hashable, wanted: str) -> str:
        """A unique name for ``key``: ``wanted``, or with underscores if it is taken."""
        if key not in self._written:
            self._written[key] = _free(wanted, self._used)
            self._used.add(self._written[key])
        return self._written[key]

    def coordinates(
        self, coords: Mapping[str, Sequence] | None, sizes: Mapping[str, set[int]]
    ) -> dict[str, Sequence]:
        """The user's coordinates by exported dimension name.

        Args:
            coords: Values by dimension, under its model or exported name.
            sizes: Sizes of the dimensions in the export; groups may differ (masked
                rows, given draws).

        Raises:
            ValueError: A dimension does not exist, or the number of values differs.
        """
        known = {**self.plates, **{name: name for name in sizes}}
        known |= {name: name for names in self.given.values() for name in names if name}
        unknown = sorted(set(coords or {}) - set(known))
        if unknown:
            raise ValueError(
                f"coords names {unknown}, which are no dimensions here; expected some "
                f"of {sorted(sizes)}."
            )

        written = {known[name]: values for name, values in (coords or {}).items()}
        for name, values in written.items():
            if name in sizes and len(values) not in sizes[name]:
                expected = " or ".join(map(str, sorted(sizes[name])))
                raise ValueError(
                    f"coords['{name}'] has {len(values)} values; dimension '{name}' "
                    f"has {expected}."
                )
        return written
