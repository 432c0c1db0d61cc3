"""What an energy distribution may be built of."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from ebm_ppl.energy.log_normalizer import LogNormalizer


def checked_factors(energy: Any) -> dict[str, Callable[[Array], Array]]:
    """Energies by name; one without a name is 'energy'.

    Raises:
        TypeError: One is not callable.
        ValueError: There is none.
    """
    named = dict(energy) if isinstance(energy, Mapping) else {"energy": energy}
    for name, factor in named.items():
        if not callable(factor):
            raise TypeError(
                f"Energy factor '{name}' is a {type(factor).__name__}; expected a "
                "callable E(x)."
            )
    if not named:
        raise ValueError(
            "The mapping of energy factors is empty; name at least one callable."
        )
    return named


def check_base_and_start(base: Any, start: Any) -> None:
    """Refuse what is no distribution, and a start of another shape than the base's.

    Raises:
        TypeError: One of them is no distribution.
        ValueError: Their shapes differ.
    """
    if not isinstance(base, dist.Distribution):
        raise TypeError(
            f"base is a {type(base).__name__}; expected a numpyro Distribution."
        )
    if start is not None and not isinstance(start, dist.Distribution):
        raise TypeError(
            f"start is a {type(start).__name__}; expected a numpyro Distribution."
        )

    if (
        start is not None
        and start.batch_shape + start.event_shape != base.batch_shape + base.event_shape
    ):
        raise ValueError(
            f"start has shape {start.batch_shape + start.event_shape}; expected "
            f"the base's {base.batch_shape + base.event_shape}. Expand it: "
            "start.expand(...).to_event(...)."
        )


def as_log_normalizer(
    value: ArrayLike | LogNormalizer | None, batch_shape: tuple[int, ...]
) -> Array | np.ndarray | None:
    """Known log Z as an array that broadcasts to the base's batch shape.

    Raises:
        ValueError: It belongs to several sites or draws, or to another shape.
        UncertifiedNormalizerError: It is not certified.
    """
    if value is None:
        return None
    if isinstance(value, LogNormalizer):
        if len(value.estimate) != 1 or value.batch_ndims:
            raise ValueError(
                f"log_normalizer has sites {sorted(value.estimate)} and "
                f"{value.batch_ndims} axes of draws; expected one site at one "
                "parameter value. Give the number of this site: "
                "log_normalizer=log_z.estimate[name]."
            )

        value.require_certified()
        (value,) = value.estimate.values()
        if value.shape != batch_shape:
            raise ValueError(
                f"log_normalizer has log Z of shape {value.shape}; expected the base's "
                f"batch shape {batch_shape}. Estimate it for this very distribution."
            )

    # NumPy arrays stay constants inside a trace too.
    array: Any = value if isinstance(value, jax.core.Tracer) else np.asarray(value)
    if not jnp.issubdtype(
        array.dtype, jnp.floating
    ) or array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        array = array.astype(jnp.result_type(float))

    if jnp.broadcast_shapes(array.shape, batch_shape) != batch_shape:
        raise ValueError(
            f"log_normalizer has shape {array.shape}; expected a scalar or the base's "
            f"batch shape {batch_shape}."
        )
    return array
