"""Draws around data rows, which reach where the generator's do not.

Energy gradients then weigh draws of both by exp(−U) over the density of the mixture:
a mode that the generator has dropped keeps its pull.  Defensive importance sampling:
Hesterberg (1995); the mixture's weights: Owen and Zhou (2000).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.nn import logsumexp
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.vera.inversion import log_density_at
from ebm_ppl.energy.coordinates import log_abs_det
from ebm_ppl.generators.program import Generator
from ebm_ppl.generators.scores.exact import ExactScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.proposals import log_standard_normal
from ebm_ppl.model.program import Params

# Gauss–Newton steps to the latents of such a draw.
NUM_STEPS = 3
# Rows that have a kernel.
MAX_ROWS = 256
# Smallest width of a kernel, in base-standard coordinates.
MIN_WIDTH = 1e-3


class RowKernels(NamedTuple):
    """A kernel density of data rows, in base-standard coordinates u.

    Attributes:
        centres: The rows, ``(num_rows, *event)``.
        width: Standard deviation of a kernel along every coordinate, ``event``.
    """

    centres: Array
    width: Array

    def draw(self, rng_key: Array, num_draws: int) -> Array:
        """Draws u, ``(num_draws, *event)``."""
        key_row, key_noise = random.split(rng_key)
        picked = random.randint(key_row, (num_draws,), 0, len(self.centres))
        noise = random.normal(
            key_noise, (num_draws, *self.width.shape), self.width.dtype
        )
        return self.centres[picked] + self.width * noise

    def log_density(self, position: Array) -> Array:
        """Log density of u, ``(num_draws,)``."""
        away = (position[:, None] - self.centres) / self.width
        log_kernels = log_standard_normal(away.reshape(*away.shape[:2], -1))
        log_width = jnp.sum(jnp.log(self.width))
        return logsumexp(log_kernels, axis=1) - math.log(len(self.centres)) - log_width


def kernels_of(rows: Array, coordinates: Transform) -> RowKernels:
    """Normal kernels as wide as Scott's (1992) rule says."""
    centres = coordinates.inv(rows)
    num_coordinates = math.prod(centres.shape[1:])
    share = len(centres) ** (-1.0 / (num_coordinates + 4))
    return RowKernels(centres, jnp.maximum(share * jnp.std(centres, axis=0), MIN_WIDTH))


class Defence(NamedTuple):
    """What a run with defensive draws carries.

    Attributes:
        kernels: Where they come from.
        log_normalizer: Running mean of the log of their mean weight, which the loss
            takes for log Z.
    """

    kernels: RowKernels
    log_normalizer: Array


class Defended(NamedTuple):
    """Draws of the generator, then as many around rows.

    Attributes:
        values: ``(2 num_draws, *event)``.
        log_density: Of the mixture, ``(2 num_draws,)``.
        log_generator: Log q̂ alone.
    """

    values: Array
    log_density: Array
    log_generator: Array


def defended_draws(
    rng_key: Array,
    kernels: RowKernels,
    coordinates: Transform,
    generator: Generator,
    params: Params,
    score: ImportanceScore | ExactScore,
    score_state: object,
    num_draws: int,
) -> Defended:
    """Draw from the generator and around rows, with the density of the mixture."""
    key_own, key_rows, key_score, key_noise = random.split(rng_key, 4)
    pair = generator.pair(params)

    # The generator's draws
    latents, own = generator.draws(params, random.split(key_own, num_draws))
    found, _ = score.evaluate(key_score, score_state, pair, latents, own)  # type: ignore[arg-type]

    # Draws around rows, at which log q̂ needs latents
    near = coordinates(kernels.draw(key_rows, num_draws))

    def at_row(row: Array) -> Array:
        return log_density_at(
            score,
            key_noise,
            score_state,
            pair,
            latents,
            row,
            num_steps=NUM_STEPS,
            num_lent=num_draws,
        )

    # Both densities everywhere
    values = jnp.concatenate([own, near])
    log_generator = jnp.concatenate([found.log_density, jax.vmap(at_row)(near)])
    position = coordinates.inv(values)
    log_rows = kernels.log_density(position) - log_abs_det(
        coordinates, position, values
    )
    log_density = jnp.logaddexp(log_generator, log_rows) - math.log(2.0)
    return Defended(values, log_density, log_generator)
