"""A NumPyro model with energy sites as pure functions of unconstrained parameters.

The normaliser enters in one place: every energy site
is replaced by a copy of itself with a known ``log_normalizer``, so plates, subsampling,
scales, masks and priors keep NumPyro's meaning.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import Transform
from numpyro.infer.util import log_density

from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.model.handlers import EnergySites, KnownNormalizers, Normalize
from ebm_ppl.model.program import Model, Params, constrain
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.snapshot import snapshot


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["transforms", "rng_key", "arguments"],
    meta_fields=["model"],
)
@dataclass(frozen=True)
class BoundModel:
    """A model, its data and a random key, as functions of unconstrained parameters.

    The key serves subsampling.  Handlers that surround a call do not reach the model.
    """

    model: Model
    transforms: dict[str, Transform]
    rng_key: Array
    arguments: Arguments

    def __post_init__(self) -> None:
        # Executables are cached by model; a changed closure needs a new executable.
        object.__setattr__(self, "model", snapshot(self.model))

    def constrain(self, params: Params) -> Params:
        """Values at the model's ``param`` and unobserved sample sites."""
        return constrain(self.transforms, params)

    def energies(
        self, params: Params, moved: str | None = None
    ) -> dict[str, EnergyDistribution]:
        """The energy distributions at these parameters, by site name.

        ``moved`` names a site whose value is replaced by random points.
        """
        recorder = EnergySites(
            handlers.seed(self.model, self.rng_key), moved, self.rng_key
        )
        with handlers.block():
            handlers.substitute(recorder, data=self.constrain(params))(
                *self.arguments.args, **self.arguments.kwargs
            )
        return recorder.found

    def negative_log_joint(self, params: Params, normalize: Normalize) -> Array:
        """NumPyro's negative log joint (scales, masks) with the given normalisers.

        Sample sites among the parameters contribute their prior density at the
        constrained value, without a Jacobian, as in ``AutoDelta``.
        """
        model = KnownNormalizers(handlers.seed(self.model, self.rng_key), normalize)
        args, kwargs = self.arguments.args, self.arguments.kwargs
        with handlers.block():
            log_joint, _ = log_density(model, args, kwargs, self.constrain(params))
        return -log_joint
