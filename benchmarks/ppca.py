"""The entropy's gradient against its closed form: linear generators, whose draws are
Gaussian.

    python benchmarks/ppca.py plane
    python benchmarks/ppca.py mnist DATA_FOLDER [--output ppca.png]

``plane``: two latents, three pixels, 10⁵ draws (bar: cosine 0.99).  ``mnist``: the
maximum-likelihood PPCA with 100 latents of 28x28 MNIST (Tipping and Bishop 1999), the
check of Grathwohl et al. (2021).  Relative bias and standard deviation of ∇H with
respect to the loadings and the noise scale, against generator evaluations per draw (a
gradient counts as three), for importance sampling with local and global proposals, with
the paper's, and for HMC.

DATA_FOLDER holds mnist.npz with X_train, 60,000 rows of 28 x 28 pixels in 0..255.
"""

import argparse
import pathlib
import sys
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

import ebm_ppl as ebm
from ebm_ppl.generators.scores.base import Pair

NUM_PAIRS = 100
NUM_SETTLING = 400


class Linear(NamedTuple):
    """x = W z + σ ε."""

    weight: jax.Array
    scale: jax.Array

    def generate(self, latents, errors):
        return latents @ self.weight.T + self.scale * errors

    def log_prior(self, latents):
        return -0.5 * latents @ latents - 0.5 * len(latents) * jnp.log(2 * jnp.pi)

    def log_joint(self, latents, value):
        standard = (value - self.weight @ latents) / self.scale
        return (
            self.log_prior(latents)
            - 0.5 * standard @ standard
            - len(value) * jnp.log(self.scale)
        )

    def residuals(self, latents, value):
        return latents, (value - self.weight @ latents) / self.scale

    def entropy_gradient(self):
        """∇H for N(0, W Wᵀ + σ² I): C⁻¹ W and σ tr C⁻¹, in double precision."""
        weight, scale = np.asarray(self.weight, float), float(self.scale)
        dims, num_latents = weight.shape
        inner = np.linalg.inv(scale**2 * np.eye(num_latents) + weight.T @ weight)
        trace = (dims - np.trace(weight.T @ weight @ inner)) / scale**2
        return Linear(weight @ inner, np.asarray(scale * trace))


def evaluations(score, num_latents):
    """Generator evaluations per draw: a gradient counts as three, a directional
    derivative as two."""
    match score:
        case ebm.ImportanceScore():
            return score.num_samples + (2 * num_latents if score.local else 3)
        case ebm.VariationalScore():
            return score.num_samples + 3
        case ebm.HMCScore():
            # One gradient at a path's start, one per leapfrog step; two potentials; a
            # score where it counts.
            transitions = score.num_warmup + score.num_samples
            return transitions * (3 * (score.num_steps + 1) + 2) + score.num_samples


def measure(generator, score, num_draws, rng_key):
    """Relative bias (its own noise subtracted), relative standard deviation of one
    draw, and cosine."""
    exact = jnp.concatenate([jnp.ravel(leaf) for leaf in generator.entropy_gradient()])
    dims, num_latents = generator.weight.shape

    def step(carry, key):
        state, total, squares = carry
        key_latents, key_errors, key_score = random.split(key, 3)
        latents = random.normal(key_latents, (NUM_PAIRS, num_latents))
        errors = random.normal(key_errors, (NUM_PAIRS, dims))
        values, pull = jax.vjp(lambda g: g.generate(latents, errors), generator)
        found, state = score.evaluate(
            key_score,
            state,
            Pair(generator.log_prior, generator.log_joint, generator.residuals),
            latents,
            values,
        )
        (gradient,) = pull(-found.score / NUM_PAIRS)
        error = jnp.concatenate([jnp.ravel(leaf) for leaf in gradient]) - exact
        return (state, total + error, squares + error**2), None

    @partial(jax.jit, static_argnums=2)
    def run(state, key, num_steps):
        zeros = jnp.zeros_like(exact)
        return lax.scan(step, (state, zeros, zeros), random.split(key, num_steps))[0]

    key_settle, key_run = random.split(rng_key)
    state, *_ = run(score.init(num_latents), key_settle, NUM_SETTLING)
    num_steps = num_draws // NUM_PAIRS
    _, total, squares = run(state, key_run, num_steps)
    mean, size = np.asarray(total, float) / num_steps, float(jnp.linalg.norm(exact))
    variance = np.asarray(squares, float) / num_steps - mean**2
    bias = np.sqrt(max(0.0, (mean**2).sum() - variance.sum() / num_steps)) / size
    found = mean + np.asarray(exact)
    cosine = found @ np.asarray(exact) / np.linalg.norm(found) / size
    return bias, np.sqrt(variance.sum() * NUM_PAIRS) / size, cosine


