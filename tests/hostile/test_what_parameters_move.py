"""A parameter that moves an edge, of the support or of the energy, is refused: its
gradient lacks the edge, and a fit would end anywhere with every diagnostic in order."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.programs.arguments import Arguments

pytestmark = pytest.mark.xdist_group("moving")

ROWS = np.random.default_rng(0).uniform(0.05, 1.95, size=50).astype(np.float32)


def model_of(energy, base=lambda c: dist.Normal(0.0, 1.0)):
    def model(x):
        c = numpyro.param("c", 0.7)
        width = numpyro.param("width", 0.3)
        with numpyro.plate("rows", len(x)):
            site = ebm.EnergyDistribution(lambda v: energy(c, v) + width * v, base(c))
            numpyro.sample("x", site, obs=x)

    return model


def inspect(model, rows=ROWS):
    return inspect_model(random.key(0), model, Arguments((rows,), {}))


SUPPORTS = {
    "uniform": lambda c: dist.Uniform(0.0, 2.0 + c),
    "far from its draws": lambda c: dist.TruncatedNormal(0.0, 1.0, low=-30.0 - c),
    "improper": lambda c: dist.ImproperUniform(
        constraints.interval(0.0, 2.0 + c), (), ()
    ),
    "shifted": lambda c: dist.TransformedDistribution(
        dist.Exponential(1.0),
        dist.transforms.AffineTransform(-1.0 - c, 1.0, domain=constraints.positive),
    ),
}


@pytest.mark.parametrize("base", SUPPORTS)
def test_a_support_that_moves_is_refused(base):
    model = model_of(lambda c, v: 0.3 * v, SUPPORTS[base])
    if base == "improper":
        model = model_of_start(SUPPORTS[base])
    with pytest.raises(ValueError, match="site 'x' changes with the parameters"):
        inspect(model)


def model_of_start(base):
    def model(x):
        c = numpyro.param("c", 0.7)
        start = dist.Uniform(0.0, 2.0 + c)
        with numpyro.plate("rows", len(x)):
            site = ebm.EnergyDistribution(lambda v: 0.3 * v, base(c), start=start)
            numpyro.sample("x", site, obs=x)

    return model


JUMPS = {
    "step": lambda c, v: jnp.where(v > c, 0.0, 2.0),
    "step beside a slope": lambda c, v: jnp.where(v > c, 0.0, 2.0) + c * v,
    "rounded": lambda c, v: jnp.round(3 * c * v),
    "floor": lambda c, v: 0.5 * jnp.floor(v + c),
    "stopped": lambda c, v: 0.5 * lax.stop_gradient(c) * v**2,
    "stopped in part": lambda c, v: c * v + lax.stop_gradient(jnp.exp(c)) * v**2,
    "wall": lambda c, v: jnp.where(v > -c, 0.0, jnp.inf),
    "sign": lambda c, v: jnp.sign(v - c) * v,
}


@pytest.mark.parametrize("energy", JUMPS)
def test_a_jump_that_a_parameter_moves_is_refused(energy):
    rows = np.abs(ROWS)
    with pytest.raises(ValueError, match=r"site 'x' jumps at points that 'c' moves"):
        inspect(model_of(JUMPS[energy]), rows)


SMOOTH = {
    "quadratic": lambda c, v: 0.5 * c**2 * v**2,
    "kink": lambda c, v: jnp.abs(v - c),
    "rectified": lambda c, v: jax.nn.relu(c * v - 0.2),
    "a jump that stands": lambda c, v: jnp.where(v > 0.3, 0.0, 2.0) + c * v,
    "a wall that stands": lambda c, v: jnp.where(v > -1.0, c * v, jnp.inf),
    "steep": lambda c, v: 2 * jax.nn.sigmoid((v - c) / 0.02),
    "waves": lambda c, v: jnp.cos(40 * c * v),
    "growing": lambda c, v: 0.01 * jnp.exp(2 * c * jnp.abs(v)),
    "root": lambda c, v: jnp.sqrt(jnp.abs(v - c) + 1e-3),
    "large": lambda c, v: 1e4 * (v - c) ** 2,
    "without effect": lambda c, v: 0.0 * c * v,
    "pole": lambda c, v: 0.3 * jnp.log(jnp.abs(v - c) + 1e-6),
}


@pytest.mark.parametrize("energy", SMOOTH)
def test_energies_whose_derivative_is_theirs_pass(energy):
    assert set(inspect(model_of(SMOOTH[energy])).params) == {"c", "width"}


def test_the_fit_and_the_score_test_refuse():
    """Both stood still at c = −0.5, where the maximum is 0.5, and found nothing."""
    model = model_of(JUMPS["step"])
    with pytest.raises(ValueError, match="its derivative lacks the jump"):
        ebm.Jarzynski(model, optax.adam(1e-2)).init(random.key(0), ROWS)
    params = {"c": jnp.array(-0.5), "width": jnp.array(0.0)}
    with pytest.raises(ValueError, match="its derivative lacks the jump"):
        ebm.score_test(random.key(0), params, model, ROWS)
