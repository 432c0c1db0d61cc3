"""Trees of arrays in one NumPy archive, without pickles."""

import json
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

DESCRIPTION = "description"

# What reading a damaged or foreign file may raise.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


class Writer:
    """Arrays by name, and what NumPy's types do not say of them."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.views: dict[str, str] = {}

    def put(self, name: str, leaf: Any) -> str:
        """Add one array; its name."""
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            self.keys[name] = str(random.key_impl(leaf))
            leaf = random.key_data(leaf)

        value = np.asarray(leaf)
        if value.dtype.kind == "V":  # such as bfloat16, which NumPy cannot store
            self.views[name] = value.dtype.name
            value = value.view(f"u{value.dtype.itemsize}")
        self.arrays[name] = value
        return name

    def tree(self, prefix: str, tree: Any) -> list[str]:
        """Add a tree's leaves; their paths."""
        paths = []
        for path, leaf in leaves_of(tree):
            self.put(prefix + path, leaf)
            paths.append(path)
        return paths

    def nested(self, name: str, entry: Any) -> Any:
        """Add an array, or a dict of such entries; the same with names for arrays."""
        if isinstance(entry, Mapping):
            return {key: self.nested(f"{name}/{key}", e) for key, e in entry.items()}
        return self.put(name, entry)

    def write(self, path: pathlib.Path, described: Mapping[str, Any]) -> None:
        """Write everything to one file, which appears whole or not at all."""
        text = json.dumps({**described, "keys": self.keys, "views": self.views})
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **self.arrays | {DESCRIPTION: np.array(text)})
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        except BaseException:
            pathlib.Path(partial).unlink(missing_ok=True)
            raise


def _umask() -> int:
    """What new files of this process may not be; temporary ones are its own alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Reader:
    """A file's arrays, put back into trees.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of another kind.
    """

    def __init__(self, path: pathlib.Path, format: str, version: int) -> None:
        try:
            # NumPy leaves a file open that it cannot read.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            self.described = json.loads(str(arrays.pop(DESCRIPTION)))
            is_ours = self.described["format"] == format
            written = int(self.described["version"])
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise ValueError(
                f"'{path}' is damaged, or no file that ebm_ppl.save wrote "
                f"({type(error).__name__}: {error})."
            ) from error

        if not is_ours or written > version:
            raise ValueError(
                f"'{path}' holds {self.described['format']} of version {written}; "
                f"expected {format} of version {version} or older: update ebm_ppl."
            )
        self.arrays: dict[str, np.ndarray] = arrays

    def array(self, name: str) -> np.ndarray:
        """An array as it was given."""
        value, view = self.arrays[name], self.described["views"].get(name)
        return value if view is None else value.view(jnp.dtype(view))

    def leaf(self, name: str) -> Array:
        """The same on the device, keys as keys."""
        value, impl = jnp.asarray(self.array(name)), self.described["keys"].get(name)
        return value if impl is None else random.wrap_key_data(value, impl=impl)

    def nested(self, names: Any) -> Any:
        """What :meth:`Writer.nested` added."""
        if isinstance(names, Mapping):
            return {key: self.nested(entry) for key, entry in names.items()}
        return self.array(names)

    def tree(self, prefix: str, template: Any) -> Any:
        """What :meth:`Writer.tree` added, as a tree of the template's structure.

        Raises:
            ValueError: It has other leaves; the message names the first.
        """
        found = {
            path: self.leaf(prefix + path) for path in self.described["trees"][prefix]
        }
        kinds = {path: _kind(leaf) for path, leaf in found.items()}
        wanted = {path: _kind(leaf) for path, leaf in leaves_of(template)}
        for path in [*wanted, *kinds]:
            if wanted.get(path) != kinds.get(path):
                raise ValueError(
                    f"The file holds another {prefix} than the model or backend that it "
                    f"is read for: {prefix}{path} is {kinds.get(path, 'absent')} in the "
                    f"file and {wanted.get(path, 'absent')} there. Give what the fit was "
                    "made with: model, data of the same shapes, optimiser, numbers of "
                    "walkers."
                )
        leaves = [found[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths in words."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def _kind(leaf: Any) -> str:
    shape = " x ".join(map(str, jnp.shape(leaf))) or "a scalar"
    return f"{shape} of {jnp.result_type(leaf)}"
