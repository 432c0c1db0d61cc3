"""log Z of a fitted energy by annealing fresh walkers."""

from dataclasses import dataclass
from typing import Any

import numpyro
from jax import Array, random
from scipy.stats import t as student_t

from ebm_ppl.annealing import AnnealingOptions
from ebm_ppl.distribution import EnergyDistribution, starting_distribution
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.kernels import MALA
from ebm_ppl.model import Arguments, BoundModel, Model, Params
from ebm_ppl.placement import SiteAtParams, anneal_site
from ebm_ppl.resampling import systematic
from ebm_ppl.weights import jackknife_log_mean_exp, pooled_ess_fraction


def _as_model(distribution: EnergyDistribution) -> Model:
    def model() -> None:
        numpyro.sample("x", distribution)

    return model


@dataclass(frozen=True)
class LogNormalizer:
    """log Z per energy site, with its uncertainty.

    Attributes:
        estimate: Jackknifed log-mean-exp over the islands' Ẑ_c, of the site's batch shape.
        stderr: Its jackknife standard error.
        ess: Harmonic-mean ESS fraction of the islands' final weights.
        log_normalizers: ``log Ẑ_c``, shape ``(num_chains, *batch_shape)``; each ``exp`` is unbiased.
    """

    estimate: dict[str, Array]
    stderr: dict[str, Array]
    ess: dict[str, Array]
    log_normalizers: dict[str, Array]

    def interval(self, level: float = 0.9) -> dict[str, tuple[Array, Array]]:
        """Two-sided Student-t interval on (number of islands − 1) degrees of freedom, by site."""
        out = {}
        for name, estimate in self.estimate.items():
            degrees = self.log_normalizers[name].shape[0] - 1
            half = float(student_t.ppf(0.5 + level / 2, degrees)) * self.stderr[name]
            out[name] = (estimate - half, estimate + half)
        return out


def log_normalizer(
    rng_key: Array,
    model: Model | EnergyDistribution,
    params: Params | None = None,
    *args: Any,
    num_chains: int = 16,
    num_walkers: int = 64,
    num_temperatures: int = 1000,
    num_kernel_steps: int = 1,
    **kwargs: Any,
) -> LogNormalizer:
    """Estimate log Z by annealed sequential Monte Carlo from the starting distribution to the energy.

    Walkers are fresh, and the protocol is chosen by a pilot that they do not see: every island's Ẑ is
    unbiased.  A mode that no walker reaches is missed without a sign.

    Args:
        rng_key: A JAX PRNG key.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`, whose site is then named 'x'.
        params: Constrained parameters by site name, such as ``fit.params``.
        args: The model's positional arguments; data at the energy sites may be left out.
        num_chains: Independent islands, at least 2.
        num_walkers: Walkers per island.
        num_temperatures: Rungs between the start and the energy.
        num_kernel_steps: MALA moves per rung.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: Fewer than two islands, no energy site, or an energy that annealing cannot reach.

    Source: Neal (2001); Del Moral, Doucet and Jasra (2006).
    """
    if num_chains < 2:
        raise ValueError(f"num_chains = {num_chains}; expected at least 2 for a standard error.")
    if isinstance(model, EnergyDistribution):
        model = _as_model(model)
    bound = BoundModel(model, {}, rng_key, Arguments(args, kwargs))
    params = {} if params is None else params
    options = AnnealingOptions(num_kernel_steps, ess_threshold=0.5, resampling=systematic)
    found = bound.energies(params)
    if not found:
        raise ValueError("The model has no energy site, so there is no normaliser to estimate.")
    estimates: dict[str, dict[str, Array]] = {"estimate": {}, "stderr": {}, "ess": {}, "log_normalizers": {}}
    for index, (name, distribution) in enumerate(found.items()):
        if distribution.support.is_discrete:
            raise ValueError(
                f"Energy site '{name}' has a discrete support; annealing moves walkers by Langevin steps, which need a "
                "continuous one."
            )
        transform = standardizing_transform(starting_distribution(distribution, name))
        ensemble, _ = anneal_site(
            random.fold_in(rng_key, index),
            SiteAtParams(name, bound, params, transform),
            MALA(),
            options,
            num_chains=num_chains,
            num_walkers=num_walkers,
            num_temperatures=num_temperatures,
        )
        estimates["log_normalizers"][name] = ensemble.log_normalizers
        estimates["estimate"][name], estimates["stderr"][name] = jackknife_log_mean_exp(ensemble.log_normalizers)
        estimates["ess"][name] = pooled_ess_fraction(ensemble.log_weight)
    return LogNormalizer(**estimates)
