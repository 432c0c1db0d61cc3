"""The battery's truths by brute force, in double precision (see hostile.py)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from numpyro.distributions.transforms import (
    ExpTransform,
    IdentityTransform,
    IndependentTransform,
    biject_to,
)

from ebm_ppl.energy.base_programs import unchecked_log_prob
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.programs.arguments import Arguments


def truth_by_sums(target):
    """log Z in double precision by brute force; NaN where that does not resolve it,
    None where it is not tried.

    All states, or a grid in the coordinates of the support's bijector, with which
    another grid has to agree.  No grid is made for more than two dimensions, nor for
    wells that it could miss.
    """
    if min(np.min(target.p.get(name, 1.0)) for name in ("scales", "widths")) < 0.05:
        return None
    with jax.enable_x64(True):

        def widen(tree):
            return {
                name: jnp.asarray(np.asarray(leaf, np.float64))
                for name, leaf in tree.items()
            }

        bound = BoundModel(
            target.model, {}, random.key(0), Arguments((widen(target.p),))
        )
        lead = target.options.get("batch_ndims", 0)
        if not lead:
            return _brute_force(bound.energies({})["x"])
        draws = {
            name: leaf.reshape(-1, *leaf.shape[lead:])
            for name, leaf in target.params.items()
        }
        at_draws = []
        for k in range(np.size(target.truth)):
            at_draws.append(
                _brute_force(
                    bound.energies(
                        widen({name: leaf[k] for name, leaf in draws.items()})
                    )["x"]
                )
            )
        return (
            None
            if at_draws[0] is None
            else np.reshape(at_draws, np.shape(target.truth))
        )


def _brute_force(site):
    if site.support.is_discrete:
        return _over_states(site)
    transform = biject_to(site.support)
    num_dims = int(
        np.prod(
            transform.inverse_shape((*site.batch_shape, *site.event_shape))[
                len(site.batch_shape) :
            ]
        )
    )
    if num_dims > 2:
        return None
    num_points = {1: 400_000, 2: 1_600}[num_dims]
    one, other = (
        _over_grid(site, transform, num_points, 1.0),
        _over_grid(site, transform, num_points // 7 * 5, 0.9),
    )
    return np.where(np.isclose(one, other, rtol=1e-6, atol=1e-6), one, np.nan)


def _over_states(site):
    element = site.base
    while isinstance(element, dist.Independent | dist.ExpandedDistribution):
        element = element.base_dist
    values = np.asarray(element.enumerate_support(expand=False)).ravel()
    values = np.array(list(itertools.product(values, repeat=site.event_shape[0])))
    values = jnp.asarray(
        values.reshape(-1, *(1,) * len(site.batch_shape), *site.event_shape)
    )
    values = jnp.broadcast_to(
        values, (len(values), *site.batch_shape, *site.event_shape)
    )
    return np.asarray(
        jax.nn.logsumexp(
            unchecked_log_prob(site.base, values) - site.energy(values), axis=0
        )
    )


def _over_grid(site, transform, num_points, share):
    batch = site.batch_shape
    event = transform.inverse_shape((*batch, *site.event_shape))[len(batch) :]
    num_dims = int(np.prod(event))
    inner = transform
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    is_line = isinstance(inner, IdentityTransform)

    if is_line and num_dims == 1:
        # Even in log |u|, on either side, as far as squares are numbers: poles at the
        # origin and tails alike.
        axis = share * np.linspace(-340.0, 340.0, num_points // 2)
        mesh, log_spread = (
            np.concatenate([-np.exp(axis), np.exp(axis)])[:, None],
            np.concatenate([axis, axis]),
        )
    else:
        # u = sinh t, as far as double precision tells points from the support's ends.
        low = 1e3 if is_line else 700.0 if num_dims == 1 else 30.0
        high = low if is_line or isinstance(inner, ExpTransform) else 30.0
        axis = np.linspace(
            -np.arcsinh(share * low), np.arcsinh(share * high), num_points
        )
        mesh = np.stack(np.meshgrid(*[axis] * num_dims, indexing="ij"), -1).reshape(
            -1, num_dims
        )
        log_spread, mesh = np.log(np.cosh(mesh)).sum(-1), np.sinh(mesh)

    position = jnp.broadcast_to(
        mesh.reshape(-1, *(1,) * len(batch), *event), (len(mesh), *batch, *event)
    )
    value = transform(position)
    log_det = transform.log_abs_det_jacobian(position, value)
    log_det = log_det.reshape(*position.shape[: 1 + len(batch)], -1).sum(-1)
    terms = unchecked_log_prob(site.base, value) - site.energy(value) + log_det
    terms = terms + log_spread.reshape(-1, *(1,) * len(batch))
    terms = jnp.where(jnp.isnan(terms), -jnp.inf, terms)
    return np.asarray(
        jax.nn.logsumexp(terms, axis=0) + num_dims * np.log(axis[1] - axis[0])
    )


def check(chosen):
    """Compare the truths with brute force where that is possible; return the number
    that differ."""
    num_different = 0
    for members in chosen.values():
        for target in members:
            if (
                not np.isfinite(target.truth).all()
                or (found := truth_by_sums(target)) is None
            ):
                continue
            off = np.max(
                np.abs(found - target.truth) / np.maximum(1.0, np.abs(target.truth))
            )
            num_different += off > 1e-5
            verdict = (
                "not resolved"
                if np.isnan(off)
                else f"{off:.1e}{'   <--- differs' if off > 1e-5 else ''}"
            )
            print(f"{target.name:<55} {verdict}", flush=True)
        jax.clear_caches()
    return num_different
