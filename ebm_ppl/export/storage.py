"""Fits in files."""

import importlib.metadata
import os
import pathlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from ebm_ppl.energy.fingerprint import Fingerprint
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.export.archive import Reader, Writer
from ebm_ppl.model.inspection import initial_params
from ebm_ppl.model.parameters import unconstrained
from ebm_ppl.model.program import Model, Params, first_difference
from ebm_ppl.normalizer.belongs import require_of_fit, require_site
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.backend import Backend
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.state import OnlyParameters

FORMAT, VERSION = "an ebm_ppl fit", 1
PACKAGES = ("ebm-ppl", "numpyro", "jax", "optax", "numpy")

# Fields of a LogNormalizer that are not arrays by site.
PLAIN = ("flags", "method", "num_evaluations", "batch_ndims", "conditions")


class Saved(NamedTuple):
    """What a file held.

    Attributes:
        fit: The fit.  Read for a model alone, its ``state`` holds nothing to go on from.
        log_normalizer: Its log Z, where one was saved.
    """

    fit: Fit
    log_normalizer: LogNormalizer | None


def save(
    path: str | os.PathLike, fit: Fit, log_normalizer: LogNormalizer | None = None
) -> None:
    """Write a fit to one file: parameters, history, state, and log Z with its flags.

    The file is a NumPy archive without pickles, with arrays named by their places in the
    fit; ``numpy.load`` reads it.  It appears whole or not at all.

    Args:
        path: The file, which is replaced if it exists; ``.npz`` is usual.
        fit: From a backend's ``run``.
        log_normalizer: From :func:`log_normalizer` at ``fit.params``, certified or not;
            its flags go with it.

    Raises:
        FileNotFoundError: There is no such folder, or the path is one.
        TypeError: ``fit`` is none.
        ValueError: ``log_normalizer`` belongs to other parameters.
    """
    if not isinstance(fit, Fit):
        raise TypeError(
            f"fit is a {type(fit).__name__}; expected a Fit: ebm_ppl.save(path, fit)."
        )
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(
            f"'{path}' is no place for a file: it is a folder, or there is no folder "
            f"'{path.parent}'."
        )

    writer = Writer()
    trees = {"params": fit.params, "state": fit.state}
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": fit.state.backend,
        "layout": fit.state.layout(),
        "trees": {prefix: writer.tree(prefix, tree) for prefix, tree in trees.items()},
        "history": writer.nested("history", fit.history),
        "findings": list(fit.findings),
    }
    if log_normalizer is not None:
        require_of_fit(log_normalizer, fit.params, allow_uncertified=True)
        described["log_normalizer"] = _described(writer, log_normalizer)
    writer.write(path, described)


def load(
    path: str | os.PathLike, source: Backend | Model, *args: Any, **kwargs: Any
) -> Saved:
    """Read a fit that :func:`save` wrote.

    The structure of parameters and state (nets, optimisers) is code, which no file
    holds: it comes from the model or the backend.

    Args:
        path: The file.
        source: The backend, made as for the run: its ``run(..., init_state=fit.state)``
            then goes on as if nothing had happened.  Or the model alone, which is enough
            to score rows, to draw, and to train from there (``init_params=fit``).
        args: The model's positional arguments: those of the run for a backend, any that
            it takes for a model.
        kwargs: The model's keyword arguments.

    Returns:
        The fit, and its log Z or None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or no saved fit; or the parameters or the state of
            ``source`` are others than those in the file, and the message names the first.
    """
    if not (isinstance(source, Backend) or callable(source)):
        raise TypeError(
            f"source is a {type(source).__name__}; expected the backend that made the "
            "fit, or its model: ebm_ppl.load(path, model, *args)."
        )
    reader = Reader(pathlib.Path(path), FORMAT, VERSION)
    arguments = Arguments(args, kwargs)
    if isinstance(source, Backend):
        fit, sites = _for_backend(reader, source, arguments), list[str]()
    else:
        fit, sites = _for_model(reader, source, arguments)

    described = reader.described.get("log_normalizer")
    if described is None:
        return Saved(fit, None)
    log_z = _log_normalizer(reader, described, fit.params)
    for name in sites:
        require_site(log_z, name)
    return Saved(fit, log_z)


def _for_backend(reader: Reader, backend: Backend, arguments: Arguments) -> Fit:
    """The fit with its state."""
    template = backend.template(random.key(0), *arguments.args, **arguments.kwargs)
    state = reader.tree("state", template)
    _require_same_layout(template.layout(), reader.described.get("layout", {}))

    params = reader.tree("params", jax.eval_shape(backend.get_params, template))
    _require_same_constraints(backend.get_params(state), params)
    return _fit(reader, params, state)


def _for_model(
    reader: Reader, model: Model, arguments: Arguments
) -> tuple[Fit, list[str]]:
    """The fit without its state, and the sites that want a log Z."""
    like, transforms, sites = initial_params(random.key(0), model, arguments)
    params = reader.tree("params", like)
    unconstrained(transforms, params)

    state = OnlyParameters(random.key(0), reader.described["backend"])
    return _fit(reader, params, state), sites


def _fit(reader: Reader, params: Params, state: Any) -> Fit:
    history = reader.nested(reader.described["history"])
    return Fit(params, state, history, tuple(reader.described.get("findings", ())))


def _require_same_layout(
    of_source: Mapping[str, int], of_file: Mapping[str, int]
) -> None:
    """Refuse a state whose arrays mean something else for the backend."""
    for name, value in of_source.items():
        if value != of_file.get(name):
            raise ValueError(
                f"The file's state has {name} = {of_file.get(name)}, and the backend has "
                f"{value}: walkers that were trained would be taken for held-out ones, or "
                "the reverse. Make the backend as for the run, or begin at its "
                "parameters: ebm_ppl.load(path, model, *args) and init_params=fit."
            )


def _require_same_constraints(by_state: Params, params: Params) -> None:
    """Refuse a state whose numbers mean other parameters under the model's constraints."""
    name = first_difference(by_state, params)
    if name is not None:
        raise ValueError(
            f"Parameter '{name}' has another constraint than when the fit was made: the "
            f"file's state would stand for {by_state[name]}, and the fit has "
            f"{params[name]}. Give the model as it was fitted, or begin at its "
            "parameters: ebm_ppl.load(path, model, *args) and init_params=fit."
        )


def _described(writer: Writer, log_normalizer: LogNormalizer) -> dict[str, Any]:
    """A log Z with names for arrays; its parameters are the fit's."""
    described = {name: getattr(log_normalizer, name) for name in PLAIN}
    for field in fields(log_normalizer):
        if field.name in (*PLAIN, "params"):
            continue
        by_site = {
            name: found._asdict() if isinstance(found, Fingerprint) else found
            for name, found in getattr(log_normalizer, field.name).items()
        }
        described[field.name] = writer.nested(f"log_normalizer/{field.name}", by_site)
    return described


def _log_normalizer(
    reader: Reader, described: Mapping[str, Any], params: Params
) -> LogNormalizer:
    plain = {name: described[name] for name in PLAIN}
    for name in ("flags", "conditions"):
        plain[name] = {site: tuple(found) for site, found in plain[name].items()}

    arrays = {
        name: jax.tree.map(jnp.asarray, reader.nested(names))
        for name, names in described.items()
        if name not in PLAIN
    }
    arrays["fingerprints"] = {
        site: Fingerprint(**found) for site, found in arrays["fingerprints"].items()
    }
    return LogNormalizer(**arrays, **plain, params=params)
