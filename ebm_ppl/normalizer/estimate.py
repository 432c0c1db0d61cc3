"""log Z of energies at fixed parameters, by annealing, quadrature or enumeration."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.typing import ArrayLike

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.fingerprint import fingerprint
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.kernels.base import Kernel
from ebm_ppl.model.binding import bind_model, conditions
from ebm_ppl.model.program import Estimate, Model, Params, params_of
from ebm_ppl.model.repeatable import fingerprints
from ebm_ppl.normalizer.annealed import certify_by_annealing, few
from ebm_ppl.normalizer.by_base import certify_by_base, first_of
from ebm_ppl.normalizer.exactly import certify_exactly
from ebm_ppl.normalizer.options import EXACT, check_options, plan_of
from ebm_ppl.normalizer.parameter_draws import (
    collect,
    draw_in_the_middle,
    flatten_draws,
    marked_draw,
)
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.programs.keys import require_key
from ebm_ppl.walkers.bar import annealing_bar
from ebm_ppl.walkers.site import SiteAtParams, coordinates_for

NUM_WALKERS = 64

# Data rows at which quadrature is checked; of more, evenly spaced ones.
MAX_EXACT_ROWS = 4096


def log_normalizer(
    rng_key: Array | None,
    model: Model | EnergyDistribution,
    params: Estimate | Params | None = None,
    *args: Any,
    method: str = "bracket",
    num_chains: int = 16,
    num_walkers: int | None = None,
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
    - ``"base"``: draws of the base alone.  For a :func:`bounded` energy its limits hold
      whatever the energy, and before anything is run; otherwise it is never certified.
    - ``"quadrature"``: for one or two unconstrained dimensions; differentiable, so it
      may stand inside a model.
    - ``"enumeration"``: for finite discrete supports; differentiable too.

    Every reason to doubt a result is in its ``flags``.  A distant mode that neither
    walkers nor data have visited cannot be detected.

    Args:
        rng_key: A JAX PRNG key; may be None for exact methods.
        model: A NumPyro model with energy sites, or an :class:`EnergyDistribution`,
            whose site is then named 'x'.
        params: A :class:`Fit`, or all constrained parameters by site name.
        args: The model's positional arguments; data at the energy sites may be left
            out.
        method: See above.
        num_chains: Independent islands, at least 2, from which the standard error and
            its t quantiles are computed.
        num_walkers: Walkers per island; None takes 64, and for ``"base"`` the draws that
            a bounded energy's limits need, 2,048 to 65,536.
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
    Ghahramani and Adams (2015); limits by the base: Hoeffding (1963).

    One body: the stages of the call, in order.
    """
    check_options(
        method,
        num_chains,
        {
            "num_walkers": num_walkers,
            "num_kernel_steps": num_kernel_steps,
            "num_temperatures": num_temperatures,
        },
        budget,
        batch_ndims,
    )
    if rng_key is not None:
        require_key(rng_key)

    # JAX arrays: loops in the model index parameters by a tracer, which NumPy arrays
    # refuse.
    given: Params = jax.tree.map(jnp.asarray, params_of(params))
    draws, lead = flatten_draws(given, batch_ndims)
    one = given if draws is None else draw_in_the_middle(draws)
    is_exact = method in EXACT
    key_bind = random.key(0) if rng_key is None else rng_key

    # Model
    bound, found = bind_model(key_bind, model, one, args, kwargs, compiled=not is_exact)
    marked = marked_draw(given, batch_ndims)
    belongs_to: dict[str, Any] = {
        "params": given,
        "conditions": conditions(bound, one, found),
    }
    is_bare = isinstance(model, EnergyDistribution)
    rows = (
        {} if is_bare else data_rows(bound, one, MAX_EXACT_ROWS if is_exact else None)
    )

    # Exact methods
    if is_exact:
        exact = certify_exactly(method, bound, found, draws, num_points, rows)
        marks = (
            {"x": fingerprint(model)}
            if isinstance(model, EnergyDistribution)
            else fingerprints(bound, marked, {n: few(x) for n, x in rows.items()})
        )
        return collect(exact, lead, method, fingerprints=marks, **belongs_to)

    if rng_key is None:
        raise ValueError(
            f"method = {method!r} is stochastic; expected a PRNG key such as "
            "jax.random.key(0)."
        )

    # Draws of the base
    if method == "base":
        points = jax.tree.map(lambda leaf: leaf[None], one) if draws is None else draws
        by_base = certify_by_base(
            rng_key, bound, found, points, num_chains, num_walkers, tolerance
        )
        return collect(
            first_of(by_base.sites) if draws is None else by_base.sites,
            lead,
            method,
            num_evaluations=by_base.num_evaluations,
            fingerprints=fingerprints(
                bound, marked, {n: few(x) for n, x in rows.items()}
            ),
            **belongs_to,
        )

    # Plan
    plan = plan_of(
        method,
        kernel,
        num_chains,
        NUM_WALKERS if num_walkers is None else num_walkers,
        num_temperatures,
        num_kernel_steps,
        budget,
        len(found),
    )

    # Anneal
    sites, visited, num_evaluations = {}, {}, 0
    for key, name in zip(random.split(rng_key, len(found)), found, strict=True):
        transform = coordinates_for(plan.kernel, found[name], name, "annealing")
        site = SiteAtParams(name, bound, one, transform)

        num_passes = 1 if method == "forward" else 2
        with annealing_bar(f"log Z[{name}]", progress_bar, num_passes) as progress:
            annealed = certify_by_annealing(
                key,
                site,
                plan,
                samples,
                draws,
                rows.get(name),
                tolerance,
                progress,
            )

        sites[name], visited[name] = annealed.certificate, annealed.visited
        num_evaluations += annealed.num_evaluations

    return collect(
        sites,
        lead,
        method,
        num_evaluations=num_evaluations,
        fingerprints=fingerprints(bound, marked, visited),
        **belongs_to,
    )
