"""The normalised log density of every row of a model's data."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random

from ebm_ppl.energy.distribution import EnergyDistribution, unwrap
from ebm_ppl.energy.fingerprint import require_same_energy
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.pointwise import require_pointwise
from ebm_ppl.energy.wrappers import rewrap
from ebm_ppl.errors import UnknownNormalizerError, level_of_caller
from ebm_ppl.model.binding import require_all
from ebm_ppl.model.data import Observation, observed_in, trace_at
from ebm_ppl.model.masks import unmasked_rows
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.belongs import require_of_fit, require_site
from ebm_ppl.programs.arguments import Arguments

# What an array of NumPy raises that is used with a traced value.
TRACED = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
# Values of which energies are computed at once.
BATCH_SIZE = 8192


def log_density(
    fit: Estimate | Params,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | None = None,
    batch_size: int = BATCH_SIZE,
    allow_uncertified: bool = False,
    **kwargs: Any,
) -> dict[str, np.ndarray]:
    """The log density of every row, in nats, at a fit's parameters.

    Rows may be others than those that were fitted, and any number of them, as long as
    the model has the same energy for them: a base that is computed from the data the
    model is given (``x.mean(0)``) is another one for other rows, and is refused.

    Args:
        fit: A :class:`Fit`, or constrained parameters by site name.
        model: The model that was fitted.
        args: Its positional arguments, with the rows to score.  Plates count at their
            full size; sites without data are left out.
        log_normalizer: From :func:`log_normalizer` at these parameters.  One with one
            log Z per row, of an energy of y given x, must come from the same arguments.
        batch_size: Rows whose energies are computed at once.
        allow_uncertified: Accept a ``log_normalizer`` that has flags.
        kwargs: The model's keyword arguments.

    Returns:
        By observed site, of the site's batch shape: what the site's ``log_prob`` is with
        log Z known, without scales.  −inf outside of the support; NaN for rows that are
        masked out.

    Raises:
        UnknownNormalizerError: ``log_normalizer`` is missing.
        UncertifiedNormalizerError: It has flags.
        ValueError: It belongs to other parameters or another energy; parameters are
            missing or unknown; nothing is observed; or rows depend on a site that has no
            value.
    """
    _check_call(model, args, batch_size)
    params = jax.tree.map(jnp.asarray, params_of(fit))
    if log_normalizer is not None:
        require_of_fit(log_normalizer, params, allow_uncertified=allow_uncertified)

    # NumPy arrays tell an index beyond their rows, which JAX takes for the last row.
    arguments = jax.tree.map(_on_host, Arguments(args, kwargs))
    score = partial(_score, model, params, log_normalizer, batch_size)
    key = random.key(0)
    try:
        found, others = score(key, arguments)
    except TRACED:  # an array that is indexed by a tracer
        arguments = jax.tree.map(jnp.asarray, arguments)
        found, others = score(key, arguments)
    except IndexError as error:
        raise ValueError(
            f"The model indexes rows that it was not given ({error}): a plate has another "
            "size than the data. Take it from them: numpyro.plate(..., len(x))."
        ) from error

    # Sites without a value, drawn again or moved
    if others.drawn:
        again, _ = score(random.key(1), arguments)
        _require_equal(found, again, others.drawn)
    for name in others.without_value:
        try:
            again, _ = score(key, arguments, name)
        except ValueError:  # the energy of another site is another one
            again = {}
        _require_equal(found, again, [name])
    return found


def _check_call(model: Any, args: tuple, batch_size: int) -> None:
    """Refuse arguments in the wrong places."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; expected at least 1.")
    if not callable(model):
        raise TypeError(
            f"model is a {type(model).__name__}; expected the NumPyro model, after the "
            "fit: ebm_ppl.log_density(fit, model, *args, log_normalizer=log_z)."
        )
    if any(isinstance(arg, LogNormalizer) for arg in args):
        raise TypeError(
            "A LogNormalizer is among the model's arguments; give it by name: "
            "log_normalizer=log_z."
        )


