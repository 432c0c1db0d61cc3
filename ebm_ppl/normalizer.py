"""log Z of energies at fixed parameters, by annealing, quadrature or enumeration."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from ebm_ppl.annealing import AnnealingOptions
from ebm_ppl.bridge import Reference, bridge_to_draws
from ebm_ppl.certificate import (
    LogNormalizer,
    SiteCertificate,
    certify,
    exact_certificate,
    flags_of_exact,
)
from ebm_ppl.discrete import needs_continuous
from ebm_ppl.distribution import EnergyDistribution, starting_distribution
from ebm_ppl.evidence import Plan, data_rows, gather, given_samples
from ebm_ppl.exact import Exact, integral, total
from ebm_ppl.fingerprint import fingerprint, points_kept
from ebm_ppl.geometry import standardizing_transform
from ebm_ppl.inspection import bind, conditions, fingerprints
from ebm_ppl.kernels import MALA, Kernel
from ebm_ppl.model import BoundModel, Model, Params
from ebm_ppl.placement import SiteAtParams, resampled, settle
from ebm_ppl.pointwise import require_pointwise
from ebm_ppl.resampling import systematic

METHODS = ("bracket", "forward", "reverse", "quadrature", "enumeration")
# Data rows at which quadrature is checked; of more, evenly spaced ones.
MAX_EXACT_ROWS = 4096
# Moves under the energy itself, which separate resampled copies and reveal a drift.
NUM_SETTLING_MOVES = 1024


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

    - ``"bracket"``: annealed sequential Monte Carlo from the starting distribution to
      the energy, with an unbiased Ẑ, and back from draws of the model, with an unbiased
      1/Ẑ.  Walkers are fresh and follow a protocol that a pilot chose (temperatures by
      conditional ESS, step sizes by acceptance).  The reverse pass bounds log Z from
      above if its starting draws are the model's: ``samples``, or the forward pass's
      endpoints, resampled and moved further.  Where the model has data at the site,
      rows that forward annealing does not reach are searched for.
    - ``"forward"``, ``"reverse"``: one of the two passes.
    - ``"quadrature"``: for one or two unconstrained dimensions; differentiable, so it
      may stand inside a model.
    - ``"enumeration"``: for finite discrete supports; differentiable too.

    Every reason to doubt a result is in its ``flags``.  A distant mode that neither
    walkers nor data have visited cannot be detected.

    Args:
        rng_key: A JAX PRNG key; may be None for exact methods.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`,
            whose site is then named 'x'.
        params: All constrained parameters of the model by site name, such as
            ``fit.params``.
        args: The model's positional arguments; data at the energy sites may be left
            out.
        method: See above.
        num_chains: Independent islands, at least 2, from which the standard error and
            its t quantiles are computed.
        num_walkers: Walkers per island.
        num_temperatures: Rungs of each pass; None takes 32 times what the pilot needed.
        budget: Energy evaluations to spend on the walkers of all sites, instead of
            ``num_temperatures``; the pilot and the data rows cost extra.
        num_kernel_steps: Moves per rung.
        kernel: :class:`MALA` or :class:`ULA`; None takes MALA with adapted steps.
        samples: Draws of the model by site name, ``(num_chains, num_walkers,
            *batch_shape, *event_shape)``, to start the reverse pass from.
        num_points: Quadrature points per dimension; None takes 2,049 in one dimension,
            513 in two.
        tolerance: Widest bracket, in nats, that is certified.
        batch_ndims: Leading axes of ``params`` that are draws, as in
            ``numpyro.infer.log_likelihood``: 1 or 2 (chain, draw).  log Z is then found
            at the draw in the middle and bridged from there to every draw.
        progress_bar: Show the number of temperatures done, after the first second.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: Options that cannot work, parameters that are missing or unknown, no
            energy site, or an energy that annealing cannot reach.

    Source: Neal (2001); Del Moral, Doucet and Jasra (2006); the reverse bound: Grosse,
    Ghahramani and Adams (2015).
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
    if num_chains < 2:
        raise ValueError(
            f"num_chains = {num_chains}; expected at least 2 for a standard error."
        )
    for option, value in (
        ("num_walkers", num_walkers),
        ("num_kernel_steps", num_kernel_steps),
        ("num_temperatures", num_temperatures),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} = {value}; expected at least 1.")

    if budget is not None and num_temperatures is not None:
        raise ValueError(
            "Both budget and num_temperatures are given; expected one of them."
        )
    if batch_ndims and method == "reverse":
        raise ValueError(
            "method = 'reverse' with batch_ndims: bridges start from forward walkers; "
            "use 'bracket'."
        )

    # JAX arrays: loops in the model index parameters by a tracer, which NumPy arrays
    # refuse.
    params = {} if params is None else jax.tree.map(jnp.asarray, dict(params))
    draws, lead = _flatten_draws(params, batch_ndims)
    one = params if draws is None else _draw_in_the_middle(draws)
    is_exact = method in ("quadrature", "enumeration")
    key_bind = random.key(0) if rng_key is None else rng_key

    bound, found = bind(key_bind, model, one, args, kwargs, compiled=not is_exact)
    first = one if draws is None else jax.tree.map(lambda leaf: leaf[0], draws)
    belongs_to: dict[str, Any] = {
        "params": params,
        "conditions": conditions(bound, one, found),
    }

    # Exact methods
    if is_exact:
        seen = (
            {}
            if isinstance(model, EnergyDistribution)
            else data_rows(bound, one, MAX_EXACT_ROWS)
        )

        exact = {}
        for name, distribution in found.items():
            at_site = seen.get(name)
            exact[name] = exact_certificate(
                *(
                    _exactly(method, name, distribution, num_points, at_site)
                    if draws is None
                    else _exactly_at_draws(
                        method, name, bound, draws, num_points, at_site
                    )
                )
            )

        if isinstance(model, EnergyDistribution):
            marks = {"x": fingerprint(model)}
        else:
            marks = fingerprints(
                bound, first, {name: _few(points) for name, points in seen.items()}
            )
        return _collect(exact, lead, method, fingerprints=marks, **belongs_to)

    # Plan
    if rng_key is None:
        raise ValueError(
            f"method = {method!r} is stochastic; expected a PRNG key such as "
            "jax.random.key(0)."
        )

    num_settling_moves = NUM_SETTLING_MOVES
    if budget is not None:
        per_move = num_chains * num_walkers * len(found)
        num_temperatures, num_settling_moves = _spread(
            budget // per_move, method, num_kernel_steps
        )
        if num_temperatures < 2:
            raise ValueError(
                f"budget = {budget} pays for {num_temperatures} temperatures of "
                f"{num_chains} x {num_walkers} walkers; expected at least 2. Spend "
                "more, or take fewer walkers."
            )

    plan = Plan(
        method,
        MALA() if kernel is None else kernel,
        AnnealingOptions(num_kernel_steps, ess_threshold=0.5, resampling=systematic),
        num_chains,
        num_walkers,
        num_temperatures,
        num_settling_moves,
        may_settle_longer=budget is None,
    )

    # Anneal
    rows = data_rows(bound, one)
    sites, num_evaluations, keys = {}, 0, random.split(rng_key, len(found))
    visited = {}

    for index, (name, distribution) in enumerate(found.items()):
        if distribution.support.is_discrete:
            raise ValueError(
                needs_continuous(
                    distribution.base, name, "annealing, which moves by Langevin steps,"
                )
            )

        transform = standardizing_transform(starting_distribution(distribution, name))
        site = SiteAtParams(name, bound, one, transform)
        key_site, key_resample, key_settle, key_bridge = random.split(keys[index], 4)
        given = (
            None
            if samples is None
            else given_samples(site, samples, num_chains, num_walkers)
        )

        with tqdm(
            desc=f"log Z[{name}]",
            unit="temperature",
            delay=1.0,
            disable=not progress_bar,
        ) as bar:
            found_here = gather(
                key_site,
                site,
                plan,
                given,
                rows.get(name),
                partial(_report, bar, method),
            )

        sites[name] = certify(found_here.evidence, tolerance)
        num_evaluations += found_here.num_evaluations

        # Fingerprints at the walkers and the data: a model that uses this log Z must
        # have the same energy there.
        walkers = transform(found_here.forward.ensemble.position)
        visited[name] = _few(walkers.reshape(-1, *walkers.shape[2:]))
        if name in rows:
            visited[name] = jnp.concatenate([visited[name], _few(rows[name])])

        # Bridge to the draws
        if draws is not None:
            forward = found_here.forward
            step_size = forward.ladder.step_sizes[-1]
            position = settle(
                site,
                key_settle,
                resampled(key_resample, forward),
                step_size,
                NUM_SETTLING_MOVES,
            )

            reference = Reference(site, sites[name], position, step_size)
            sites[name], spent = bridge_to_draws(
                key_bridge, reference, draws, plan, tolerance, rows.get(name)
            )
            num_evaluations += spent + NUM_SETTLING_MOVES * num_chains * num_walkers

    marks = fingerprints(bound, first, visited)
    return _collect(
        sites,
        lead,
        method,
        num_evaluations=num_evaluations,
        fingerprints=marks,
        **belongs_to,
    )


def _few(points: Array) -> Array:
    """Evenly spaced points, as many as a fingerprint keeps of one kind."""
    num = min(len(points), points_kept(points.shape[1:]))
    return points[np.linspace(0, len(points) - 1, num).astype(int)]


def _spread(num_moves: int, method: str, num_kernel_steps: int) -> tuple[int, int]:
    """Split a walker's moves into temperatures per pass and settling moves.

    There are no more settling moves than temperatures.
    """
    if method == "forward":
        return num_moves // num_kernel_steps, 0
    num_temperatures = num_moves // (2 * num_kernel_steps + 1)
    if num_temperatures > NUM_SETTLING_MOVES:
        num_temperatures = (num_moves - NUM_SETTLING_MOVES) // (2 * num_kernel_steps)
    return num_temperatures, min(num_temperatures, NUM_SETTLING_MOVES)


def _flatten_draws(
    params: Params, batch_ndims: int
) -> tuple[Params | None, tuple[int, ...]]:
    """Draws with one leading axis, and the sizes of their original leading axes."""
    if batch_ndims == 0:
        return None, ()
    leads = {jnp.shape(leaf)[:batch_ndims] for leaf in jax.tree.leaves(params)}
    if len(leads) != 1 or len(lead := leads.pop()) != batch_ndims:
        raise ValueError(
            f"params should be draws with {batch_ndims} leading axes (batch_ndims), "
            "the same for every parameter; found shapes "
            f"{jax.tree.map(jnp.shape, params)}."
        )
    return jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (-1, *jnp.shape(leaf)[batch_ndims:])), params
    ), lead


def _draw_in_the_middle(draws: Params) -> Params:
    """The draw nearest to the mean, with coordinates in units of their spread."""

    def distance(leaf: Array) -> Array:
        flat = leaf.reshape(leaf.shape[0], -1)
        spread = jnp.std(flat, axis=0)
        return jnp.sum(
            ((flat - jnp.mean(flat, axis=0)) / jnp.where(spread > 0, spread, 1.0)) ** 2,
            axis=1,
        )

    nearest = jnp.argmin(sum(distance(leaf) for leaf in jax.tree.leaves(draws)))
    return jax.tree.map(lambda leaf: leaf[nearest], draws)


def _collect(
    sites: dict[str, SiteCertificate],
    lead: tuple[int, ...],
    method: str,
    **options: Any,
) -> LogNormalizer:
    """Collect the sites, with the draws' original leading axes restored."""
    if lead:
        for name, site in sites.items():
            arrays = {
                column: value.reshape(*lead, *value.shape[1:])
                for column, value in site._asdict().items()
                if column not in ("flags", "log_normalizers")
            }

            islands = site.log_normalizers
            sites[name] = site._replace(
                **arrays,
                log_normalizers=islands.reshape(
                    islands.shape[0], *lead, *islands.shape[2:]
                ),
            )

    return LogNormalizer.from_sites(sites, method, batch_ndims=len(lead), **options)


