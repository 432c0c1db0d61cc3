"""A NICE flow as an energy: the exact likelihood judges how it was trained.

    python benchmarks/nice.py DATA_FOLDER [--seconds 150] [--seed 0] [--methods
    likelihood VERA Jarzynski PCD CD noise-contrastive sliced denoising]

A NICE flow of four additive couplings (Dinh, Krueger and Bengio 2015) on 28x28 MNIST
with noise of 0.1, in standardised principal components of the training rows, so that
the flow starts at the Gaussian of the data.  Its density is normalised, log Z = 0, but
only maximum likelihood is told so.  The others see the energy: VERA, Jarzynski,
contrastive divergence (PCD: as many walkers and moves as Jarzynski, which holds a
quarter of its walkers out; CD: as many moves from the rows), noise-contrastive
estimation, and score matching (with a slice, and with noise of a tenth), each for the
same wall time, compilation included.  VERA's generator is another such flow, which
starts as the energy's own; as many draws as PCD has walkers, in the energy's step with
importance weights.  Printed: exact test log-likelihood in nats of the noisy pixels, and,
of the package's backends, log Z with its certificate beside the true 0.

The setting of Grathwohl et al. (2021), section 5.1: a NICE model of MNIST trained by
VERA, PCD, score matching and maximum likelihood.

DATA_FOLDER holds mnist.npz with X_train and X_test, 28 x 28 pixels in 0..255.
"""

import argparse
import pathlib
import sys
import time
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from jax.scipy.stats import norm
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

import ebm_ppl as ebm

NOISE, BATCH = 0.1, 256
NUM_CHAINS, NUM_WALKERS, NUM_MOVES = 16, 32, 3
PIXELS = 784
BASE = dist.Normal(0.0, 1.0).expand([PIXELS]).to_event(1)


