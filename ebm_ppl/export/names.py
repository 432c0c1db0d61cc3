"""Names in an export, different for all things of a model.

One rule.  A slash, which separates groups, becomes a dot; a name that is then taken, by
another one or by ``chain``, ``draw`` and ``step``, gets an underscore.  Names that need
no change keep theirs.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

RESERVED = ("chain", "draw", "step")


def plain(name: str) -> str:
    """A name without slashes, perhaps another one's too."""
    return name.replace("/", ".")


def distinct(names: Iterable[str], taken: Iterable[str] = RESERVED) -> dict[str, str]:
    """Every name as it is written, by the model's."""
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
    """What every site's own names end in; nothing for one site.

    No name of one site is then a name of another.

    Args:
        sites: The sites.
        stems: What each site's names begin with.
        taken: Names that are no site's.
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
        variables: Variables as they are written, by the model's names.
        plates: The plates' names.
        dims: A user's names by variable, either as the model or as the export calls it.
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
            count: How many there are.
            kind: What they are, for messages.
            leading: Plates' dimensions, which a user may have named before the others,
                as ArviZ does.
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
        """The name of a dimension that nobody named."""
        return self.new((variable, kind, k), f"{self.variables[variable]}_{kind}_{k}")

    def new(self, key: Hashable, wanted: str) -> str:
        """A name of its own for ``key``: ``wanted`` where that is free."""
        if key not in self._written:
            self._written[key] = _free(wanted, self._used)
            self._used.add(self._written[key])
        return self._written[key]

    def coordinates(
        self, coords: Mapping[str, Sequence] | None, sizes: Mapping[str, set[int]]
    ) -> dict[str, Sequence]:
        """A user's coordinates by dimension as it is written.

        Args:
            coords: Values by dimension, named as the model or as the export names it.
            sizes: Of the dimensions in the export; groups may differ (rows that are
                masked, given draws).

        Raises:
            ValueError: A dimension that is nowhere, or values of another number.
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
