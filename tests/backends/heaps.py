"""Two heaps at ±3 over N(0, 3²), of which only the upper one's odds are learned."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import ebm_ppl as ebm

BASE = dist.Normal(0.0, 3.0).expand([1]).to_event(1)
LOG_ODDS = np.log(3.0 / 7.0)


def rows(num_rows, upper_share):
    """Data, the upper heap's first."""
    is_up = np.arange(num_rows)[:, None] < upper_share * num_rows
    noise = 0.5 * np.random.default_rng(1).normal(size=(num_rows, 1))
    return (np.where(is_up, 3.0, -3.0) + noise).astype(np.float32)


def model(x):
    """log Z = log (1 + exp(h)) − log 6, and its derivative is the upper heap's mass."""
    h = numpyro.param("h", LOG_ODDS)

    def energy(v):
        up, down = (-2.0 * jnp.sum((v - at) ** 2, -1) for at in (3.0, -3.0))
        return -jnp.logaddexp(h + up, down) - jnp.sum(v**2, -1) / 18.0

    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, BASE), obs=x)


def lower():
    """A generator that is the lower heap."""
    width = numpyro.param("width", 0.4)
    z = numpyro.sample("z", dist.Normal(0, 1).expand([1]).to_event(1))
    numpyro.sample("x", dist.Normal(-3.0 + width * z, 0.3).to_event(1))


def lower_flow():
    """The same without latents."""
    width = numpyro.param("width", 0.4)
    numpyro.sample("x", dist.Normal(-3.0, width + 0.1).expand([1]).to_event(1))
