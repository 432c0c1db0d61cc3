"""Models whose log Z comes from a table, as a function of their parameters."""

from functools import wraps
from typing import Any

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.belongs import require_site
from ebm_ppl.normalizer.fixed_parameters import FixedParameters
from ebm_ppl.normalizer.substitutes import require_same_at_first_draw
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.programs.arguments import Arguments


def model_at_table(model: Model, table: TabulatedNormalizer) -> Model:
    """The model with log Z at its parameters' present values, the others fixed."""

    @wraps(model)
    def known(*args: Any, **kwargs: Any) -> Any:
        certificate = table.log_normalizer
        require_same_at_first_draw(model, certificate, Arguments(args, kwargs))
        return TabulatedNormalizers(model, table)(*args, **kwargs)

    return known


class TabulatedNormalizers(FixedParameters):
    """log Z at every energy site, by the values of the parameters that came before."""

    def __init__(self, fn: Model, table: TabulatedNormalizer) -> None:
        super().__init__(fn, self._at_present, table.params)
        self.table = table
        self.values: dict[str, Any] = {}

    def __enter__(self) -> "TabulatedNormalizers":
        self.values = {}
        return super().__enter__()

    def postprocess_message(self, msg: dict) -> None:
        """Called by NumPyro after every site."""
        super().postprocess_message(msg)
        if msg["type"] in ("param", "sample") and msg["name"] in self.table.grid:
            self.values[msg["name"]] = msg["value"]

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
