"""The package's own matrix products ask for all the bits of their operands."""

import traceback

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
from ebm_ppl.normalizer import likelihood

pytestmark = pytest.mark.xdist_group("precision")

RNG = np.random.default_rng(0)
TRIL = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
ROWS = (RNG.normal(size=(300, 2)) @ TRIL.T).astype(np.float32)
FULL = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def model(x):
    """Of two dimensions, with no matrix product of its own."""
    a = numpyro.param("a", jnp.ones(2), constraint=constraints.positive)
    base = dist.MultivariateNormal(jnp.zeros(2), scale_tril=jnp.asarray(TRIL))
    energy = ebm.EnergyDistribution(lambda v: jnp.sum(a * v**4, -1), base)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def generator():
    scale = numpyro.param("scale", 0.5, constraint=constraints.interval(0.01, 1.0))
    z = numpyro.sample("z", dist.Normal().expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(jnp.tanh(z), scale).to_event(1))


@pytest.fixture
def products(monkeypatch):
    """Precisions of the products traced so far that the package asks for, by place."""
    # What other tests traced would not be traced again.
    jax.clear_caches()
    found = {}
    bind = lax.dot_general_p.bind

    def recorded(*operands, **params):
        frames = [
            frame
            for frame in traceback.extract_stack()[:-1]
            if "/jax/" not in frame.filename
        ]
        caller = frames[-1]
        if "/ebm_ppl/" in caller.filename and "/tests/" not in caller.filename:
            place = f"{caller.filename.split('/ebm_ppl/')[-1]}:{caller.name}"
            found.setdefault(place, set()).add(params["precision"])
        return bind(*operands, **params)

    monkeypatch.setattr(lax.dot_general_p, "bind", recorded)
    return found


def jarzynski():
    backend = ebm.Jarzynski(model, optax.sgd(1e-4), num_walkers=8)
    fit = backend.run(random.key(0), 2, ROWS, progress_bar=False)
    ebm.log_normalizer(
        random.key(2),
        model,
        fit.params,
        ROWS,
        num_chains=4,
        num_walkers=8,
        progress_bar=False,
    )


def sums_of_the_score_test():
    short = likelihood._gram(jnp.asarray(ROWS))
    long = likelihood._gram(jnp.ones((40, likelihood.MAX_FORWARD + 1)))
    assert short.shape == (2, 2)
    assert long.shape == 2 * (likelihood.MAX_FORWARD + 1,)


def vera():
    for local in (True, False):
        optim = optax.adam(1e-3, b1=0.0)
        score = ebm.ImportanceScore(local=local)
        backend = ebm.VERA(model, generator, optim, optim, score=score)
        backend.run(random.key(0), 2, ROWS, progress_bar=False)


def quadrature():
    ebm.log_normalizer(None, model, {"a": np.ones(2)}, ROWS, method="quadrature")


def mixture():
    mixture = pytest.importorskip("sklearn.mixture").GaussianMixture(2).fit(ROWS)
    base = ebm.from_sklearn(mixture)
    base.sample(random.key(0), (4,))
    base.log_prob(ROWS)
    assert base.mean.shape == (2,)
    assert base.covariance_matrix.shape == (2, 2)


@pytest.mark.parametrize(
    ("program", "places"),
    [
        (jarzynski, ["coordinates.py:__call__", "drift.py", "reach.py"]),
        (sums_of_the_score_test, ["likelihood.py:_gram"]),
        (vera, ["proposals.py:local_proposals", "importance.py"]),
        (quadrature, ["judge.py:_mean"]),
        (mixture, ["mixture.py"]),
    ],
)
def test_own_products_are_at_full_precision(products, program, places):
    program()
    rounded = {place: of for place, of in products.items() if of != {FULL}}
    assert not rounded
    for place in places:
        assert any(place in found for found in products), products
