"""Validation of the Jarzynski backend's options."""

import warnings
from typing import Any

from ebm_ppl.errors import level_of_caller
from ebm_ppl.training.optimizers import check_optimizer


def check_options(backend: Any) -> None:
    """Check the options of a :class:`Jarzynski`.

    Raises:
        ValueError: The message names the option, and what it may be.
        TypeError: ``optim`` is not an optax gradient transformation.
    """
    check_optimizer("optim", backend.optim)
    for option in ("num_walkers", "num_kernel_steps"):
        if getattr(backend, option) < 1:
            raise ValueError(
                f"{option} = {getattr(backend, option)}; expected at least 1."
            )

    if not 0 < backend.moved_share <= 1:
        raise ValueError(
            f"moved_share = {backend.moved_share}; expected a share in (0, 1]."
        )

    if backend.num_holdout_chains < 2:
        raise ValueError(
            f"num_holdout_chains = {backend.num_holdout_chains}; expected at least 2: "
            "without two independent islands log Z has no standard error. Take 4 of "
            "the default 16."
        )

    if backend.num_chains <= backend.num_holdout_chains:
        raise ValueError(
            f"num_chains = {backend.num_chains} with num_holdout_chains = "
            f"{backend.num_holdout_chains} leaves no island to train on; expected "
            "num_chains > num_holdout_chains, such as "
            f"{4 * backend.num_holdout_chains}."
        )

    if backend.num_holdout_chains < 4:
        warnings.warn(
            f"num_holdout_chains = {backend.num_holdout_chains}: under 4 islands the "
            "standard error of log Z is itself very uncertain.",
            stacklevel=level_of_caller(),
        )

    if backend.ess_target is not None and not 0 < backend.ess_target < 1:
        raise ValueError(
            f"ess_target = {backend.ess_target}; expected a fraction in (0, 1), or "
            "None for no control."
        )

    if backend.renew_every is not None and backend.renew_every < 1:
        raise ValueError(
            f"renew_every = {backend.renew_every}; expected at least 1 update, or None "
            "for walkers that are never renewed."
        )

    if not 0 <= backend.ess_threshold <= 1:
        raise ValueError(
            f"ess_threshold = {backend.ess_threshold}; expected a fraction in [0, 1]."
        )
