"""Whether second derivatives tell all of an energy's curvature."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from ebm_ppl.backends.score_matching.losses import in_coordinates, laplacian_of
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.training.findings import Finding

MAX_ROWS, NUM_DRAWS = 256, 32
# Standard deviation of the points around rows, in that of the rows.
REACH = 0.3
# Share of the curvature that derivatives may lack, and standard errors beyond noise.
MAX_SHARE, NUM_ERRORS = 0.03, 5.0


def kinks(bound: BoundModel, params: Params, rng_key: Array) -> Iterator[Finding]:
    r"""Where an energy curves at kinks, as nets of ReLUs do, which no derivative shows.

    Around a row, :math:`E[\epsilon\cdot\nabla U(x+\sigma\epsilon)]/\sigma` is the
    mean of the whole curvature (Stein's lemma), that of the second derivatives only
    what lies between kinks.
    """
    is_shared = not any(e.batch_shape for e in bound.energies(params).values())
    rows = data_rows(bound, params, MAX_ROWS, full_plates=is_shared)
    for name, values in rows.items():
        if len(values) < 2:
            continue
        whole, lacking, error = (
            float(value) for value in _curvature(bound, params, name, values, rng_key)
        )
        if abs(lacking) > max(NUM_ERRORS * error, MAX_SHARE * abs(whole)):
            yield Finding(
                f"Energy site '{name}': around the data the energy curves by {whole:.2f}, "
                f"and its second derivatives tell {abs(whole - lacking):.2f}. The rest is "
                "at kinks, as of relu or abs, which score matching does not see: what was "
                "fitted is wrong. Take a smooth activation (swish, softplus, tanh), "
                "method='denoising', or another backend."
            )


@partial(jax.jit, static_argnames="name")
def _curvature(
    bound: BoundModel, params: Params, name: str, rows: Array, rng_key: Array
) -> tuple[Array, Array, Array]:
    """The mean curvature, what second derivatives lack of it, and that one's error."""
    energy = bound.energies(params)[name]
    pull_back, gradient = in_coordinates(energy)
    position = pull_back(rows)
    scale = REACH * jnp.std(position, axis=0)
    scale = jnp.where(scale > 0, scale, REACH)

    def at(key: Array) -> tuple[Array, Array]:
        noise = random.normal(key, position.shape, position.dtype)
        ends = position + scale * noise, position - scale * noise
        slopes = [gradient(end) for end in ends]
        axes = tuple(range(1, position.ndim))
        whole = jnp.sum(noise * (slopes[0] - slopes[1]) / (2 * scale), axis=axes)
        told = sum(
            jnp.sum(laplacian_of(gradient, end, energy).reshape(len(rows), -1), 1)
            for end in ends
        )
        return whole, whole - 0.5 * told

    whole, lacking = lax.map(at, random.split(rng_key, NUM_DRAWS))
    # Draws around one row are not independent of it: rows are.
    each = jnp.mean(lacking, axis=0)
    error = jnp.std(each, ddof=1) / jnp.sqrt(len(rows))
    return jnp.mean(whole), jnp.mean(each), error