def _on_host(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else np.asarray(leaf)


class Others(NamedTuple):
    """Sites that are neither data nor parameters.

    Attributes:
        drawn: Those whose values come from the random key.
        without_value: Energy sites.
    """

    drawn: list[str]
    without_value: list[str]


def _score(
    model: Model,
    params: Params,
    log_normalizer: LogNormalizer | None,
    batch_size: int,
    rng_key: Array,
    arguments: Arguments,
    moved: str | None = None,
) -> tuple[dict[str, np.ndarray], Others]:
    """Densities by site, and the sites that they may depend on besides.

    ``moved`` names an energy site whose value is replaced by random points.
    """
    trace = trace_at(rng_key, model, params, arguments, moved=moved)
    energies = {
        name
        for name, site in trace.items()
        if site["type"] == "sample" and unwrap(site["fn"]) is not None
    }
    require_all(params, trace, energies)

    data = observed_in(trace)
    if not data:
        raise ValueError(
            "The model has no data in this call: no site is observed. Give the rows to "
            "score as the model's arguments."
        )
    found = {}
    for name, rows in data.items():
        given = jnp.shape(trace[name]["value"])
        if given != jnp.shape(rows.value):
            raise ValueError(
                f"Data at site '{name}' has shape {given}; expected "
                f"{jnp.shape(rows.value)}, a value for every row of its plates. A plate "
                "has another size than the data: numpyro.plate(..., len(x))."
            )
        found[name] = _densities(name, rows, log_normalizer, batch_size)

    without = [name for name in energies if not trace[name]["is_observed"]]
    return found, Others(_drawn(trace, {*params, *energies}), without)


def _drawn(trace: Mapping[str, dict], known: set[str]) -> list[str]:
    """Sites whose values come from the random key."""
    return [
        name
        for name, site in trace.items()
        if site["type"] == "prng_key"
        or (site["type"] == "sample" and not site["is_observed"] and name not in known)
    ]


def _densities(
    name: str, rows: Observation, log_normalizer: LogNormalizer | None, batch_size: int
) -> np.ndarray:
    """Log densities of one site's rows, NaN where they are masked out."""
    wrapped = rows.distribution
    energy = unwrap(wrapped)
    if energy is not None and energy.log_normalizer is None:
        estimate = _known(name, energy, log_normalizer)
        value = jnp.asarray(rows.value)
        elements = _elements(energy, value, batch_size) - np.asarray(estimate)
        wrapped = rewrap(wrapped, _Given(energy, elements))

    found, counts = np.array(wrapped.log_prob(rows.value)), unmasked_rows(wrapped)
    num_nan = int(np.sum(np.isnan(found) & counts))
    if num_nan:
        warnings.warn(
            f"The log density is NaN at {num_nan} of {int(np.sum(counts))} rows of site "
            f"'{name}': data that are NaN, or an energy that is NaN there.",
            stacklevel=level_of_caller(),
        )
    return np.where(counts, found, np.nan)


def _known(
    name: str, energy: EnergyDistribution, log_normalizer: LogNormalizer | None
) -> Array:
    """The site's log Z, checked to be that of this very energy."""
    if log_normalizer is None:
        raise UnknownNormalizerError(
            f"The log density of rows at energy site '{name}' needs log Z: "
            "log_z = ebm_ppl.log_normalizer(rng_key, model, fit, ...), and then "
            "ebm_ppl.log_density(fit, model, ..., log_normalizer=log_z)."
        )
    require_site(log_normalizer, name)
    shape = log_normalizer.estimate[name].shape
    if shape != energy.batch_shape:
        raise ValueError(
            f"log_normalizer has log Z of shape {shape} at energy site '{name}', whose "
            f"batch shape is {energy.batch_shape}: it belongs to another energy, or to "
            "other rows. Estimate it for the same arguments."
        )

    if name in log_normalizer.fingerprints:
        require_same_energy(name, energy, log_normalizer.fingerprints[name])
    else:
        require_pointwise(name, energy)
    return log_normalizer.estimate[name]


def _elements(energy: EnergyDistribution, value: Array, batch_size: int) -> np.ndarray:
    """−U of every value, ``(..., *batch_shape)``, computed in batches of one size."""
    shape = energy.batch_shape + energy.event_shape
    leading = value.shape[: max(value.ndim - len(shape), 0)]
    if value.shape != leading + shape:
        energy.unchecked_potential(value)  # which refuses it by name
    flat = value.reshape(-1, *shape)
    # One size for all batches; few rows are not worth a compilation.
    size = min(batch_size, max(1, len(flat)))
    compute: Callable[[Array], Array] = partial(_negative_potential, energy)
    if len(flat) > size:
        compute = jax.jit(compute)

    pieces = []
    for begin in range(0, len(flat), size):
        piece = flat[begin : begin + size]
        missing = size - len(piece)
        if missing:
            piece = jnp.concatenate([piece, jnp.repeat(piece[-1:], missing, axis=0)])
        pieces.append(np.asarray(compute(piece))[: size - missing])
    return np.concatenate(pieces).reshape(leading + energy.batch_shape)


def _negative_potential(energy: EnergyDistribution, value: Array) -> Array:
    inside = energy.support(value)
    found = jnp.where(inside, -energy.unchecked_potential(value), -jnp.inf)
    # A NaN lies in no support, and is not an unlikely value.
    events = jnp.isnan(value).reshape(*inside.shape, -1)
    return jnp.where(events.any(-1), jnp.nan, found)


class _Given(dist.Distribution):
    """Stands for an energy whose log densities at the data are known."""

    def __init__(self, energy: EnergyDistribution, densities: np.ndarray) -> None:
        self.energy = energy
        self.densities = densities
        super().__init__(energy.batch_shape, energy.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the energy."""
        return self.energy.support

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """The known densities, whatever the value."""
        return jnp.asarray(self.densities)


def _require_equal(
    found: Mapping[str, np.ndarray],
    again: Mapping[str, np.ndarray],
    others: list[str],
) -> None:
    """Refuse densities that depend on sites which have neither a value nor data."""
    for name, values in found.items():
        there = again.get(name)
        if there is None or not np.array_equal(values, there, equal_nan=True):
            raise ValueError(
                f"The log density at site '{name}' depends on the values of "
                f"{sorted(others)}, which have none here: neither parameters of the fit "
                "nor data. Give data there, or parameters of a fit of this very model; "
                "what is unknown would have to be integrated out."
            )
