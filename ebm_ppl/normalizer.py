"""log Z of energies at fixed parameters: annealing in both directions, quadrature, enumeration."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax, random
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from ebm_ppl.annealing import AnnealingOptions
from ebm_ppl.bridge import Reference, bridge_to_draws
from ebm_ppl.certificate import (
    UNREACHED_NATS,
    Evidence,
    LogNormalizer,
    SiteCertificate,
    certify,
    exact_certificate,
    flags_of_exact,
    pass_of,
)
from ebm_ppl.distribution import EnergyDistribution, check_start_covers, starting_distribution, unwrap
from ebm_ppl.exact import enumeration, quadrature
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import check_params, unmasked_rows
from ebm_ppl.kernels import MALA, Kernel
from ebm_ppl.model import Arguments, BoundModel, Model, Params, observations
from ebm_ppl.placement import (
    NUM_PILOT_WALKERS,
    Annealed,
    Progress,
    SiteAtParams,
    anneal_site,
    follow,
    resampled,
    settle,
)
from ebm_ppl.resampling import systematic
from ebm_ppl.weights import jackknife_log_mean_exp

METHODS = ("bracket", "forward", "reverse", "quadrature", "enumeration")
MAX_DATA_ROWS = 256
# Moves under the energy itself: resampled copies part, and a drift shows.
NUM_SETTLING_MOVES = 1024


def _energy_alone(distribution: EnergyDistribution) -> None:
    """The model of a bare distribution; one function, so that equal shapes share executables."""
    numpyro.sample("x", distribution)


def bind(
    rng_key: Array, model: Model | EnergyDistribution, params: Params, args: tuple, kwargs: dict
) -> tuple[BoundModel, dict[str, EnergyDistribution]]:
    """A model on its data and its energies at ``params``; a bare distribution becomes the model of a site 'x'.

    Raises:
        ValueError: Parameters that are missing or unknown, or no energy site.
    """
    if isinstance(model, EnergyDistribution):
        if params or args or kwargs:
            raise ValueError("A bare EnergyDistribution holds its parameters; expected no params and no arguments.")
        return BoundModel(_energy_alone, {}, rng_key, Arguments((model,))), {"x": model}
    bound = BoundModel(model, {}, rng_key, Arguments(args, kwargs))
    check_params(bound, params)
    found = bound.energies(params)
    if not found:
        raise ValueError("The model has no energy site: declare one with numpyro.sample('x', EnergyDistribution(...)).")
    return bound, found


@dataclass(frozen=True)
class _Annealing:
    """How :func:`log_normalizer` anneals."""

    method: str
    kernel: Kernel
    options: AnnealingOptions
    num_chains: int
    num_walkers: int
    num_temperatures: int | None
    num_settling_moves: int


def log_normalizer(
    rng_key: Array | None,
    model: Model | EnergyDistribution,
    params: Params | None = None,
    *args: Any,
    method: str = "bracket",
    num_chains: int = 16,
    num_walkers: int = 64,
    num_temperatures: int | None = None,
    budget: int | None = None,
    num_kernel_steps: int = 1,
    kernel: Kernel | None = None,
    samples: Mapping[str, ArrayLike] | None = None,
    num_points: int | None = None,
    tolerance: float = 1.0,
    batch_ndims: int = 0,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LogNormalizer:
    """Estimate log Z at fixed parameters and bound it from both sides.

    ``method``:

    - ``"bracket"``: annealed sequential Monte Carlo from the starting distribution to the energy, whose Ẑ is
      unbiased, and back from draws of the model, whose 1/Ẑ is.  Walkers are fresh and follow a protocol that a pilot
      chose (temperatures by conditional ESS, step sizes by acceptance).  The reverse pass bounds log Z from above as
      far as its starting draws are the model's: it takes ``samples``, or the forward pass's endpoints, resampled and
      moved on.  Where the model holds data at the site, rows that forward annealing does not reach are looked for.
    - ``"forward"``, ``"reverse"``: one of the two.
    - ``"quadrature"``: for one or two unconstrained dimensions; differentiable, so it may stand inside a model.
    - ``"enumeration"``: for finite discrete supports; differentiable too.

    Whatever speaks against a result is in its ``flags``.  A far mode that neither walkers nor data have seen cannot
    be noticed.

    Args:
        rng_key: A JAX PRNG key; None will do for exact methods.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`, whose site is then named 'x'.
        params: Constrained parameters by site name, all that the model has, such as ``fit.params``.
        args: The model's positional arguments; data at the energy sites may be left out.
        method: See above.
        num_chains: Independent islands, at least 2; the standard error and its t quantiles rest on them.
        num_walkers: Walkers per island.
        num_temperatures: Rungs of each pass; None takes 32 times what the pilot needed.
        budget: Energy evaluations to spend on the walkers of all sites, instead of ``num_temperatures``; the pilot and
            the data rows come on top.
        num_kernel_steps: Moves per rung.
        kernel: :class:`MALA` or :class:`ULA`; None takes MALA with adapted steps.
        samples: Draws of the model by site name, ``(num_chains, num_walkers, *batch_shape, *event_shape)``, to start
            the reverse pass from.
        num_points: Of the quadrature, per dimension; None takes 2,049 in one dimension, 513 in two.
        tolerance: Widest bracket, in nats, that is certified.
        batch_ndims: Leading axes of ``params`` that are draws, as in ``numpyro.infer.log_likelihood``: 1 or 2 (chain,
            draw).  log Z is then found at the draw in the middle and bridged from there to every draw.
        progress_bar: Show the temperatures done, once a second.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: Options that cannot work, parameters that are missing or unknown, no energy site, or an energy
            that annealing cannot reach.

    Source: Neal (2001); Del Moral, Doucet and Jasra (2006); the reverse bound: Grosse, Ghahramani and Adams (2015).
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
    if num_chains < 2:
        raise ValueError(f"num_chains = {num_chains}; expected at least 2 for a standard error.")
    if budget is not None and num_temperatures is not None:
        raise ValueError("Both budget and num_temperatures are given; expected one of them.")
    params = {} if params is None else dict(params)
    draws, lead = _flatten_draws(params, batch_ndims)
    one = params if draws is None else _draw_in_the_middle(draws)
    bound, found = bind(random.key(0) if rng_key is None else rng_key, model, one, args, kwargs)
    if method in ("quadrature", "enumeration"):
        exact = {
            name: _exactly(method, name, distribution, num_points)
            if draws is None
            else _exactly_at_draws(method, name, bound, draws, num_points)
            for name, distribution in found.items()
        }
        return _collect(exact, lead, method, params=params)
    if rng_key is None:
        raise ValueError(f"method = {method!r} is stochastic; expected a PRNG key such as jax.random.key(0).")
    num_settling_moves = NUM_SETTLING_MOVES
    if budget is not None:
        per_move = num_chains * num_walkers * len(found)
        num_temperatures, num_settling_moves = _spread(budget // per_move, method, num_kernel_steps)
        if num_temperatures < 2:
            raise ValueError(
                f"budget = {budget} pays for {num_temperatures} temperatures of {num_chains} x {num_walkers} walkers; "
                "expected at least 2. Spend more, or take fewer walkers."
            )
    annealing = _Annealing(
        method,
        MALA() if kernel is None else kernel,
        AnnealingOptions(num_kernel_steps, ess_threshold=0.5, resampling=systematic),
        num_chains,
        num_walkers,
        num_temperatures,
        num_settling_moves,
    )
    rows = _data_rows(bound, one)
    sites, num_evaluations = {}, 0
    for index, (name, distribution) in enumerate(found.items()):
        if distribution.support.is_discrete:
            raise ValueError(
                f"Energy site '{name}' has a discrete support; annealing moves walkers by Langevin steps, which need a "
                "continuous one. A finite support can be summed: method='enumeration'."
            )
        check_start_covers(distribution, name)
        transform = standardizing_transform(starting_distribution(distribution, name))
        site = SiteAtParams(name, bound, one, transform)
        key_site = random.fold_in(rng_key, index)
        given = None if samples is None else _given_samples(site, samples, num_chains, num_walkers)
        with tqdm(desc=f"log Z[{name}]", unit="temperature", delay=1.0, disable=not progress_bar) as bar:
            evidence, forward, spent = _anneal_both_ways(
                key_site, site, annealing, given, rows.get(name), partial(_report, bar, method)
            )
        sites[name] = certify(evidence, tolerance)
        num_evaluations += spent
        if draws is not None:
            key_resample, key_settle, key_bridge = random.split(random.fold_in(key_site, 1), 3)
            step_size = forward.ladder.step_sizes[-1]
            position, _ = settle(site, key_settle, resampled(key_resample, forward), step_size, NUM_SETTLING_MOVES)
            reference = Reference(site, sites[name], position, step_size)
            sites[name], spent = bridge_to_draws(
                key_bridge, reference, draws, annealing.kernel, annealing.options, tolerance
            )
            num_evaluations += spent + NUM_SETTLING_MOVES * num_chains * num_walkers
    return _collect(sites, lead, method, params=params, num_evaluations=num_evaluations)


def _spread(num_moves: int, method: str, num_kernel_steps: int) -> tuple[int, int]:
    """How many temperatures a pass gets, and how many settling moves (no more than that), out of a walker's moves."""
    if method == "forward":
        return num_moves // num_kernel_steps, 0
    num_temperatures = num_moves // (2 * num_kernel_steps + 1)
    if num_temperatures > NUM_SETTLING_MOVES:
        num_temperatures = (num_moves - NUM_SETTLING_MOVES) // (2 * num_kernel_steps)
    return num_temperatures, min(num_temperatures, NUM_SETTLING_MOVES)


def _flatten_draws(params: Params, batch_ndims: int) -> tuple[Params | None, tuple[int, ...]]:
    """Draws with one leading axis, and the axes that they had."""
    if batch_ndims == 0:
        return None, ()
    leads = {jnp.shape(leaf)[:batch_ndims] for leaf in jax.tree.leaves(params)}
    if len(leads) != 1 or len(lead := leads.pop()) != batch_ndims:
        raise ValueError(
            f"params should be draws with {batch_ndims} leading axes (batch_ndims), the same for every parameter; "
            f"found shapes {jax.tree.map(jnp.shape, params)}."
        )
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *jnp.shape(leaf)[batch_ndims:])), params), lead


def _draw_in_the_middle(draws: Params) -> Params:
    """The draw nearest to the mean, every coordinate in units of its spread."""

    def distance(leaf: Array) -> Array:
        flat = leaf.reshape(leaf.shape[0], -1)
        spread = jnp.std(flat, axis=0)
        return jnp.sum(((flat - jnp.mean(flat, axis=0)) / jnp.where(spread > 0, spread, 1.0)) ** 2, axis=1)

    nearest = jnp.argmin(sum(distance(leaf) for leaf in jax.tree.leaves(draws)))
    return jax.tree.map(lambda leaf: leaf[nearest], draws)


def _collect(sites: dict[str, SiteCertificate], lead: tuple[int, ...], method: str, **options: Any) -> LogNormalizer:
    """Give the draws' axis back the shape that the draws had."""
    if lead:
        for name, site in sites.items():
            arrays = {
                column: value.reshape(*lead, *value.shape[1:])
                for column, value in site._asdict().items()
                if column not in ("flags", "log_normalizers")
            }
            islands = site.log_normalizers
            sites[name] = site._replace(
                **arrays, log_normalizers=islands.reshape(islands.shape[0], *lead, *islands.shape[2:])
            )
    return LogNormalizer.from_sites(sites, method, batch_ndims=len(lead), **options)


def _report(bar: tqdm, method: str, done: int, num_temperatures: int) -> None:
    bar.total = num_temperatures if method == "forward" else 2 * num_temperatures
    bar.update(done)


def _exactly(method: str, name: str, distribution: EnergyDistribution, num_points: int | None) -> SiteCertificate:
    estimate, flags = (
        quadrature(distribution, name, num_points) if method == "quadrature" else enumeration(distribution, name)
    )
    return exact_certificate(estimate, flags)


def _exactly_at_draws(
    method: str, name: str, bound: BoundModel, draws: Params, num_points: int | None
) -> SiteCertificate:
    """One exact log Z per draw; NaN, and a flag, where quadrature cannot tell."""

    @jax.jit
    def at_draws(bound: BoundModel, draws: Params) -> Array:
        def at(params: Params) -> Array:
            return _exactly(method, name, bound.energies(params)[name], num_points).estimate

        return lax.map(at, draws)

    estimate = at_draws(bound, draws)
    return exact_certificate(estimate, flags_of_exact(estimate))


def _anneal_both_ways(
    rng_key: Array,
    site: SiteAtParams,
    annealing: _Annealing,
    samples: Array | None,
    rows: Array | None,
    progress: Progress,
) -> tuple[Evidence, Annealed, int]:
    """The passes that the method asks for, the forward one's walkers, and the cost in energy evaluations."""
    key_forward, key_resample, key_settle, key_reverse, key_data = random.split(rng_key, 5)
    kernel, options = annealing.kernel, annealing.options
    num_walkers = annealing.num_chains * annealing.num_walkers
    # A reverse pass from given draws needs the forward pass for its ladder alone.
    forward = anneal_site(
        key_forward,
        site,
        kernel,
        options,
        num_chains=annealing.num_chains,
        num_walkers=annealing.num_walkers,
        num_temperatures=annealing.num_temperatures,
        progress=progress,
    )
    num_temperatures = forward.ladder.betas.shape[0]
    per_pass = num_temperatures * num_walkers * options.num_kernel_steps
    spent = per_pass + NUM_PILOT_WALKERS
    reverse = drift = None
    if annealing.method != "forward":
        down = forward.ladder.reverse()
        start = resampled(key_resample, forward) if samples is None else site.transform.inv(samples)
        position, drift = settle(site, key_settle, start, forward.ladder.step_sizes[-1], annealing.num_settling_moves)
        spent += annealing.num_settling_moves * num_walkers
        backward = follow(key_reverse, site, kernel, options, down, position, progress)
        spent += per_pass
        weights = forward.ensemble.log_normalizers if samples is None else None
        reverse = pass_of(backward.ensemble, backward.acceptance, weights)
    unreached = None
    if rows is not None and annealing.method != "reverse":
        alone = options._replace(ess_threshold=0.0)
        back = follow(key_data, site, kernel, alone, forward.ladder.reverse(), site.transform.inv(rows))
        unreached = _share_unreached(back, forward)
        spent += num_temperatures * rows.shape[1] * options.num_kernel_steps
    forward_pass = None if annealing.method == "reverse" else pass_of(forward.ensemble, forward.acceptance)
    return Evidence(forward_pass, reverse, drift, unreached), forward, spent


def _share_unreached(back: Annealed, forward: Annealed) -> Array:
    """Share of data rows where annealing from the base arrives far more rarely than the model says.

    A trajectory that ends at a row and is followed back to the base weighs, on average, the density of forward
    annealing's unweighted endpoints there over base·exp(−E); times Ẑ this is about 1 wherever annealing leads.
    """
    log_z, _ = jackknife_log_mean_exp(forward.ensemble.log_normalizers)
    ratio = back.ensemble.log_weight[0] + log_z
    return jnp.mean(ratio < -UNREACHED_NATS, axis=0)


def _given_samples(site: SiteAtParams, samples: Mapping[str, ArrayLike], num_chains: int, num_walkers: int) -> Array:
    if site.name not in samples:
        raise ValueError(f"samples has sites {sorted(samples)}; expected energy site '{site.name}' among them.")
    distribution = site.distribution
    given = jnp.asarray(samples[site.name])
    expected = (num_chains, num_walkers, *distribution.batch_shape, *distribution.event_shape)
    if given.shape != expected:
        raise ValueError(
            f"samples['{site.name}'] has shape {given.shape}; expected (num_chains, num_walkers, *batch_shape, "
            f"*event_shape) = {expected}. Pass num_chains= and num_walkers=, or reshape the draws."
        )
    return given


def _data_rows(bound: BoundModel, params: Params) -> dict[str, Array]:
    """Up to :data:`MAX_DATA_ROWS` usable rows of every observed energy site, ``(1, rows, *batch, *event)``."""
    rows = {}
    for name, found in observations(bound.rng_key, bound.model, params, bound.arguments).items():
        energy = unwrap(found.distribution)
        if energy is None or isinstance(found.value, jax.core.Tracer) or energy.support.is_discrete:
            continue
        own_shape = energy.batch_shape + energy.event_shape
        values = np.asarray(found.value).reshape(-1, *own_shape)
        num_rows = len(values)
        checks = (np.isfinite(values), np.asarray(energy.support(values)), unmasked_rows(found.distribution))
        values = values[np.all([check.reshape(num_rows, -1).all(1) for check in checks], axis=0)]
        if not len(values):
            continue
        chosen = np.unique(np.linspace(0, len(values) - 1, MAX_DATA_ROWS).astype(int))
        rows[name] = jnp.asarray(values[chosen])[None]
    return rows
