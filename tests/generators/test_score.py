"""Scores of a linear generator, whose density is Gaussian: x = W z + σ ε is N(0, W Wᵀ +
σ² I)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from jax.flatten_util import ravel_pytree

from ebm_ppl.generators.scores.base import Pair
from ebm_ppl.generators.scores.hmc import HMCScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.orthogonal import orthonormalized
from ebm_ppl.generators.scores.variational import VariationalScore

pytestmark = pytest.mark.xdist_group("score")

W = jnp.array([[1.0, 0.3], [-0.5, 0.8], [0.2, -0.4]])
SIGMA = 0.3
PARAMS = {"weight": W, "sigma": jnp.array(SIGMA)}
COVARIANCE = np.asarray(W @ W.T + SIGMA**2 * jnp.eye(3))
SCORES = {
    "local": ImportanceScore(),
    "global": ImportanceScore(local=False),
    "hmc": HMCScore(),
    "variational": VariationalScore(),
}


def generate(noise, params):
    latents, errors = noise
    return latents @ params["weight"].T + params["sigma"] * errors


def log_prior(latents):
    return dist.Normal(0.0, 1.0).log_prob(latents).sum()


def log_joint(latents, value):
    return log_prior(latents) + dist.Normal(W @ latents, SIGMA).log_prob(value).sum()


def residuals(latents, value):
    return latents, (value - W @ latents) / SIGMA


def entropy(params):
    covariance = params["weight"] @ params["weight"].T + params["sigma"] ** 2 * jnp.eye(
        3
    )
    return 0.5 * jnp.linalg.slogdet(2 * jnp.pi * jnp.e * covariance)[1]


EXACT = jax.grad(entropy)(PARAMS)


def measured(score, num_steps=1_200, num_pairs=100):
    """Gradients of the entropy over ``num_steps`` evaluations, and errors of score and
    log density in the last."""

    def step(state, key):
        key_latents, key_errors, key_score = random.split(key, 3)
        noise = (
            random.normal(key_latents, (num_pairs, 2)),
            random.normal(key_errors, (num_pairs, 3)),
        )
        values, pull = jax.vjp(partial(generate, noise), PARAMS)
        found, state = score.evaluate(
            key_score, state, Pair(log_prior, log_joint, residuals), noise[0], values
        )
        (gradient,) = pull(-found.score / num_pairs)
        exact = dist.MultivariateNormal(jnp.zeros(3), COVARIANCE)
        score_error = found.score + values @ jnp.linalg.inv(COVARIANCE)
        return state, (
            gradient,
            score_error,
            found.log_density - exact.log_prob(values),
        )

    return jax.jit(partial(jax.lax.scan, step))(
        score.init(2), random.split(random.key(0), num_steps)
    )


@pytest.fixture(scope="module", params=SCORES)
def run(request):
    return request.param, measured(SCORES[request.param])


def test_the_entropy_gradient_over_a_hundred_thousand_draws(run):
    """Cosine over 0.99 with the closed form.  The paper's proposals miss it, which is
    why they are not the default."""
    name, (_, (gradients, _, _)) = run
    late = jax.tree.map(lambda leaf: leaf[200:], gradients)
    found, exact = (
        ravel_pytree(jax.tree.map(lambda leaf: leaf.mean(0), late))[0],
        ravel_pytree(EXACT)[0],
    )
    cosine = float(found @ exact / jnp.linalg.norm(found) / jnp.linalg.norm(exact))
    if name == "variational":
        assert 0.9 < cosine < 0.99
        return
    assert cosine > 0.99
    deviation = ravel_pytree(jax.tree.map(lambda leaf: leaf.std(0), late))[0] / np.sqrt(
        1_000
    )
    # Importance sampling is exact here but for the ridge; chains of ten transitions
    # still remember their start.
    slack = {"local": 0.0, "global": 0.005, "hmc": 0.03}[name] * jnp.linalg.norm(exact)
    assert np.all(np.abs(found - exact) < 5 * deviation + slack)


def test_local_proposals_are_the_posterior_of_a_linear_generator():
    """With one pair there are no others: all weights are equal, and the log density has
    no error at all."""
    _, (_, _, density_error) = measured(
        ImportanceScore(num_samples=3), num_steps=1, num_pairs=1
    )
    assert np.abs(density_error).max() < 1e-4
    state, _ = measured(ImportanceScore())
    assert state.inflation == pytest.approx(1.0, abs=0.03)


def test_global_proposals_become_the_posterior_of_a_linear_generator():
    state, (_, _, density_error) = measured(ImportanceScore(local=False))
    posterior = np.linalg.inv(np.eye(2) + np.asarray(W.T @ W) / SIGMA**2)
    np.testing.assert_allclose(state.covariance, posterior, rtol=0.05, atol=0.003)
    np.testing.assert_allclose(
        state.cross @ jnp.linalg.inv(state.gradient), posterior, rtol=0.05, atol=0.003
    )
    assert np.abs(density_error[-1]).mean() < 0.15


def test_blocks_of_pairs():
    """300 pairs are two blocks of 150; 257 is a prime."""
    _, (_, _, density_error) = measured(ImportanceScore(), num_steps=20, num_pairs=300)
    assert density_error.shape == (20, 300)
    assert abs(float(density_error.mean())) < 0.02
    with pytest.raises(
        ValueError, match=r"257 draws of the generator cannot be dealt.*such as 256"
    ):
        measured(ImportanceScore(), num_steps=1, num_pairs=257)


@pytest.mark.parametrize("local", [True, False])
def test_a_folded_generator(local):
    """x = |z| + σ ε: either sign of z may have made x, so that half of q is out of
    reach from the z that did.

    Mean errors of log q̂: none by the mixture with other pairs' latents; −log 2 by
    proposals around z alone.
    """
    sigma, grid = 0.1, jnp.linspace(-6, 6, 4_001)

    def residuals(latents, value):
        return latents, (value - jnp.abs(latents)) / sigma

    def log_joint(latents, value):
        return (
            log_prior(latents)
            + dist.Normal(jnp.abs(latents), sigma).log_prob(value).sum()
        )

    pair = Pair(log_prior, log_joint, residuals)
    latents = random.normal(random.key(0), (200, 1))
    values = jnp.abs(latents) + sigma * random.normal(random.key(1), (200, 1))
    joint = jax.vmap(lambda x: jax.vmap(lambda z: log_joint(z[None], x))(grid))(values)
    exact = jax.nn.logsumexp(joint, axis=1) + jnp.log(grid[1] - grid[0])

    def mean_error(score):
        def step(state, key):
            found, state = score.evaluate(key, state, pair, latents, values)
            return state, jnp.mean(found.log_density - exact)

        return float(
            jax.lax.scan(step, score.init(1), random.split(random.key(2), 400))[1][
                -100:
            ].mean()
        )

    assert abs(mean_error(ImportanceScore(local=local))) < 0.05
    assert mean_error(VariationalScore()) < -0.4


def log_density_alone(score, state):
    """log q̂ of 100 draws of the linear generator, with their latents and values."""
    pair, lent = (
        Pair(log_prior, log_joint, residuals),
        random.normal(random.key(1), (64, 2)),
    )
    latents, errors = (
        random.normal(random.key(2), (100, 2)),
        random.normal(random.key(3), (100, 3)),
    )
    values = latents @ W.T + SIGMA * errors
    one = partial(score.log_density, random.key(4), state, pair)
    return (
        jax.jit(jax.vmap(lambda z, x: one(z, x, lent)))(latents, values),
        latents,
        values,
    )


def test_the_log_density_alone(run):
    """Its error is that of 64 lent latents, which all values share."""
    name, (state, _) = run
    if name == "variational":
        assert not hasattr(SCORES[name], "log_density")
        return
    score, state = (
        (SCORES[name].density, state.density)
        if name == "hmc"
        else (SCORES[name], state)
    )
    found, _, values = log_density_alone(score, state)
    off = found - dist.MultivariateNormal(jnp.zeros(3), COVARIANCE).log_prob(values)
    assert abs(float(off.mean())) < 2 / np.sqrt(64)
    assert float(off.std()) < 2 / np.sqrt(64)


def test_the_latent_that_made_a_value_holds_its_log_density_up():
    """Also where all proposals miss: p(z) q(x | z) / q̂ ≤ K r(z) + (M + 1) p(z)."""
    blind = ImportanceScore(local=False, num_samples=1, init_scale=1e3)
    found, latents, values = log_density_alone(blind, blind.init(2))
    alone = (
        jax.vmap(log_joint)(latents, values)
        - jnp.log(65.0)
        - jax.vmap(log_prior)(latents)
    )
    assert np.all(found > alone - 1e-3)


def test_the_density_of_x_that_chains_in_latent_space_follow():
    """∫ p(z) q(x | z) / q̂(z, x) dz is 1 but for the noise of 64 lent latents, on
    either sheet of x = |z| + σ ε."""
    sigma, z, x = 0.1, jnp.linspace(-5, 5, 2_001), jnp.linspace(0.05, 2.5, 12)

    def residuals(latents, value):
        return latents, (value - jnp.abs(latents)) / sigma

    def log_joint(latents, value):
        return (
            log_prior(latents)
            + dist.Normal(jnp.abs(latents), sigma).log_prob(value).sum()
        )

    score, lent = ImportanceScore(), random.normal(random.key(1), (64, 1))
    one = partial(
        score.log_density,
        random.key(4),
        score.init(1),
        Pair(log_prior, log_joint, residuals),
    )
    log_ratio = jax.jit(
        jax.vmap(
            jax.vmap(
                lambda z, x: log_joint(z[None], x[None]) - one(z[None], x[None], lent),
                (0, None),
            ),
            (None, 0),
        )
    )(z, x)
    off = jax.nn.logsumexp(log_ratio, axis=1) + jnp.log(z[1] - z[0])
    assert abs(float(off.mean())) < 2 / np.sqrt(64)
    # q̂ of the sheet around z alone would give log 2 everywhere.
    assert np.all(np.abs(off) < 0.5)


def test_the_log_density_is_low_on_average(run):
    """E log q̂ ≤ log q by Jensen's inequality: an entropy from it is never too small
    but by noise."""
    _, (_, (_, _, density_error)) = run
    late = np.asarray(density_error[200:]).mean(1)
    assert late.mean() < 5 * late.std() / np.sqrt(len(late))


def test_more_samples_bring_the_papers_proposals_nearer():
    cosines = []
    for num_samples in (5, 100):
        _, (gradients, _, _) = measured(
            VariationalScore(num_samples=num_samples), num_steps=600
        )
        found = ravel_pytree(jax.tree.map(lambda leaf: leaf[200:].mean(0), gradients))[
            0
        ]
        cosines.append(found @ ravel_pytree(EXACT)[0] / jnp.linalg.norm(found))
    assert cosines[0] < cosines[1] - 0.02 * float(
        jnp.linalg.norm(ravel_pytree(EXACT)[0])
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceScore(num_samples=0), "num_samples = 0"),
        (lambda: ImportanceScore(init_scale=0.0), r"init_scale = 0\.0"),
        (lambda: ImportanceScore(memory=0.5), r"memory = 0\.5"),
        (lambda: VariationalScore(num_samples=0), "num_samples = 0"),
        (lambda: HMCScore(num_samples=0), "num_samples = 0"),
        (lambda: HMCScore(num_steps=0), "num_steps = 0"),
        (lambda: HMCScore(step_size=-1.0), r"step_size = -1\.0"),
    ],
)
def test_options_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("spread", [0.0, -3.0])
def test_orthonormal_columns_without_lapack(spread):
    """Nearly dependent columns too: orthogonal to rounding, and the inverse its own."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, spread, 6)
    matrix = (rng.normal(size=(5, 9, 6)) * scales + rng.normal(size=(5, 9, 1))).astype(
        np.float32
    )
    found = jax.tree.map(np.asarray, orthonormalized(jnp.asarray(matrix)))
    columns, root = np.linalg.qr(matrix.astype(float))
    signs = np.sign(np.diagonal(root, axis1=1, axis2=2))

    gram = np.swapaxes(found.columns, 1, 2) @ found.columns
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(6), gram.shape), atol=2e-6)
    error = 1e-5 * 10**-spread
    np.testing.assert_allclose(found.columns, columns * signs[:, None], atol=error)
    np.testing.assert_allclose(found.root, root * signs[:, :, None], atol=1e-5)
    product = found.root.astype(float) @ found.inverse
    np.testing.assert_allclose(
        product, np.broadcast_to(np.eye(6), product.shape), atol=error
    )
