"""log Z as a smooth function of one or two parameters, certified on a grid."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.energy.log_normalizer import LogNormalizer, reasons_of, rounded
from ebm_ppl.errors import UncertifiedNormalizerError
from ebm_ppl.normalizer.chebyshev import Polynomial


@dataclass(frozen=True, eq=False)
class TabulatedNormalizer:
    """log Z of every energy site over a range of parameters.

    It is made by :func:`tabulate_log_normalizer`, and taken by :func:`normalized`.

    Attributes:
        grid: Values of each parameter, ascending.
        log_normalizer: At every point of the grid (its draws' axis, the last parameter
            fastest) and at those between that were held out, with flags.
        error: By site, how far the function's shape may be off, in nats of one log Z.
        counts: By site, how often log Z enters the likelihood of the data that were
            given; 1 without data.
        flags: By site, why the values may be wrong.
        params: The model's other parameters, which are fixed.
        tolerance: Largest error of the likelihood, in nats, that is certified.
    """

    grid: dict[str, np.ndarray]
    log_normalizer: LogNormalizer
    error: dict[str, float]
    counts: dict[str, float]
    flags: dict[str, tuple[str, ...]]
    params: dict[str, Any] = field(repr=False)
    transforms: dict[str, Transform] = field(repr=False)
    polynomials: dict[str, Polynomial] = field(repr=False)
    tolerance: float

    def __call__(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """Log Z by site at constrained values; NaN outside of the grid.

        It is differentiable, and may be traced.
        """
        positions, inside = [], jnp.array(True)
        for name, values in self.grid.items():
            value = jnp.asarray(params[name], float)
            low, high = self.transforms[name].inv(jnp.asarray(values[[0, -1]], float))
            # A point of the edge itself is inside.
            slack = 1e-6 * (high - low)
            position = self.transforms[name].inv(value)
            inside &= (position >= low - slack) & (position <= high + slack)
            positions.append(2.0 * (position - low) / (high - low) - 1.0)

        point = jnp.where(inside, jnp.stack(positions), jnp.nan)
        return {name: found(point) for name, found in self.polynomials.items()}

    @property
    def is_certified(self) -> bool:
        """Whether no site has a flag."""
        return not any(self.flags.values())

    def require_certified(self) -> None:
        """Raise where a site has a flag.

        Raises:
            UncertifiedNormalizerError: The message holds every flag.
        """
        if not self.is_certified:
            raise UncertifiedNormalizerError(
                f"The table of log Z is not certified: {reasons_of(self.flags)} To use it "
                "all the same, give allow_uncertified=True."
            )

    def __str__(self) -> str:
        """A line per site, and one per flag."""
        ranges = ", ".join(
            f"{name} from {values[0]:.4g} to {values[-1]:.4g} ({len(values)} values)"
            for name, values in self.grid.items()
        )
        lines = [f"log Z over {ranges}"]
        for name, flags in self.flags.items():
            values = self.log_normalizer.estimate[name]
            verdict = "NOT certified" if flags else "certified"
            lines.append(
                f"{name}: from {rounded(np.min(values))} to {rounded(np.max(values))}, "
                f"off by at most {self.error[name]:.2g} between ({self.counts[name]:g} "
                f"times in the likelihood): {verdict}"
            )
            lines += [f"  - {flag}" for flag in flags]
        return "\n".join(lines)
