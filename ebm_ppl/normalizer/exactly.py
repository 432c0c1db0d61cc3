"""log Z by quadrature or enumeration, at one point and at draws."""

from collections.abc import Mapping

import jax
from jax import Array, lax

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import (
    SiteCertificate,
    exact_certificate,
    flags_of_exact,
)
from ebm_ppl.energy.pointwise import require_pointwise
from ebm_ppl.exact.enumeration import total
from ebm_ppl.exact.quadrature import integral
from ebm_ppl.exact.verdict import Exact
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params


def certify_exactly(
    method: str,
    bound: BoundModel,
    found: Mapping[str, EnergyDistribution],
    draws: Params | None,
    num_points: int | None,
    rows: Mapping[str, Array],
) -> dict[str, SiteCertificate]:
    """Certificates of every site, at one parameter value or at draws."""
    sites = {}
    for name, distribution in found.items():
        here = rows.get(name)
        exact = (
            exactly(method, name, distribution, num_points, here)
            if draws is None
            else exactly_at_draws(method, name, bound, draws, num_points, here)
        )
        sites[name] = exact_certificate(*exact)
    return sites


def exactly(
    method: str,
    name: str,
    distribution: EnergyDistribution,
    num_points: int | None,
    rows: Array | None,
) -> Exact:
    """Log Z by quadrature or enumeration, NaN where E is no function of one point."""
    exact = (
        integral(distribution, name, num_points, rows)
        if method == "quadrature"
        else total(distribution, name)
    )
    if isinstance(exact.estimate, jax.core.Tracer):
        exact = exact._replace(
            estimate=exact.estimate + require_pointwise(name, distribution)
        )
    return exact


def exactly_at_draws(
    method: str,
    name: str,
    bound: BoundModel,
    draws: Params,
    num_points: int | None,
    rows: Array | None,
) -> Exact:
    """One exact log Z per draw; NaN and a flag where it could not be computed."""

    @jax.jit
    def at_draws(
        bound: BoundModel, draws: Params, rows: Array | None
    ) -> tuple[Array, Array]:
        def at(params: Params) -> tuple[Array, Array]:
            found = exactly(
                method, name, bound.energies(params)[name], num_points, rows
            )
            return found.estimate, found.error

        return lax.map(at, draws)

    estimate, error = at_draws(bound, draws, rows)
    return Exact(estimate, error, flags_of_exact(estimate))
