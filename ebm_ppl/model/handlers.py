"""Messengers that find, replace and refuse energy sites."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from ebm_ppl.energy.distribution import EnergyDistribution, unwrap
from ebm_ppl.energy.supports import points_in_support
from ebm_ppl.energy.wrappers import elementwise, innermost, path_to, rewrap
from ebm_ppl.model.program import Model
from ebm_ppl.programs.arguments import as_numbers

Normalize = Callable[[str, EnergyDistribution], dist.Distribution]
"""An energy site's name and its distribution to what stands for it in a joint density:
the same with a known normaliser, or a loss of its rows."""


def _is_sample(msg: dict) -> bool:
    """Whether a message is of a sample site; its data are converted to numeric arrays.

    Energies nested inside another distribution are refused.  Messages of
    ``subsample``, ``prng_key`` and control flow have no name.
    """
    if msg["type"] == "subsample":
        msg["value"] = as_numbers("numpyro.subsample", msg["value"])
    elif msg["type"] == "control_flow":
        # scan's body is its first argument; cond's branches follow the predicate.
        bodies = (1, 2) if msg["fn"].__name__ == "cond_wrapper" else (0,)
        msg["args"] = tuple(
            _NoEnergies(arg) if k in bodies else arg
            for k, arg in enumerate(msg["args"])
        )
    if msg["type"] != "sample":
        return False

    _refuse_nested(msg["name"], msg["fn"])
    if msg["is_observed"]:
        msg["value"] = as_numbers(f"site '{msg['name']}'", msg["value"])
    return True


class _NoEnergies(Messenger):
    """Refuse energies and parameters inside ``scan`` and ``cond``.

    Handlers outside a loop or branch do not reach the sites inside.
    """

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "param":
            raise ValueError(
                f"Parameter '{msg['name']}' is declared inside numpyro's scan or cond, "
                "where it would keep its initial value for ever. Declare it outside."
            )

        if msg["type"] != "sample":
            return
        _refuse_nested(msg["name"], msg["fn"])
        energy = unwrap(msg["fn"])
        if energy is not None and energy.log_normalizer is None:
            raise ValueError(
                f"Energy site '{msg['name']}' is inside numpyro's scan or cond, where "
                "its normaliser can't be given. Sample it outside: the whole series "
                "as one event with one energy (jax.lax.scan or cond inside the "
                "energy), or, for independent steps, in a plate."
            )


def _refuse_nested(name: str, fn: Any) -> None:
    """Refuse an energy without log Z inside another distribution.

    Handlers can neither find nor normalise it there.
    """
    energy = unwrap(fn)
    parts = (
        {"the site's distribution": fn}
        if energy is None
        else {"base": energy.base, "start": energy.start}
    )

    for part, found in parts.items():
        path = find_energy(found)
        if path is None:
            continue

        raise ValueError(
            f"Site '{name}' holds an energy with an unknown normaliser inside another "
            f"distribution ({part}: {' of '.join(reversed(path))}): nothing could find "
            f"or normalise it there. {_way_out_of(fn, energy)}"
        )


def _way_out_of(fn: dist.Distribution, energy: EnergyDistribution | None) -> str:
    """The remedy for an energy nested inside ``fn`` or inside another energy."""
    if energy is not None:
        return (
            "Add the energies up instead, on the inner one's own base: "
            "EnergyDistribution({'inner': ..., 'outer': ...}, base)."
        )
    if isinstance(innermost(fn), dist.TransformedDistribution):
        return (
            "Transform the base and undo it in the energy, which is the same density "
            "with the same log Z: EnergyDistribution(lambda y: "
            "energy(transform.inv(y)), dist.TransformedDistribution(base, transform))."
        )
    return (
        "Mixtures and other compounds need every component's normaliser. Write one "
        "energy of the whole on one base, such as -logsumexp(log_weights - energies), "
        "or give the component a known log_normalizer=."
    )


def find_energy(found: Any) -> list[str] | None:
    """Types from a distribution down to a nested energy without log Z, or ``None``."""
    return path_to(
        found,
        lambda part: (
            isinstance(part, EnergyDistribution) and part.log_normalizer is None
        ),
    )


class EnergySites(Messenger):
    """Record the energy distributions of a model, by site name.

    Args:
        fn: A model.
        moved: A site whose value, observed or not, is replaced by random points of its
            support; energies that change depend on it.
        rng_key: Key for these points.
    """

    def __init__(
        self, fn: Model, moved: str | None = None, rng_key: Array | None = None
    ) -> None:
        super().__init__(fn)
        self.found: dict[str, EnergyDistribution] = {}
        self.unobserved: list[str] = []
        self.moved = moved
        self.rng_key = rng_key
        self.is_plate: dict[str, bool] = {}

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        self._refuse_shared_name(msg)
        if not _is_sample(msg):
            return
        energy = unwrap(msg["fn"])
        if energy is None:
            return
        self.found[msg["name"]] = energy
        if msg["value"] is None:
            self.unobserved.append(msg["name"])
            msg["value"] = jnp.zeros(msg["fn"].shape())

        if msg["name"] == self.moved:
            assert self.rng_key is not None
            num = math.prod(msg["fn"].shape()) // max(
                1, math.prod(energy.batch_shape + energy.event_shape)
            )
            points = points_in_support(energy.base, self.rng_key, num)
            msg["value"] = points.reshape(msg["fn"].shape())

    def _refuse_shared_name(self, msg: dict) -> None:
        is_plate = msg["type"] == "plate"
        if not is_plate and msg["type"] not in ("sample", "param", "deterministic"):
            return
        if self.is_plate.setdefault(msg["name"], is_plate) != is_plate:
            raise ValueError(
                f"A plate and another site are both called '{msg['name']}': each would "
                "be given the other's value. Rename the plate."
            )


class KnownNormalizers(Messenger):
    """Replace every energy with unknown log Z by ``normalize(name, distribution)``."""

    def __init__(self, fn: Model, normalize: Normalize) -> None:
        super().__init__(fn)
        self.normalize = normalize

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if not _is_sample(msg):
            return
        energy = unwrap(msg["fn"])
        if energy is not None and energy.log_normalizer is None:
            known = self.normalize(msg["name"], energy)
            # On an unbounded support the check finds only NaN and infinity, which
            # make the loss non-finite anyway.
            if _is_unbounded(energy.support):
                known._validate_args = False
            msg["fn"] = rewrap(msg["fn"], known)


def _is_unbounded(support: constraints.Constraint) -> bool:
    return elementwise(support) is constraints.real


class WithoutPriors(Messenger):
    """Leave unobserved sample sites out of the density."""

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = msg["fn"].mask(False)
