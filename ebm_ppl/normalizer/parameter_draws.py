"""Draws of parameters with one leading axis, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ebm_ppl.energy.log_normalizer import LogNormalizer, SiteCertificate
from ebm_ppl.model.program import Params


def flatten_draws(
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


def draw_in_the_middle(draws: Params) -> Params:
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


def marked_draw(params: Params, batch_ndims: int) -> Params:
    """The draw whose energies tell whose log Z it is: the largest.

    At parameters of zero, where grids like to begin, many energies are one.
    """
    draws, _ = flatten_draws(params, batch_ndims)
    if draws is None:
        return params
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(draws)]
    sizes = sum(jnp.abs(leaf).reshape(len(leaf), -1).sum(1) for leaf in leaves)
    index = jnp.argmax(jnp.where(jnp.isfinite(sizes), sizes, -1.0))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], draws)


def collect(
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