SCORES = {
    "local proposals": [ebm.ImportanceScore(num_samples=k) for k in (5, 20)],
    "global proposals": [
        ebm.ImportanceScore(num_samples=k, local=False) for k in (5, 10, 20, 50)
    ],
    "the paper's proposals": [
        ebm.VariationalScore(num_samples=k) for k in (5, 10, 20, 50, 200)
    ],
    "HMC": [
        ebm.HMCScore(num_warmup=w, num_samples=s, num_steps=n)
        for w, s, n in ((1, 1, 3), (2, 2, 5), (5, 5, 5), (10, 5, 10))
    ],
}


def table(generator, num_draws):
    print(
        f"{num_draws} draws; before them {NUM_SETTLING} evaluations of {NUM_PAIRS} "
        "draws fit proposals and step sizes"
    )
    print(
        "method                 | evaluations | relative bias | relative sd of a draw "
        "| cosine  | s"
    )
    rows = {}
    for name, scores in SCORES.items():
        for score in scores:
            began = time.perf_counter()
            bias, deviation, cosine = measure(
                generator, score, num_draws, random.key(0)
            )
            cost = evaluations(score, generator.weight.shape[1])
            rows.setdefault(name, []).append((cost, bias, deviation))
            row = (
                f"{name:22} | {cost:11d} | {bias:13.4f} | {deviation:21.3f} | "
                f"{cosine:7.4f}"
            )
            print(f"{row} | {time.perf_counter() - began:.0f}", flush=True)
    return rows


def mnist_ppca(folder, num_latents=100):
    """The maximum-likelihood PPCA of dequantised pixels in [0, 1], its loadings rotated
    at random."""
    path = pathlib.Path(folder) / "mnist.npz"
    if not path.exists():
        sys.exit(f"{path} is missing: this benchmark needs mnist.npz (see --help).")
    rng = np.random.default_rng(0)
    pixels = np.load(path)["X_train"].reshape(-1, 784)
    pixels = (pixels + rng.uniform(size=pixels.shape)) / 256.0
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    noise = values[:-num_latents].mean()
    loadings = vectors[:, -num_latents:] * np.sqrt(values[-num_latents:] - noise)
    rotation, _ = np.linalg.qr(rng.normal(size=(num_latents, num_latents)))
    return Linear(
        jnp.asarray(loadings @ rotation, jnp.float32),
        jnp.asarray(np.sqrt(noise), jnp.float32),
    )


def draw(rows, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, found in rows.items():
        cost, bias, deviation = np.array(found).T
        axes[0].loglog(cost, np.maximum(bias, 1e-4), "o-", label=name)
        axes[1].semilogx(cost, deviation, "o-")
    for ax, what in zip(
        axes, ("relative bias", "relative standard deviation of one draw"), strict=True
    ):
        ax.set(xlabel="generator evaluations per draw", ylabel=what)
    axes[1].set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Entropy gradient of the MNIST PPCA with 100 latents")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["plane", "mnist"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("ppca.png"))
    options = parser.parse_args()
    if options.task == "plane":
        weight = jnp.array([[1.0, 0.3], [-0.5, 0.8], [0.2, -0.4]])
        table(Linear(weight, jnp.array(0.3)), options.draws or 100_000)
        return
    if options.folder is None:
        parser.error("mnist needs DATA_FOLDER")
    draw(table(mnist_ppca(options.folder), options.draws or 20_000), options.output)
    print(f"figure: {options.output}")


if __name__ == "__main__":
    main()
