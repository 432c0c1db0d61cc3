"""Data rows that annealing from the base does not reach: modes missing from log Z.

A trajectory from x back to the base has mean weight ``q(x) / (base(x) exp(−E(x)))``,
where q is the density of forward annealing's unweighted endpoints; times Ẑ this is
about 1 wherever annealing leads.  Rows first move under the energy: a plain outlier
returns to the others, a row in a mode of its own stays there.  A single trajectory is
noisy, so rows of low weight are repeated many times.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.nn import logsumexp

from ebm_ppl.kernels.base import Kernel
from ebm_ppl.programs.products import einsum
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.weights import jackknife_log_mean_exp
from ebm_ppl.walkers.follow import Annealed, follow
from ebm_ppl.walkers.settle import SETTLING_SCALES, settle
from ebm_ppl.walkers.site import SiteAtParams

NUM_ROWS = 256

NUM_ROW_MOVES = 256

NUM_SUSPECTS = 8

NUM_REPEATS = NUM_ROWS // NUM_SUSPECTS

# A row is suspect if its single trajectory has a weight under exp(−5).  Of a row that
# annealing reaches that is about one trajectory in 150, by Markov's inequality, if
# weights are as likely to be that small as that large.
SUSPECT_NATS = 5.0

# At a mean weight under exp(−7), a thousand walkers come there less than once.
UNREACHED_NATS = 7.0


def share_unreached(
    rng_key: Array,
    site: SiteAtParams,
    forward: Annealed,
    walkers: Array,
    rows: Array,
    kernel: Kernel,
    options: AnnealingOptions,
) -> tuple[Array, int]:
    """Share of the checked rows that annealing does not reach.

    It is 0 unless repeats confirm at least one row.  A row is confirmed where the mean
    weight of its repeats is under exp(−7) and *each* of them is under the median of
    trajectories that start from the model's own walkers.  A row that is like these
    walkers is confirmed by chance with probability 2^−32, however noisy the weights.

    Args:
        rng_key: A JAX PRNG key.
        site: The site, with the forward pass's reference.
        forward: The forward pass.
        walkers: Equally weighted walkers at the energy, ``(num_chains, num_walkers,
            *batch, *event)``.
        rows: All usable data rows, ``(num_rows, *batch, *event)``.
        kernel: How trajectories move.
        options: How many moves a temperature gets; trajectories do not resample.

    Returns:
        The share, ``batch``, and the number of energy evaluations.
    """
    # Rows
    key_pick, key_first, key_again, key_null = random.split(rng_key, 4)
    positions = site.transform.inv(rows)
    num_looked_at = min(rows.shape[0], NUM_ROWS)
    flat = walkers.reshape(-1, *walkers.shape[2:])
    flat = flat[
        random.choice(
            key_pick, flat.shape[0], (NUM_ROWS,), replace=flat.shape[0] < NUM_ROWS
        )
    ]
    chosen = choose_rows(site, positions, flat)

    def weigh(key: Array, position: Array) -> Array:
        return _weights_back(key, site, forward, position, kernel, options)

    # One trajectory each
    ratios = weigh(key_first, chosen)
    per_pass = NUM_ROWS * (
        forward.ladder.betas.shape[0] * options.num_kernel_steps + NUM_ROW_MOVES
    )
    spent = per_pass + (rows.shape[0] if rows.shape[0] > NUM_ROWS else 0)
    if not bool(jnp.any(ratios < -SUSPECT_NATS)):
        return jnp.zeros(ratios.shape[1:]), spent

    # Repeats
    repeats = weigh(key_again, _suspects(ratios, chosen))
    usual = weigh(key_null, flat)
    return _confirmed(ratios[:num_looked_at], repeats, usual), spent + 2 * per_pass


@jax.jit
def choose_rows(site: SiteAtParams, positions: Array, walkers: Array) -> Array:
    """Choose :data:`NUM_ROWS` of the rows, ``(NUM_ROWS, *batch, *event)``.

    Fewer rows are repeated in turn.  Of more rows, a quarter each are those of lowest
    energy, those of lowest starting density, those farthest from all walkers, and
    evenly spaced ones.
    """
    num_rows = positions.shape[0]
    if num_rows <= NUM_ROWS:
        return positions[jnp.arange(NUM_ROWS) % num_rows]

    # Padded to NUM_ROWS times a power of two: a few compiled lengths serve all data.
    padded = NUM_ROWS * 2 ** max(0, (-(-num_rows // NUM_ROWS) - 1).bit_length())
    scores = _scores(site, positions[jnp.arange(padded) % num_rows], walkers)[
        :, :num_rows
    ]

    quarter = NUM_ROWS // 4
    extreme = lax.top_k(jnp.moveaxis(scores, 1, -1), quarter)[1]
    even = jnp.linspace(0, num_rows - 1, NUM_ROWS - 3 * quarter).astype(int)
    even = jnp.broadcast_to(even, (*extreme.shape[1:-1], even.shape[0]))
    chosen = jnp.moveaxis(jnp.concatenate([*extreme, even], axis=-1), -1, 0)

    return _take(positions, chosen)


@jax.jit
def _scores(site: SiteAtParams, positions: Array, walkers: Array) -> Array:
    """Three scores by which rows are chosen, ``(3, num_rows, *batch)``."""
    path = site.path()

    def of_chunk(chunk: Array) -> Array:
        start = path.start(chunk[None])[0]
        batch_ndims = start.ndim - 1

        # Squared distances
        rows, there = (
            u.reshape(*u.shape[: 1 + batch_ndims], -1) for u in (chunk, walkers)
        )
        products = einsum("n...d,m...d->nm...", rows, there)
        squares = jnp.sum(rows**2, -1)[:, None] + jnp.sum(there**2, -1)[None]

        scores = jnp.stack(
            [
                -(start + path.difference(chunk[None])[0]),
                start,
                jnp.min(squares - 2 * products, axis=1),
            ]
        )
        return jnp.where(jnp.isnan(scores), jnp.inf, scores)

    chunks = positions.reshape(-1, NUM_ROWS, *positions.shape[1:])
    scores = jnp.moveaxis(lax.map(of_chunk, chunks), 1, 0)
    return scores.reshape(3, positions.shape[0], *scores.shape[3:])


@jax.jit
def _take(positions: Array, indices: Array) -> Array:
    """Gather whole events by one index per row and batch element."""
    num_event_dims = positions.ndim - indices.ndim
    return jnp.take_along_axis(
        positions, indices.reshape(indices.shape + (1,) * num_event_dims), axis=0
    )


@jax.jit
def _suspects(ratios: Array, positions: Array) -> Array:
    """The rows of lowest weight, each :data:`NUM_REPEATS` times."""
    lowest = lax.top_k(-jnp.moveaxis(ratios, 0, -1), NUM_SUSPECTS)[1]
    return jnp.repeat(
        _take(positions, jnp.moveaxis(lowest, -1, 0)), NUM_REPEATS, axis=0
    )


@jax.jit
def _confirmed(ratios: Array, repeats: Array, usual: Array) -> Array:
    repeats = repeats.reshape(NUM_SUSPECTS, NUM_REPEATS, *repeats.shape[1:])
    rarely = logsumexp(repeats, axis=1) - jnp.log(NUM_REPEATS) < -UNREACHED_NATS
    otherwise = jnp.max(repeats, axis=1) < jnp.median(usual, axis=0)
    confirmed = jnp.any(rarely & otherwise, axis=0)
    # At least one row: the first trajectory of a confirmed row may have had a large
    # weight by luck.
    share = jnp.maximum(
        jnp.mean(ratios < -UNREACHED_NATS, axis=0), 1.0 / ratios.shape[0]
    )
    return jnp.where(confirmed, share, 0.0)


def _weights_back(
    rng_key: Array,
    site: SiteAtParams,
    forward: Annealed,
    position: Array,
    kernel: Kernel,
    options: AnnealingOptions,
) -> Array:
    """Log of weight times Ẑ of one trajectory back from every row.

    The result is ``(num_rows, *batch)``.
    """
    key_settle, key_back = random.split(rng_key)
    tuning = forward.ladder.tuning(-1)
    settled = settle(
        site,
        kernel,
        key_settle,
        position[None],
        tuning,
        NUM_ROW_MOVES,
        SETTLING_SCALES,
    )

    alone = options._replace(ess_threshold=0.0)
    back = follow(key_back, site, kernel, alone, forward.ladder.reverse(), settled)
    ratios = back.relative.log_weight[0] + _log_normalizer(forward)
    return jnp.where(jnp.isnan(ratios), -jnp.inf, ratios)


def _log_normalizer(forward: Annealed) -> Array:
    return jackknife_log_mean_exp(forward.relative.log_normalizers)[0]
