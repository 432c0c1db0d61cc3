"""The state of the Jarzynski backend."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.jarzynski.clock import Clock
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.model.program import Params, constrain
from ebm_ppl.normalizer.certify import certify
from ebm_ppl.normalizer.findings import Findings
from ebm_ppl.training.state import Population, State
from ebm_ppl.walkers.state import Walkers


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "params",
        "transforms",
        "optim_state",
        "walkers",
        "update_scale",
        "clock",
        "rng_key",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class JarzynskiState(State):
    """Everything that the next update needs.

    Attributes:
        params: Unconstrained parameters by site name; see ``get_params`` for their
            values.
        transforms: Unconstrained to constrained, by site name.
        optim_state: The optax state.
        walkers: One :class:`Walkers` per energy site.
        update_scale: Factor on the optimiser's update, in (0, 1]; see ``ess_target``.
        clock: When islands are renewed; None where they never are.
        rng_key: The key of the next update.
    """

    params: Params
    transforms: dict[str, Transform]
    optim_state: Any
    walkers: dict[str, Walkers]
    update_scale: Array
    clock: Clock | None
    rng_key: Array

    def constrained_params(self) -> Params:
        """Values at the model's ``param`` and unobserved sample sites."""
        return constrain(self.transforms, self.params)

    def layout(self) -> dict[str, int]:
        """How many islands are held out."""
        held_out = {site.num_holdout_chains for site in self.walkers.values()}
        return {"num_holdout_chains": held_out.pop()}

    def populations(
        self,
        rng_key: Array,
        energies: Mapping[str, EnergyDistribution],
        given: Container[str] = (),
    ) -> dict[str, Population]:
        """The walkers, which carry weights."""
        return {
            name: Population(
                site.values, "walkers", site.log_weight, ~site.is_training()
            )
            for name, site in self.walkers.items()
        }

    def running_log_normalizer(self) -> LogNormalizer:
        """See :meth:`log_normalizer`."""
        return self.log_normalizer()

    def log_normalizer(self, tolerance: float = 1.0) -> LogNormalizer:
        """The running log Z of the held-out islands, for monitoring a run.

        The estimate is unbiased at any time, but its variance grows with the run.  A
        flag is set where the 95% interval is wider than ``tolerance`` (nats);
        :meth:`Jarzynski.refresh` re-anchors the estimate.  It is never certified: a
        mode of the data that no walker has found would go unnoticed.
        :func:`ebm_ppl.log_normalizer` checks for that.
        """
        remedy = (
            "re-anchor it with Jarzynski.refresh(...), or estimate it afresh with "
            "ebm_ppl.log_normalizer(...)"
        )
        sites = {
            name: certify(Findings(w.held_out()), tolerance, remedy, is_running=True)
            for name, w in self.walkers.items()
        }

        unchecked = (
            "the running value is not held against the data, nor bounded from above: "
            "use ebm_ppl.log_normalizer."
        )
        sites = {
            name: site._replace(flags=(*site.flags, unchecked))
            for name, site in sites.items()
        }

        return LogNormalizer.from_sites(
            sites, "held-out islands", params=self.constrained_params()
        )


def _without_ensembles(state: JarzynskiState) -> JarzynskiState:
    """The same state without its walkers, which are large."""
    return replace(
        state,
        walkers={
            name: replace(w, ensemble=None)  # type: ignore[arg-type]
            for name, w in state.walkers.items()
        },
    )


def new_or_old(
    is_new: Array, new: JarzynskiState, old: JarzynskiState
) -> JarzynskiState:
    """The new state or the old one; the ensembles of ``new`` are selected already."""
    chosen = jax.tree.map(
        partial(jnp.where, is_new), _without_ensembles(new), _without_ensembles(old)
    )
    walkers = {
        name: replace(w, ensemble=new.walkers[name].ensemble)
        for name, w in chosen.walkers.items()
    }
    return replace(chosen, walkers=walkers)
