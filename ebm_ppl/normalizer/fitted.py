"""A fit's energies as distributions."""

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.binding import bind_model
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.normalizer.belongs import require_of_fit, require_site


def fitted(
    fit: Estimate | Params,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | None = None,
    allow_uncertified: bool = False,
    **kwargs: Any,
) -> dict[str, EnergyDistribution]:
    """The energies of a model at a fit's parameters, outside of the model.

    Each is a NumPyro distribution with concrete parameters (nets of flax and equinox
    included), for another model (``numpyro.sample("z", prior)``), for
    :func:`sample` and :func:`log_normalizer`, and for plots; ``.energy(x)`` is E.

    With log Z it is normalised: ``log_prob`` is its log density.  Without one,
    ``energy.with_log_normalizer(0.0)`` serves as the prior of a latent, whose posterior
    no constant changes.

    Args:
        fit: A :class:`Fit`, or constrained parameters by site name.
        model: The model that was fitted.
        args: Its positional arguments; data at the energy sites may be left out.
        log_normalizer: From :func:`log_normalizer` at these parameters.
        allow_uncertified: Accept a ``log_normalizer`` that has flags.
        kwargs: The model's keyword arguments.

    Returns:
        By energy site.

    Raises:
        UncertifiedNormalizerError: ``log_normalizer`` has flags.
        ValueError: It belongs to other parameters or another energy; parameters are
            missing or unknown; or the model has no energy site.
    """
    params = jax.tree.map(jnp.asarray, params_of(fit))
    _, energies = bind_model(random.key(0), model, params, args, kwargs)
    if log_normalizer is None:
        return energies

    require_of_fit(log_normalizer, params, allow_uncertified=allow_uncertified)
    return {
        name: _with_known(name, energy, log_normalizer)
        for name, energy in energies.items()
    }


def _with_known(
    name: str, energy: EnergyDistribution, log_normalizer: LogNormalizer
) -> EnergyDistribution:
    if energy.log_normalizer is not None:
        return energy
    require_site(log_normalizer, name)
    return energy.with_log_normalizer(_of_site(log_normalizer, name))


def _of_site(log_normalizer: LogNormalizer, name: str) -> LogNormalizer:
    """The certificate of one site, accepted by whoever asked for it."""
    by_site: dict[str, Any] = {
        field.name: {name: found[name]}
        for field in fields(log_normalizer)
        if field.name != "params"
        and isinstance(found := getattr(log_normalizer, field.name), dict)
        and name in found
    }
    return replace(log_normalizer, **by_site | {"flags": {name: ()}})
