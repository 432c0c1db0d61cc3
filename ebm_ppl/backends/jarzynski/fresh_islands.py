"""Whether fresh islands know what those that train know.

Walkers that train saw the energy grow, and followed it into parts that annealing from the
base may miss, such as a narrow and distant mode.  Fresh islands that miss it, or that
find it only now and then, would bias the gradient as they take over: the part is lost,
its weight in the energy runs away, and held-out islands, fresh ones too, see nothing.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy.stats import t as student_t

from ebm_ppl.smc.ensemble import Ensemble

# Standard deviation of the fresh islands' log Z, in nats: the mean of a function under one
# island is off by about its square, as the share of a mode is.
MAX_SPREAD = 0.25
# Nats by which they may typically fall short of those that train.
MAX_SHORT = 0.1
# Share of the training walkers that may stand where no fresh one does.
MAX_LOST = 0.03
# Standard errors beyond which a shortfall, or a share, is no noise.
NUM_ERRORS = 4.0
# Probability that noise alone tells their moments apart.
FALSE_ALARM = 0.001
# A part is lost where fresh walkers are a hundred times rarer, in many dimensions where
# they are so many times as far; or farther by as many times again.
TIMES_RARER, MIN_FARTHER, AGAIN = 100.0, 1.5, 4.0
# Share of batch elements that may be in doubt.
MAX_SHARE = 0.1
# Islands, walkers of each, and batch elements whose places are looked at.
NUM_ISLANDS, NUM_WALKERS, NUM_ELEMENTS = 16, 64, 64


def doubt(training: Ensemble, held_out: Ensemble, fresh: Ensemble) -> str:
    """Why fresh islands should not take over; nothing where they may.

    Args:
        training: The islands that train.
        held_out: Those held out until now.
        fresh: The fresh ones, all at the same parameters.
    """
    known, witnesses, logs = (
        np.asarray(e.log_normalizers, float) for e in (training, held_out, fresh)
    )

    # Those that train are off by more than fresh ones may be: no doubt keeps them.
    spread = np.std(logs, axis=0, ddof=1) if len(logs) > 1 else np.zeros(logs.shape[1:])
    behind = np.median(logs, axis=0) - np.median(known, axis=0)
    is_open = behind <= np.maximum(spread, MAX_SPREAD)

    if np.mean(is_open & (spread > MAX_SPREAD)) > MAX_SHARE:
        return f"they disagree about log Z by {np.max(spread):.2g} nats"

    is_short = -behind > _shortfall_by_noise(known, witnesses, logs)
    if np.mean(is_short) > MAX_SHARE:
        return f"they put log Z {np.max(-behind[is_short]):.2g} nats under those that train"

    elements = _spaced(behind.size, NUM_ELEMENTS)
    is_open, is_lower = (flags.ravel()[elements] for flags in (is_open, behind < 0))
    elsewhere = np.asarray(moments_apart(training, fresh))
    if np.mean(is_lower & elsewhere) > MAX_SHARE:
        return "walkers stand elsewhere, at a smaller log Z, than those that train"

    lost = np.asarray(share_lost(training, fresh))
    if np.mean(is_open & (lost > MAX_LOST)) > MAX_SHARE:
        return f"none is where {100 * np.max(lost):.0f}% of those that train are"
    return ""


def _shortfall_by_noise(*groups: np.ndarray) -> np.ndarray:
    """Nats by which the fresh islands' median, the last group's, may be short by chance."""
    # Standard error of a median, by the widest of the groups.
    spread = [np.median(np.abs(g - np.median(g, axis=0)), axis=0) for g in groups]
    error = 1.25 / math.sqrt(len(groups[-1])) * 1.48 * np.max(spread, axis=0)
    return np.maximum(MAX_SHORT, NUM_ERRORS * error)


@jax.jit
def moments_apart(training: Ensemble, fresh: Ensemble) -> Array:
    """Whether islands' means and variances, of any coordinate, differ beyond noise.

    Alone it says nothing against fresh ones: learning moves those that train, whose log Z
    is then the smaller one.

    Returns:
        Booleans, of the shape of up to :data:`NUM_ELEMENTS` batch elements.
    """
    centre = jnp.mean(_means(training, _places(training)), axis=1)[:, None, None]

    def moments(ensemble: Ensemble) -> Array:
        shifted = _places(ensemble) - centre
        both = jnp.concatenate([shifted, shifted**2], axis=-1)
        return _means(ensemble, both)

    # Student's test, of one variance: the fresh ones are too few for one of their own.
    known, found = moments(training), moments(fresh)
    sizes = known.shape[1], found.shape[1]
    freedom = sum(sizes) - 2
    if freedom == 0:
        return jnp.zeros(known.shape[0], bool)
    squares = sizes[0] * jnp.var(known, axis=1) + sizes[1] * jnp.var(found, axis=1)
    error = jnp.sqrt(squares / freedom * (1 / sizes[0] + 1 / sizes[1]))
    gap = jnp.abs(jnp.mean(known, axis=1) - jnp.mean(found, axis=1))
    limit = student_t.ppf(1 - 0.5 * FALSE_ALARM / gap.shape[-1], freedom)
    return jnp.any(gap > limit * error, axis=-1)


def _means(ensemble: Ensemble, values: Array) -> Array:
    """Islands' weighted means, ``(num_elements, num_islands, dim)``."""
    return jnp.sum(_weights(ensemble)[..., None] * values, axis=2)


