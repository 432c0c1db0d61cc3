"""Places where the score is zero and the likelihood has no maximum all the same."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ebm_ppl.normalizer.likelihood import LikelihoodSurface
from ebm_ppl.normalizer.newton import Maximum, groups_of

# Parameters up to which the curvature is looked at: it costs a derivative of each.
MAX_PARAMETERS = 100
# Curvature, in units of its own diagonal, under which the likelihood curves up: Monte
# Carlo error alone gives some hundredths.
MIN_CURVATURE = -0.2
# In nats over a parameter's unit: less than that is flat.
FLAT = 1e-2


def saddles(surface: LikelihoodSurface, maximum: Maximum) -> tuple[str, ...]:
    """A flag where the log likelihood curves up at the end of the Newton steps.

    Those know the Fisher information alone, which is never negative: at a minimum or a
    saddle, as a net or a Boltzmann machine whose weights begin at 0, the score is 0 too.
    """
    if surface.is_net or len(maximum.step) > MAX_PARAMETERS:
        return ()
    step = jnp.asarray(maximum.step, surface.directions.dtype)
    curvature = np.asarray(_curvature(surface, step), float)
    if not np.all(np.isfinite(curvature)):
        return ()

    scale = np.sqrt(np.maximum(np.abs(np.diag(curvature)), FLAT))
    values, vectors = np.linalg.eigh(curvature / np.outer(scale, scale))
    if values[0] >= MIN_CURVATURE:
        return ()
    worst = int(np.argmax(np.abs(vectors[:, 0])))
    site = next(
        name
        for name, place in groups_of(surface.params).items()
        if place.start <= worst < place.stop
    )
    return (
        f"not at a maximum: the likelihood curves up along parameter '{site}', so that "
        "this is a minimum or a saddle of it (or a symmetry of the model that no gradient "
        "breaks). Begin elsewhere: init_params, or other initial values.",
    )


@jax.jit
def _curvature(surface: LikelihoodSurface, step: Array) -> Array:
    """Second derivative of the negative log joint, ``(k, k)``."""
    return jax.hessian(surface.negative_log_joint)(step, surface.offsets())
