"""What annealing finds out about log Z at one site."""

from typing import NamedTuple

from jax import Array
from jax.typing import ArrayLike

from ebm_ppl.smc.passes import Pass


class Bridge(NamedTuple):
    """Annealing from reference parameters to parameter draws.

    Every array's leading axis is that of the draws.

    Attributes:
        log_ratios: Every island's log Ẑ_θ/Z_reference, ``(num_draws, num_chains,
            *batch)``.
        ess: ESS fraction of the terms, ``(num_draws, *batch)``.
        khat: Pareto k̂ of the terms, same shape.
        acceptance: Mean acceptance, same shape.
        level: Constant subtracted from the difference of the energies before summation,
            same shape.
    """

    log_ratios: Array
    ess: Array
    khat: Array
    acceptance: Array
    level: Array


class Findings(NamedTuple):
    """Input of :func:`certify` for one energy site.

    Attributes:
        forward: Annealing from the start to the energy, if it was run.
        reverse: Annealing from the energy to the start, if it was run.
        drift: Changes in every island while the reverse pass's starting points moved
            under the energy itself, ``(num_chains, num_statistics, *batch)``: those of
            mean ``|u|²`` and ``|u|``, then those of the shares of walkers in tails.
        unreached: Share of data rows that forward annealing does not reach, confirmed
            by repeats, ``batch``.
        beyond: Share of the density beyond the range of floating point, ``batch``.
        reference: Constant subtracted from the energy before summation, ``batch``.
        magnitude: Absolute size of the energy's values, which sets their rounding
            error, ``batch``.
        room: The dimension minus the nats that U falls per e-fold of distance to its
            lowest points, ``batch``: the mass within r of such a point scales as r to
            this power.
        normalization: Log of what the start's density integrates to in this precision,
            ``batch``.
    """

    forward: Pass | None = None
    reverse: Pass | None = None
    drift: Array | None = None
    unreached: Array | None = None
    beyond: Array | None = None
    reference: Array | None = None
    magnitude: Array | None = None
    room: Array | None = None
    normalization: ArrayLike | None = None