@jax.jit
def share_lost(training: Ensemble, fresh: Ensemble) -> Array:
    """Share of training walkers near which none of the fresh ones is, beyond noise.

    A training walker's distance to the nearest fresh one is compared with that to the
    nearest of as many other training islands.  If both are draws of the same energy,
    either is the larger as often.

    Returns:
        The share, of the shape of up to :data:`NUM_ELEMENTS` batch elements.
    """
    there, here = _places(training), _places(fresh)
    if there.shape[1] == 1:
        return jnp.zeros(there.shape[0])
    scale = jnp.std(there, axis=(1, 2), keepdims=True)
    there, here = (
        jnp.where(scale > 0, u / jnp.where(scale > 0, scale, 1.0), 0.0)
        for u in (there, here)
    )
    num_others = min(there.shape[1] - 1, here.shape[1])
    weight = _weights(training)

    def of_element(there: Array, here: Array, weight: Array) -> Array:
        def of_island(index: Array) -> Array:
            others = jnp.roll(there, -index - 1, axis=0)[:num_others]
            to_others = _nearest(there[index], others)
            to_fresh = _nearest(there[index], here[:num_others])
            farther = max(MIN_FARTHER, TIMES_RARER ** (1 / there.shape[-1]))
            times = jnp.array([[farther], [AGAIN * farther]], there.dtype)
            is_lost = to_fresh > times * to_others
            is_new = to_others > times * to_fresh
            return jnp.sum(weight[index] * (is_lost * 1.0 - is_new), axis=1)

        excess = lax.map(of_island, jnp.arange(there.shape[0]))
        error = jnp.std(excess, axis=0, ddof=1) / math.sqrt(len(excess))
        mean = jnp.mean(excess, axis=0)
        return jnp.max(jnp.where(mean > NUM_ERRORS * error, mean, 0.0))

    return lax.map(lambda element: of_element(*element), (there, here, weight))


def _places(ensemble: Ensemble) -> Array:
    """Positions, ``(num_elements, num_islands, num_walkers, dim)``."""
    return _thinned(ensemble.position, ensemble.position.ndim - ensemble.potential.ndim)


def _weights(ensemble: Ensemble) -> Array:
    """Weights inside of islands, ``(num_elements, num_islands, num_walkers)``."""
    return jax.nn.softmax(_thinned(ensemble.log_weight, 0)[..., 0], axis=-1)


def _spaced(size: int, most: int) -> np.ndarray:
    """Evenly spaced indices, all of them where there are no more than ``most``."""
    return np.linspace(0, size - 1, min(size, most)).astype(int)


def _thinned(values: Array, num_event_dims: int) -> Array:
    """Evenly spaced islands, walkers and batch elements of an array, events flat."""
    split = values.ndim - num_event_dims
    flat = values.reshape(*values.shape[:2], math.prod(values.shape[2:split]), -1)
    for axis, most in enumerate((NUM_ISLANDS, NUM_WALKERS, NUM_ELEMENTS)):
        flat = flat.take(_spaced(flat.shape[axis], most), axis=axis)
    return jnp.moveaxis(flat, 2, 0)


def _nearest(rows: Array, islands: Array) -> Array:
    """Distance of every row to the nearest walker of the islands."""
    walkers = islands.reshape(-1, islands.shape[-1])
    differences = rows[:, None] - walkers[None]
    return jnp.sqrt(jnp.min(jnp.sum(differences**2, axis=-1), axis=1))
