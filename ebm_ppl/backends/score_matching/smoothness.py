"""Whether derivatives tell all of how an energy changes around the data."""

import math
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
from ebm_ppl.normalizer.rows import rows_of_batch
from ebm_ppl.training.findings import Finding

MAX_ROWS, NUM_DRAWS = 256, 32
# Standard deviation of the points around rows, in that of the rows.
REACH = 0.3
# Share of a change that derivatives may lack, and standard errors beyond noise.
MAX_SHARE, NUM_ERRORS = 0.03, 5.0

REMEDY = "Take a smooth energy, or another backend."


class Around(NamedTuple):
    """What an energy does around the data, and what its derivatives tell of that.

    Attributes:
        curvature: The mean squared curvature.
        flat: The mean square of what second derivatives lack of it, and its error.
        slope: The mean size of the slope along every coordinate.
        jumps: What first derivatives lack of the mean slope, and its error.
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
    rows = rows_of_batch(bound, bound.energies(params), params, MAX_ROWS)
    for name, values in rows.items():
        if len(values) < 2:
            continue
        found = _around(bound, params, name, values, rng_key)

        text = _what_is_rough(found)
        if text:
            yield Finding(f"Energy site '{name}': {text}")


def _what_is_rough(found: Around) -> str:
    """What derivatives do not show; nothing where they tell all."""
    if found.infinite > 0:
        return (
            "the energy is infinite next to the data. At such a wall the density ends "
            "without vanishing, which score matching does not see: what was fitted is "
            f"wrong. Take a base with that end. {REMEDY}"
        )

    if bool(jnp.any(_is_lacking(found.jumps, found.slope, MAX_SHARE))):
        return (
            "the energy jumps around the data. Its derivatives do not tell, so what "
            f"score matching fitted is wrong. {REMEDY}"
        )

    if bool(_is_lacking(found.flat, found.curvature, MAX_SHARE**2)):
        whole, lacking = found.curvature**0.5, found.flat[0] ** 0.5
        return (
            f"around the data the energy curves by {whole:.2f}, and its second "
            f"derivatives lack {lacking:.2f} of that (root mean squares), which is at "
            "kinks, as of relu or abs, which score matching does not see: what was "
            "fitted is wrong. Take swish, softplus or tanh, method='denoising', or "
            "another backend."
        )
    return ""


def _is_lacking(found: tuple[Array, Array], whole: Array, share: float) -> Array:
    lacking, error = found
    return jnp.abs(lacking) > jnp.maximum(NUM_ERRORS * error, share * whole)


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

    # Of each row in two halves, whose noise is not the same: their product has the mean
    # of a square.  Signs of kinks, which would cancel between rows, do not matter.
    found = lax.map(at, random.split(rng_key, NUM_DRAWS))
    whole, lacking, slope, jump, infinite = found
    curvature, flat_part = (_squares(*jnp.split(p, 2)) for p in (whole, lacking))

    def with_error(each: Array) -> tuple[Array, Array]:
        error = jnp.std(each, axis=0, ddof=1) / math.sqrt(len(rows))
        return jnp.mean(each, axis=0), error

    return Around(
        jnp.mean(curvature),
        with_error(flat_part),
        jnp.mean(jnp.abs(slope), axis=(0, 1)),
        with_error(jnp.mean(jump, axis=0)),
        jnp.mean(infinite),
    )


def _squares(one: Array, other: Array) -> Array:
    """Of each row, from two halves of its draws."""
    return jnp.mean(one, axis=0) * jnp.mean(other, axis=0)
