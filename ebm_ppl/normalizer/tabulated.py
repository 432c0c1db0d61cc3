"""Models whose log Z comes from a table, as a function of their parameters."""

import math
from functools import wraps
from typing import Any

import jax
import numpy as np

from ebm_ppl.energy.distribution import EnergyDistribution, unwrap
from ebm_ppl.errors import UncertifiedNormalizerError, UnknownNormalizerError
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.belongs import require_site
from ebm_ppl.normalizer.fixed_parameters import FixedParameters
from ebm_ppl.normalizer.substitutes import require_same_at_marked_draw
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.programs.arguments import Arguments


def model_at_table(
    model: Model, table: TabulatedNormalizer, *, is_uncertified: bool = False
) -> Model:
    """The model with log Z at its parameters' present values, the others fixed.

    ``is_uncertified`` leaves out whether the table is good enough for the data.
    """

    @wraps(model)
    def known(*args: Any, **kwargs: Any) -> Any:
        certificate = table.log_normalizer
        require_same_at_marked_draw(model, certificate, Arguments(args, kwargs))
        return TabulatedNormalizers(model, table, is_uncertified)(*args, **kwargs)

    return known


class TabulatedNormalizers(FixedParameters):
    """log Z at every energy site, by the values of the parameters that came before."""

    def __init__(
        self, fn: Model, table: TabulatedNormalizer, is_uncertified: bool
    ) -> None:
        super().__init__(fn, self._at_present, table.params)
        self.table = table
        self.is_uncertified = is_uncertified
        self.values: dict[str, Any] = {}

    def __enter__(self) -> "TabulatedNormalizers":
        self.values = {}
        return super().__enter__()

    def process_message(self, msg: dict) -> None:
        """Called by NumPyro at every site."""
        if msg["type"] == "sample" and not self.is_uncertified:
            self._require_as_few_rows(msg)
        super().process_message(msg)

    def _require_as_few_rows(self, msg: dict) -> None:
        """Refuse so many rows that the table's error, times their number, matters."""
        name, energy, scale = msg["name"], unwrap(msg["fn"]), msg["scale"]
        if energy is None or name not in self.table.error:
            return
        if isinstance(scale, jax.core.Tracer):
            return
        size = math.prod(msg["fn"].shape()) / math.prod(energy.event_shape)
        count = size * float(np.max(1.0 if scale is None else scale))
        off = count * self.table.error[name]
        if count > 1.001 * self.table.counts[name] and off > self.table.tolerance:
            raise UncertifiedNormalizerError(
                f"The table of log Z was judged for {self.table.counts[name]:g} rows of "
                f"site '{name}', and here are {count:g}: its error of "
                f"{self.table.error[name]:.2g} is then one of {off:.2g} nats of the "
                f"likelihood, over its tolerance of {self.table.tolerance:g}. Tabulate "
                "with these data, or give allow_uncertified=True."
            )

    def postprocess_message(self, msg: dict) -> None:
        """Called by NumPyro after every site."""
        super().postprocess_message(msg)
        if msg["type"] in ("param", "sample"):
            # handlers.do draws the site all the same, and then sets one of this suffix.
            name = msg["name"].removesuffix("__CF")
            if name in self.table.grid:
                self.values[name] = msg["value"]

    def _at_present(
        self, name: str, distribution: EnergyDistribution
    ) -> EnergyDistribution:
        require_site(self.table.log_normalizer, name)
        missing = sorted(set(self.table.grid) - set(self.values))
        if missing:
            raise UnknownNormalizerError(
                f"Energy site '{name}' has a log Z that is tabulated over {missing}, which "
                "have no value yet where it is sampled: this is another model than the "
                "table's, or they are declared after the energy."
            )

        estimate = self.table(self.values)[name]
        if estimate.shape != distribution.batch_shape:
            raise ValueError(
                f"The table has log Z of shape {estimate.shape} at energy site '{name}', "
                f"whose batch shape is now {distribution.batch_shape}; tabulate it for the "
                "same arguments."
            )
        return distribution.with_log_normalizer(sum(self.doubts, estimate))
