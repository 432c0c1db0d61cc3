"""Whether derivatives tell all of how an energy changes around the data."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.backends.score_matching.losses import in_coordinates, laplacian_of
from ebm_ppl.energy.start import potential_at
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.training.findings import Finding

MAX_ROWS, NUM_DRAWS = 256, 32
# Standard deviation of the points around rows, in that of the rows.
REACH = 0.3
# Share of a change that derivatives may lack, and standard errors beyond noise.
MAX_SHARE, NUM_ERRORS = 0.03, 5.0

REMEDIES = "Take a smooth energy, method='denoising', or another backend."


class Around(NamedTuple):
    """What an energy does around the data, and what its derivatives tell of that.

    Attributes:
        curvature: The mean curvature.
        flat: What second derivatives lack of it, and that one's standard error.
        slope: Mean absolute slope along every coordinate.
        jumps: What first derivatives lack of the slope, and its standard error.
        infinite: Share of points where the energy is infinite.
    """

    curvature: Array
    flat: tuple[Array, Array]
    slope: Array
    jumps: tuple[Array, Array]
    infinite: Array


def not_smooth(bound: BoundModel, params: Params, rng_key: Array) -> Iterator[Finding]:
    r"""Where an energy has walls, jumps or kinks, which no derivative shows.

    Around a row, :math:`E[\epsilon\,U(x+\sigma\epsilon)]/\sigma` is the mean slope and
    :math:`E[\epsilon\cdot\nabla U(x+\sigma\epsilon)]/\sigma` the mean curvature
    (Stein's lemma), jumps and kinks included; derivatives tell what is between them.
    """
    is_shared = not any(e.batch_shape for e in bound.energies(params).values())
    rows = data_rows(bound, params, MAX_ROWS, full_plates=is_shared)
    for name, values in rows.items():
        if len(values) < 2:
            continue
        found = _around(bound, params, name, values, rng_key)
        whole, lacking = float(found.curvature), float(found.flat[0])

        if found.infinite > 0:
            yield Finding(
                f"Energy site '{name}': the energy is infinite next to the data. At such "
                "a wall the density ends without vanishing, which score matching does not "
                f"see: what was fitted is wrong. Take a base with that end. {REMEDIES}"
            )
        elif bool(jnp.any(_is_lacking(found.jumps, found.slope))):
            yield Finding(
                f"Energy site '{name}': the energy jumps around the data. Its derivatives "
                f"do not tell, so what score matching fitted is wrong. {REMEDIES}"
            )
        elif bool(_is_lacking(found.flat, found.curvature)):
            yield Finding(
                f"Energy site '{name}': around the data the energy curves by {whole:.2f}, "
                f"and its second derivatives tell {abs(whole - lacking):.2f}. The rest is "
                "at kinks, as of relu or abs, which score matching does not see: what was "
                f"fitted is wrong. Take swish, softplus or tanh. {REMEDIES}"
            )


def _is_lacking(found: tuple[Array, Array], whole: Array) -> Array:
    lacking, error = found
    least = jnp.maximum(NUM_ERRORS * error, MAX_SHARE * jnp.abs(whole))
    return jnp.abs(lacking) > least


@partial(jax.jit, static_argnames="name")
def _around(
    bound: BoundModel, params: Params, name: str, rows: Array, rng_key: Array
) -> Around:
    """One body: both lemmas at the same points."""
    energy = bound.energies(params)[name]
    transform, gradient = in_coordinates(energy)
    position = transform.inv(rows)
    scale = REACH * jnp.std(position, axis=0)
    scale = jnp.where(scale > 0, scale, REACH)

    def flat(values: Array) -> Array:
        return values.reshape(len(rows), -1)

    def at(key: Array) -> tuple[Array, ...]:
        noise = random.normal(key, position.shape, position.dtype)
        ends = position + scale * noise, position - scale * noise
        levels = [potential_at(energy, transform, end) for end in ends]
        slopes = [gradient(end) for end in ends]

        # Both of one leading dimension: differences between the ends, half of them
        rise = 0.5 * (levels[0] - levels[1])
        rise = rise.reshape(*rise.shape, *(1,) * (noise.ndim - rise.ndim))
        slope = 0.5 * (slopes[0] + slopes[1])
        jump = flat(noise * rise / scale - slope)

        whole = flat(0.5 * noise * (slopes[0] - slopes[1]) / scale).sum(1)
        told = sum(flat(laplacian_of(gradient, end, energy)).sum(1) for end in ends)
        is_infinite = jnp.mean(jnp.isinf(jnp.stack(levels)))
        return whole, whole - 0.5 * told, flat(slope), jump, is_infinite

    # Draws around one row are not independent of it: rows are.
    found = lax.map(at, random.split(rng_key, NUM_DRAWS))
    whole, lacking, slope, jump, infinite = (jnp.mean(part, axis=0) for part in found)

    def with_error(each: Array) -> tuple[Array, Array]:
        error = jnp.std(each, axis=0, ddof=1) / jnp.sqrt(len(rows))
        return jnp.mean(each, axis=0), error

    return Around(
        jnp.mean(whole),
        with_error(lacking),
        jnp.mean(jnp.abs(slope), axis=0),
        with_error(jump),
        infinite,
    )
