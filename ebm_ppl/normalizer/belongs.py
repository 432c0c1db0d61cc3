"""Whether a log Z is one, and belongs to these parameters and this site."""

from typing import Any

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.program import Params, require_same_parameters


def require_of_fit(
    log_normalizer: Any, params: Params, *, allow_uncertified: bool
) -> None:
    """Refuse what is no certified log Z of one fit's parameters.

    Raises:
        TypeError: It is no :class:`LogNormalizer`.
        UncertifiedNormalizerError: It has flags.
        ValueError: It belongs to draws, or to other parameters.
    """
    if not isinstance(log_normalizer, LogNormalizer):
        raise TypeError(
            f"log_normalizer is a {type(log_normalizer).__name__}; expected what "
            "ebm_ppl.log_normalizer(...) returns, or, in closed form, "
            "LogNormalizer.exact({site: log Z}, fit.params)."
        )
    if log_normalizer.batch_ndims:
        raise ValueError(
            "log_normalizer has one log Z per parameter draw; expected that of one fit. "
            "For draws: numpyro.infer.log_likelihood(ebm_ppl.normalized(model, log_z), "
            "log_z.samples, ...)."
        )

    if not allow_uncertified:
        log_normalizer.require_certified()
    require_same_parameters(
        "log_normalizer",
        log_normalizer.params,
        params,
        "Estimate it at these: ebm_ppl.log_normalizer(rng_key, model, fit, ...).",
    )


def require_site(log_normalizer: LogNormalizer, name: str) -> None:
    """Refuse a log Z that lacks an energy site.

    Raises:
        ValueError: The message names both.
    """
    if name not in log_normalizer.estimate:
        raise ValueError(
            f"log_normalizer has sites {sorted(log_normalizer.estimate)}, but the model "
            f"has energy site '{name}'; estimate it with "
            "ebm_ppl.log_normalizer(rng_key, model, fit, ...) on this model."
        )