class Shift(nn.Module):
    """256-256-392 with swish; zero at first."""

    @nn.compact
    def __call__(self, half):
        for _ in range(2):
            half = nn.swish(nn.Dense(256)(half))
        return nn.Dense(PIXELS // 2, kernel_init=nn.initializers.zeros)(half)


class NICE(nn.Module):
    """Log density of whitened pixels, ``(..., 784)``; the standard normal's at
    first."""

    def setup(self):
        self.shifts = [Shift() for _ in range(4)]
        self.log_scale = self.param("log_scale", nn.initializers.zeros, (PIXELS,))

    def __call__(self, u):
        return jnp.sum(norm.logpdf(self.encode(u)), axis=-1) + self.log_det()

    def encode(self, u):
        first, second = u[..., ::2], u[..., 1::2]
        for shift in self.shifts:
            first, second = second, first + shift(second)
        return jnp.exp(self.log_scale) * jnp.concatenate([first, second], axis=-1)

    def decode(self, noise):
        first, second = jnp.split(jnp.exp(-self.log_scale) * noise, 2, axis=-1)
        for shift in self.shifts[::-1]:
            first, second = second - shift(first), first
        return jnp.stack([first, second], axis=-1).reshape(noise.shape)

    def log_det(self):
        return jnp.sum(self.log_scale)


class Decode(Transform):
    """A NICE flow from its noise to whitened pixels."""

    domain = codomain = constraints.real_vector

    def __init__(self, flow):
        self.flow = flow

    def __call__(self, noise):
        return self.flow(noise, method="decode")

    def _inverse(self, u):
        return self.flow(u, method="encode")

    def log_abs_det_jacobian(self, noise, u, intermediates=None):
        return jnp.broadcast_to(-self.flow(method="log_det"), noise.shape[:-1])


FLOW = NICE()


class Data:
    """Whitened noisy pixels of both splits."""

    def __init__(self, folder):
        path = pathlib.Path(folder) / "mnist.npz"
        if not path.exists():
            sys.exit(f"{path} is missing: this benchmark needs mnist.npz (see --help).")
        found = np.load(path)
        train, test = (
            found[name].reshape(-1, PIXELS) / 255.0 for name in ("X_train", "X_test")
        )
        self.mean = train.mean(0)
        # Principal components, the widest first.
        variances, directions = (
            found[..., ::-1]
            for found in np.linalg.eigh(np.cov(train.T) + NOISE**2 * np.eye(PIXELS))
        )
        self.whiten = jnp.asarray(directions / np.sqrt(variances), jnp.float32)
        self.log_det = -0.5 * np.sum(np.log(variances))
        self.train = jnp.asarray(train - self.mean, jnp.float32)
        self.test = self.whitened(
            random.key(99), jnp.asarray(test - self.mean, jnp.float32)
        )

    def whitened(self, rng_key, pixels):
        return (pixels + NOISE * random.normal(rng_key, pixels.shape)) @ self.whiten

    def test_log_likelihood(self, params):
        """Mean over the test rows, in nats of the noisy pixels."""
        return float(jnp.mean(FLOW.apply({"params": params}, self.test))) + self.log_det


def make_model(data):
    def model(pixels):
        flow = flax_module("flow", FLOW, input_shape=(PIXELS,))
        energy = lambda u: jnp.sum(norm.logpdf(u), axis=-1) - flow(u)  # noqa: E731
        with numpyro.plate("rows", len(pixels), subsample_size=BATCH):
            batch = data.whitened(
                numpyro.prng_key(), numpyro.subsample(pixels, event_dim=1)
            )
            numpyro.sample("x", ebm.EnergyDistribution(energy, BASE), obs=batch)

    return model


def generator():
    """Another NICE flow, without latents."""
    flow = flax_module("generator", FLOW, input_shape=(PIXELS,))
    noise = dist.Normal(0.0, 1.0).expand([PIXELS]).to_event(1)
    numpyro.sample("x", dist.TransformedDistribution(noise, Decode(flow)))


def decayed(rate, num_steps):
    return optax.cosine_decay_schedule(rate, num_steps, 0.02)


def by_vera(model, data, num_steps, seed, importance_weights=True):
    optim, generator_optim = (
        optax.adam(decayed(rate, num_steps), b1=0.5, b2=b2)
        for rate, b2 in ((1e-3, 0.999), (2e-3, 0.99))
    )
    backend = ebm.VERA(
        model,
        generator,
        optim,
        generator_optim,
        num_particles=NUM_CHAINS * NUM_WALKERS,
        gradient_penalty=0.0,
        importance_weights=importance_weights,
    )
    state = backend.init(random.key(seed), data.train)
    # The two flows are equal at first, hidden layers included: the generator follows,
    # it need not find features.
    state = replace(
        state, generator_params={"generator$params": state.params["flow$params"]}
    )
    try:
        fit = backend.run(
            random.key(seed),
            num_steps,
            data.train,
            progress_bar=False,
            init_state=state,
        )
    except ebm.NonFiniteError as error:
        print(f"VERA was not finite after {error.step} updates; its last good state:")
        fit = error.fit
    return fit.params["flow$params"], fit


def by_likelihood(_, data, num_steps, seed):
    """Adam on the exact negative log-likelihood."""
    key_init, key_run = random.split(random.key(seed))
    params = FLOW.init(key_init, jnp.zeros(PIXELS))["params"]
    optim = optax.adam(decayed(1e-3, num_steps))

    def loss(params, u):
        return -jnp.mean(FLOW.apply({"params": params}, u))

    def update(pixels, state, key):
        params, optim_state = state
        key_rows, key_noise = random.split(key)
        rows = pixels[random.randint(key_rows, (BATCH,), 0, len(pixels))]
        gradient = jax.grad(loss)(params, data.whitened(key_noise, rows))
        updates, optim_state = optim.update(gradient, optim_state)
        return (optax.apply_updates(params, updates), optim_state), None

    keys = random.split(key_run, num_steps)
    run = jax.jit(
        lambda pixels, state: lax.scan(partial(update, pixels), state, keys)[0]
    )
    params, _ = jax.block_until_ready(run(data.train, (params, optim.init(params))))
    return params, None


def by(make, model, data, num_steps, seed):
    """A backend of the package, ``make(model, optim)``."""
    backend = make(model, optax.adam(decayed(1e-3, num_steps)))
    fit = backend.run(random.key(seed), num_steps, data.train, progress_bar=False)
    return fit.params["flow$params"], fit


WALKERS = partial(
    ebm.Jarzynski,
    num_chains=NUM_CHAINS,
    num_walkers=NUM_WALKERS,
    num_kernel_steps=NUM_MOVES,
)
BY_MOVES = partial(ebm.ContrastiveDivergence, num_kernel_steps=NUM_MOVES)
NUM_ALL = NUM_CHAINS * NUM_WALKERS

COMPARED = {
    "likelihood": by_likelihood,
    "VERA": by_vera,
    "Jarzynski": partial(by, WALKERS),
    "PCD": partial(by, partial(BY_MOVES, num_walkers=NUM_ALL)),
    "CD": partial(by, partial(BY_MOVES, method="data")),
    "noise-contrastive": partial(by, partial(ebm.NoiseContrastive, num_draws=NUM_ALL)),
    "sliced": partial(by, partial(ebm.ScoreMatching, method="sliced")),
    "denoising": partial(
        by, partial(ebm.ScoreMatching, method="denoising", noise_scale=0.1)
    ),
}
METHODS = COMPARED | {"VERA-unweighted": partial(by_vera, importance_weights=False)}


def steps_in(method, model, data, seconds, seed):
    """Updates that take so many seconds, with the time that compilation took."""
    # Once apart: a first call warms up more than its own executables.
    method(model, data, 20, seed)
    times = []
    for num_steps in (20, 120):
        began = time.perf_counter()
        method(model, data, num_steps, seed)
        times.append(time.perf_counter() - began)
    each = max(times[1] - times[0], 1e-3) / 100
    return max(100, int((seconds - times[0]) / each))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget", type=int, default=8_000_000, help="energy evaluations for log Z"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    options = parser.parse_args()
    data = Data(options.folder)
    model = make_model(data)
    start = FLOW.init(random.key(0), jnp.zeros(PIXELS))["params"]
    print(
        f"the Gaussian that all start from: {data.test_log_likelihood(start):.1f} "
        "nats (exact, test)",
        flush=True,
    )
    for name in options.methods:
        method = METHODS[name]
        num_steps = steps_in(method, model, data, options.seconds, options.seed)
        began = time.perf_counter()
        params, fit = method(model, data, num_steps, options.seed)
        seconds = time.perf_counter() - began
        told = (
            f"{name:15s} {data.test_log_likelihood(params):8.1f} nats in {seconds:.0f} "
            f"s, {num_steps} updates"
        )
        if fit is not None:
            log_z = ebm.log_normalizer(
                random.key(3), model, fit.params, data.train, budget=options.budget
            )
            told += f"; true log Z 0, {log_z}"
        print(told, flush=True)


if __name__ == "__main__":
    main()
