"""Models with known normalisers: ordinary models to NumPyro and ArviZ."""

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.substitutes import (
    EveryRow,
    ExactNormalizers,
    FixedNormalizers,
    model_at_draws,
)
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.normalizer.tabulated import model_at_table


def normalized(
    model: Model,
    log_normalizer: LogNormalizer | TabulatedNormalizer | None = None,
    *,
    num_points: int | None = None,
    allow_uncertified: bool = False,
) -> Model:
    """Return ``model`` with known normalisers at its energy sites.

    NUTS, SVI, ``log_likelihood``, ``Predictive``, ``az.from_numpyro``, ``az.loo`` and
    ``az.compare`` are correct on it.

    - Without ``log_normalizer``: log Z is found inside the model by quadrature (one or
      two dimensions) or enumeration (finite supports), as a differentiable function of
      the parameters, which stay free.
    - With one from :func:`log_normalizer` at a point: the parameters are fixed at that
      point, log Z is the constant that belongs to it, and other latent sites stay free.
    - With one over parameter draws: give ``log_normalizer.samples`` as the posterior
      samples, to ``log_likelihood`` or ``Predictive``; each draw then has its own log
      Z.
    - With a table from :func:`tabulate_log_normalizer`: the parameters of its grid stay
      free; beyond the grid the density is NaN.

    Plates keep their subsampling under SVI and ``Predictive``; ``log_likelihood`` gets
    every row of the data.

    Args:
        model: A NumPyro model with energy sites.
        log_normalizer: From :func:`log_normalizer` or :func:`tabulate_log_normalizer`.
        num_points: Points of the quadrature; see :func:`log_normalizer`.
        allow_uncertified: Accept a ``log_normalizer`` that has flags.

    Raises:
        UncertifiedNormalizerError: ``log_normalizer`` has flags.
        ValueError: (When the model runs) neither quadrature nor enumeration serves a
            site, or ``log_normalizer`` lacks it.
    """
    model = EveryRow(model)
    if log_normalizer is None:
        return ExactNormalizers(model, num_points)
    if not allow_uncertified:
        log_normalizer.require_certified()
    if isinstance(log_normalizer, TabulatedNormalizer):
        return model_at_table(model, log_normalizer, is_uncertified=allow_uncertified)
    if log_normalizer.batch_ndims:
        return model_at_draws(model, log_normalizer)
    return FixedNormalizers(model, log_normalizer)
