"""Fresh walkers of an energy site at given parameters: exact draws of its start, annealed to the energy."""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.annealing import AnnealingOptions, Ensemble, Ladder, Path, Pilot, anneal, refine_ladder, run_pilot
from ebm_ppl.distribution import EnergyDistribution, annealing_path, potential_at, starting_distribution
from ebm_ppl.kernels import Kernel, initial_step_size
from ebm_ppl.model import BoundModel, Params
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
        raise ValueError(_why_annealing_stopped(site, key_pilot, pilot.ladder.betas[rungs - 1], rungs))
    if num_temperatures is None:
        # Powers of two, so that a few compiled lengths serve every call.
        num_temperatures = max(128, 2 ** math.ceil(math.log2(4 * rungs)))
    ladder = _refine(pilot, num_temperatures)
    ensemble = _anneal(site, kernel, options, key_run, key_start, (num_chains, num_walkers), ladder)
    _check_islands_agree(site.name, ensemble)
    return ensemble, ladder.step_sizes[-1]


def _why_annealing_stopped(site: SiteAtParams, rng_key: Array, beta: Array, rungs: int) -> str:
    difference = site.path().difference(site.draw(rng_key, (1, NUM_PILOT_WALKERS)))
    num_nan = int(jnp.sum(jnp.isnan(difference)))
    if num_nan:
        return (
            f"The energy of site '{site.name}' is NaN at {num_nan} of {difference.size} draws of its base (or start), "
            "at the given parameters. Make it finite, or +inf, over the whole support: guard logarithms and roots, or "
            "choose a base with the energy's own support."
        )
    return (
        f"Annealing walkers of energy site '{site.name}' from its base to the given parameters stopped at inverse "
        f"temperature {float(beta):.3g} after {rungs} temperatures. The energy is far from the base, or not bounded "
        "below: rescale it, start from smaller parameters (a last layer of zeros starts at the base itself), or name a "
        "closer start=."
    )


def _check_islands_agree(name: str, ensemble: Ensemble) -> None:
    stderr = float(jnp.max(jackknife_log_mean_exp(ensemble.log_normalizers)[1]))
    if not stderr < 1.0:
        warnings.warn(
            f"Annealing to energy site '{name}': its islands disagree about log Z (standard error {stderr:.2g} "
            "nats), so no number that rests on it can be trusted. Take more temperatures or walkers, or a base nearer "
            "to the energy; if nothing helps, the energy may not be bounded below.",
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
