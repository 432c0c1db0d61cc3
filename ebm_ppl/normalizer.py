"""log Z of a fitted energy by annealing fresh walkers."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random
from numpyro.distributions.transforms import Transform
from scipy.stats import t as student_t

from ebm_ppl.annealing import (
    AnnealingOptions,
    Ensemble,
    Ladder,
    Path,
    Pilot,
    anneal,
    refine_ladder,
    run_pilot,
)
from ebm_ppl.distribution import EnergyDistribution, annealing_path, potential_at, starting_distribution
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.kernels import MALA, Kernel, initial_step_size
from ebm_ppl.model import Arguments, BoundModel, Model, Params
from ebm_ppl.resampling import systematic
from ebm_ppl.weights import ess_fraction, jackknife_log_mean_exp

NUM_PILOT_WALKERS = 256
MAX_PILOT_RUNGS = 1000


@partial(jax.tree_util.register_dataclass, data_fields=["bound", "params", "transform"], meta_fields=["name"])
@dataclass(frozen=True)
class SiteAtParams:
    """One energy site of a model at fixed (unconstrained) parameters, in coordinates ``transform``."""

    name: str
    bound: BoundModel
    params: Params
    transform: Transform

    @property
    def distribution(self) -> EnergyDistribution:
        """The energy distribution, rebuilt inside whatever trace asks."""
        return self.bound.energies(self.params)[self.name]

    @property
    def dimension(self) -> int:
        """Number of event dimensions' elements."""
        return math.prod(self.distribution.event_shape)

    def path(self) -> Path:
        """From the starting distribution to the energy."""
        distribution = self.distribution
        return annealing_path(distribution, starting_distribution(distribution, self.name), self.transform)

    def draw(self, rng_key: Array, shape: tuple[int, int]) -> Array:
        """Exact draws from the starting distribution, as positions."""
        return self.transform.inv(starting_distribution(self.distribution, self.name).sample(rng_key, shape))


def anneal_site(
    rng_key: Array,
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    *,
    num_chains: int,
    num_walkers: int,
    num_temperatures: int | None,
) -> tuple[Ensemble, Array]:
    """Fresh walkers at the site's parameters, from exact draws of its starting distribution.

    A pilot decides the temperatures and step sizes; where the starting distribution already is the energy
    (conditional ESS over 0.9999) there is nothing to anneal.

    Returns:
        The ensemble and a step size of the site's batch shape.
    """
    key_pilot, key_start, key_run = random.split(rng_key, 3)
    if bool(_at_start(site, key_pilot)):
        step_size = jnp.full(site.distribution.batch_shape, initial_step_size(kernel, site.dimension))
        return _exact_start(site, key_start, (num_chains, num_walkers)), step_size
    pilot = _pilot(site, kernel, options, key_pilot)
    rungs = int(pilot.num_rungs)
    if not bool(pilot.ladder.betas[rungs - 1] >= 1.0):
        raise ValueError(
            f"Annealing walkers of energy site '{site.name}' from its base to the given parameters stopped at inverse "
            f"temperature {float(pilot.ladder.betas[rungs - 1]):.3g} after {rungs} temperatures. The energy is "
            "far from "
            "the base, or not bounded below: rescale it, start from smaller parameters (a last layer of zeros starts "
            "at the base itself), or name a closer start=."
        )
    if num_temperatures is None:
        # Powers of two, so that a few compiled lengths serve every call.
        num_temperatures = max(128, 2 ** math.ceil(math.log2(4 * rungs)))
    ladder = _refine(pilot, num_temperatures)
    ensemble = _anneal(site, kernel, options, key_run, key_start, (num_chains, num_walkers), ladder)
    _check_islands_agree(site.name, ensemble)
    return ensemble, ladder.step_sizes[-1]


def _check_islands_agree(name: str, ensemble: Ensemble) -> None:
    stderr = float(jnp.max(jackknife_log_mean_exp(ensemble.log_normalizers)[1]))
    if not stderr < 1.0:
        warnings.warn(
            f"Annealing to energy site '{name}': its islands disagree about log Z (standard error {stderr:.2g} "
            "nats), so no "
            "number that rests on it can be trusted. Take more temperatures or walkers, or a base nearer to the "
            "energy; if nothing helps, the energy may not be bounded below.",
            stacklevel=4,
        )


@jax.jit
def _at_start(site: SiteAtParams, rng_key: Array) -> Array:
    position = site.draw(rng_key, (1, NUM_PILOT_WALKERS))
    return jnp.all(ess_fraction(-site.path().difference(position), axis=1) > 0.9999)


@partial(jax.jit, static_argnames=("kernel", "options"))
def _pilot(site: SiteAtParams, kernel: Kernel, options: AnnealingOptions, rng_key: Array) -> Pilot:
    key_start, key_run = random.split(rng_key)
    position = site.draw(key_start, (1, NUM_PILOT_WALKERS))
    step_size = jnp.full(site.distribution.batch_shape, initial_step_size(kernel, site.dimension))
    return run_pilot(kernel, key_run, site.path(), position, step_size, options, max_rungs=MAX_PILOT_RUNGS)


@partial(jax.jit, static_argnames=("shape",))
def _exact_start(site: SiteAtParams, rng_key: Array, shape: tuple[int, int]) -> Ensemble:
    path, position = site.path(), site.draw(rng_key, shape)
    difference = path.difference(position)
    potential = potential_at(site.distribution, site.transform, position)
    return Ensemble(position, potential, -difference, jnp.zeros_like(difference[:, 0]))


_refine = jax.jit(refine_ladder, static_argnames=("num_temperatures",))


@partial(jax.jit, static_argnames=("kernel", "options", "shape"))
def _anneal(
    site: SiteAtParams,
    kernel: Kernel,
    options: AnnealingOptions,
    rng_key: Array,
    key_start: Array,
    shape: tuple[int, int],
    ladder: Ladder,
) -> Ensemble:
    return anneal(kernel, rng_key, site.path(), site.draw(key_start, shape), ladder, options)[0]


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
        estimates["ess"][name] = 1.0 / jnp.mean(1.0 / ess_fraction(ensemble.log_weight, axis=1), axis=0)
    return LogNormalizer(**estimates)
