"""log Z by draws of the base for one of many looks at a run."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import (
    LogNormalizer,
    SiteCertificate,
    flag_where,
)
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.by_base import NUM_DRAWS, certify_by_base, first_of
from ebm_ppl.normalizer.flags import worst_of
from ebm_ppl.normalizer.rows import data_rows, share_beyond_draws

NUM_CHAINS = 16
# Largest standard error of a log Z at which a look counts, and distance of its limits, in
# nats.
MAX_ERROR = 0.1
TOLERANCE = 2.0
# Nats over log Z that a bound may leave open without a look at the rows.
ROOM = 1.0
MAX_ROWS = 1024


class Base:
    """What every look at one set of rows has in common.

    Args:
        bound: The model and the rows, of constrained parameters.
        options: ``num_chains``, ``num_walkers`` and ``tolerance`` of
            :func:`log_normalizer`.
    """

    def __init__(self, bound: BoundModel, options: Mapping[str, Any]) -> None:
        self.bound = bound
        self.num_chains = options.get("num_chains", NUM_CHAINS)
        self.num_draws = options.get("num_walkers", NUM_DRAWS)
        self.tolerance = options.get("tolerance", TOLERANCE)
        self.rows: dict[str, Array] | None = None

    def log_normalizer(
        self, params: Params, energies: Mapping[str, EnergyDistribution]
    ) -> LogNormalizer:
        """With flags where limits, error or rows out of reach speak against it."""
        points = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
        found = certify_by_base(
            random.key(1),
            self.bound,
            energies,
            points,
            self.num_chains,
            self.num_draws,
            self.tolerance,
        )

        if self.rows is None:
            self.rows = data_rows(self.bound, params, MAX_ROWS)
        sites = {
            name: self._flagged(name, site, found.largest[name][0], params)
            for name, site in first_of(found.sites).items()
        }
        return LogNormalizer.from_sites(sites, "base", params=params)

    def _flagged(
        self, name: str, site: SiteCertificate, largest: Array, params: Params
    ) -> SiteCertificate:
        flags = flag_where(
            ~(site.stderr <= MAX_ERROR),
            f"log Z has a standard error of {worst_of(site.stderr):.2g} nats{{where}}, "
            f"over {MAX_ERROR}: take more draws (num_walkers=).",
        )
        assert self.rows is not None

        # Rows say more than the bound does only where that leaves much open.
        is_open = bool(jnp.any(~(site.upper - site.estimate <= ROOM)))
        if is_open and name in self.rows:
            rows = self.rows[name]
            num_draws = self.num_chains * self.num_draws
            share = share_beyond_draws(
                self.bound, params, name, rows, largest, site.estimate, num_draws
            )
            flags += flag_where(
                jnp.asarray(share > 0),
                f"{100 * share:.0f}% of the rows lie where no draw of the base has come: "
                "take a base that covers the data, a lower bound, or more draws "
                "(num_walkers=).",
            )
        return site._replace(flags=site.flags + flags)