def _report(bar: tqdm, method: str, done: int, num_temperatures: int) -> None:
    bar.total = num_temperatures if method == "forward" else 2 * num_temperatures
    bar.update(done)


def _exactly(
    method: str,
    name: str,
    distribution: EnergyDistribution,
    num_points: int | None,
    rows: Array | None,
) -> Exact:
    exact = (
        integral(distribution, name, num_points, rows)
        if method == "quadrature"
        else total(distribution, name)
    )
    if isinstance(exact.estimate, jax.core.Tracer):
        exact = exact._replace(
            estimate=exact.estimate + require_pointwise(name, distribution)
        )
    return exact


def _exactly_at_draws(
    method: str,
    name: str,
    bound: BoundModel,
    draws: Params,
    num_points: int | None,
    rows: Array | None,
) -> Exact:
    """One exact log Z per draw; NaN and a flag where it could not be computed."""

    @jax.jit
    def at_draws(
        bound: BoundModel, draws: Params, rows: Array | None
    ) -> tuple[Array, Array]:
        def at(params: Params) -> tuple[Array, Array]:
            found = _exactly(
                method, name, bound.energies(params)[name], num_points, rows
            )
            return found.estimate, found.error

        return lax.map(at, draws)

    estimate, error = at_draws(bound, draws, rows)
    return Exact(estimate, error, flags_of_exact(estimate))
