"""Options of ``log_normalizer``, and the plan that they make."""

from collections.abc import Mapping

from ebm_ppl.kernels.base import Kernel
from ebm_ppl.kernels.langevin import MALA
from ebm_ppl.normalizer.passes import Plan
from ebm_ppl.smc.annealing import AnnealingOptions
from ebm_ppl.smc.resampling import systematic

EXACT = ("quadrature", "enumeration")
METHODS = ("bracket", "forward", "reverse", "base", *EXACT)

# Moves under the energy itself, which separate resampled copies and reveal a drift.
NUM_SETTLING_MOVES = 1024


def check_options(
    method: str,
    num_chains: int,
    counts: Mapping[str, int | None],
    budget: int | None,
    batch_ndims: int,
) -> None:
    """Refuse options that cannot work.

    Raises:
        ValueError: The message names the option, and what it may be.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}.")
    if num_chains < 2:
        raise ValueError(
            f"num_chains = {num_chains}; expected at least 2 for a standard error."
        )
    for option, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} = {value}; expected at least 1.")

    if budget is not None and counts["num_temperatures"] is not None:
        raise ValueError(
            "Both budget and num_temperatures are given; expected one of them."
        )
    if method == "base" and (
        budget is not None or counts["num_temperatures"] is not None
    ):
        raise ValueError(
            "method = 'base' takes num_chains * num_walkers draws of the base, and no "
            "budget or num_temperatures."
        )
    if batch_ndims and method == "reverse":
        raise ValueError(
            "method = 'reverse' with batch_ndims: bridges start from forward walkers; "
            "use 'bracket'."
        )


def plan_of(
    method: str,
    kernel: Kernel | None,
    num_chains: int,
    num_walkers: int,
    num_temperatures: int | None,
    num_kernel_steps: int,
    budget: int | None,
    num_sites: int,
) -> Plan:
    """Settings of the annealing, within the budget.

    Raises:
        ValueError: The budget does not pay for two temperatures.
    """
    num_settling_moves = NUM_SETTLING_MOVES
    if budget is not None:
        num_moves = budget // (num_chains * num_walkers * num_sites)
        num_temperatures, num_settling_moves = _spread(
            num_moves, method, num_kernel_steps
        )
        if num_temperatures < 2:
            raise ValueError(
                f"budget = {budget} pays for {num_temperatures} temperatures of "
                f"{num_chains} x {num_walkers} walkers; expected at least 2. Spend "
                "more, or take fewer walkers."
            )

    return Plan(
        method,
        MALA() if kernel is None else kernel,
        AnnealingOptions(num_kernel_steps, ess_threshold=0.5, resampling=systematic),
        num_chains,
        num_walkers,
        num_temperatures,
        num_settling_moves,
        may_settle_longer=budget is None,
    )


def _spread(num_moves: int, method: str, num_kernel_steps: int) -> tuple[int, int]:
    """Split a walker's moves into temperatures per pass and settling moves.

    There are no more settling moves than temperatures.
    """
    if method == "forward":
        return num_moves // num_kernel_steps, 0
    num_temperatures = num_moves // (2 * num_kernel_steps + 1)
    if num_temperatures > NUM_SETTLING_MOVES:
        num_temperatures = (num_moves - NUM_SETTLING_MOVES) // (2 * num_kernel_steps)
    return num_temperatures, min(num_temperatures, NUM_SETTLING_MOVES)
