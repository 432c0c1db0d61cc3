"""log Z of one site by annealing, at one parameter value or at draws."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike

from ebm_ppl.energy.log_normalizer import SiteCertificate
from ebm_ppl.energy.marks import points_kept
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.bridge import Reference, bridge_to_draws
from ebm_ppl.normalizer.certify import certify
from ebm_ppl.normalizer.options import NUM_SETTLING_MOVES
from ebm_ppl.normalizer.passes import Plan, run_passes
from ebm_ppl.normalizer.rows import given_samples
from ebm_ppl.walkers.follow import Progress
from ebm_ppl.walkers.settle import resampled, settle
from ebm_ppl.walkers.site import SiteAtParams


class AnnealedCertificate(NamedTuple):
    """What annealing found.

    Attributes:
        certificate: log Z.
        visited: Points at which the energy is recorded: walkers and data rows.
        num_evaluations: Energy evaluations spent.
    """

    certificate: SiteCertificate
    visited: Array
    num_evaluations: int


def certify_by_annealing(
    rng_key: Array,
    site: SiteAtParams,
    plan: Plan,
    samples: Mapping[str, ArrayLike] | None,
    draws: Params | None,
    rows: Array | None,
    tolerance: float,
    progress: Progress | None = None,
) -> AnnealedCertificate:
    """Anneal to a site, certify its log Z, and go on to draws of the parameters.

    Args:
        rng_key: A JAX PRNG key.
        site: The site.
        plan: Settings of the annealing.
        samples: Draws of the model to start the reverse pass from, by site.
        draws: Parameters with one leading axis, or None.
        rows: Data rows of the site.
        tolerance: Widest bracket, in nats, that is certified.
        progress: Called with the number of temperatures just done, and of all.
    """
    key_site, key_resample, key_settle, key_bridge = random.split(rng_key, 4)
    num_walkers = plan.num_chains * plan.num_walkers
    given = None
    if samples is not None:
        given = given_samples(site, samples, plan.num_chains, plan.num_walkers)

    # Certify
    passes = run_passes(key_site, site, plan, given, rows, progress)
    certificate = certify(passes.findings, tolerance)
    spent = passes.num_evaluations

    # A model that uses this log Z must have the same energy at walkers and data.
    walkers = site.transform(passes.forward.ensemble.position)
    visited = few(walkers.reshape(-1, *walkers.shape[2:]))
    if rows is not None:
        visited = jnp.concatenate([visited, few(rows)])

    # Bridge to the draws
    if draws is not None:
        forward = passes.forward
        tuning, position = forward.ladder.tuning(-1), resampled(key_resample, forward)
        position = settle(
            site, plan.kernel, key_settle, position, tuning, NUM_SETTLING_MOVES
        )
        reference = Reference(site, certificate, position, tuning)
        certificate, more = bridge_to_draws(
            key_bridge, reference, draws, plan, tolerance, rows
        )
        spent += more + NUM_SETTLING_MOVES * num_walkers

    return AnnealedCertificate(certificate, visited, spent)


def few(points: Array) -> Array:
    """Evenly spaced points, as many as a fingerprint keeps of one kind."""
    num = min(len(points), points_kept(points.shape[1:]))
    return rows_of(points, np.linspace(0, len(points) - 1, num).astype(int))


@jax.jit
def rows_of(points: Array, indices: Array) -> Array:
    """Some of the points."""
    return jnp.take(points, indices, axis=0)
