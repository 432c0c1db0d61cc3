"""One update of `MonteCarloMLE` against the same arithmetic written by hand.

    OPENBLAS_NUM_THREADS=1 python benchmarks/monte_carlo_cost.py [--pairs 40]

scikit-learn's digits on a mixture of 50 diagonal normals, a net of two layers of 256,
batches of 256 rows, 1,024 draws of the base.  The hand-written step knows nothing of
NumPyro: mean E of the batch plus log mean exp(−E) of the draws, AdamW, one `fori_loop`
of as many updates as the package's run.  Printed: median time per update and paired
ratios (quartiles), with flops of one update.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from cost import quartiles
from jax import lax, random
from jax.nn import logsumexp
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from tilt import Net

import ebm_ppl as ebm
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.chunk import run_chunk

NUM_DRAWS, BATCH, BOUND = 1024, 256, 5.0
OPTIM = optax.adamw(1e-3, weight_decay=0.1)


def hand_step(x, mixture, carry):
    """The mixture is its means, its scales and the logits of its weights."""
    params, optim_state, key = carry
    key, key_rows, key_which, key_noise = random.split(key, 4)
    means, scales, logits = mixture
    rows = x[random.permutation(key_rows, len(x))[:BATCH]]
    which = random.categorical(key_which, logits, shape=(NUM_DRAWS,))
    noise = random.normal(key_noise, (NUM_DRAWS, x.shape[1]))
    draws = means[which] + noise * scales[which]

    def loss(params):
        energy = lambda v: BOUND * jnp.tanh(Net().apply(params, v) / BOUND)  # noqa: E731
        log_z = logsumexp(-energy(draws)) - jnp.log(NUM_DRAWS)
        return len(x) * (jnp.mean(energy(rows)) + log_z)

    value, grads = jax.value_and_grad(loss)(params)
    updates, optim_state = OPTIM.update(grads, optim_state, params)
    params = optax.apply_updates(params, updates)
    return (params, optim_state, key), (value, optax.tree.norm(grads))


@partial(jax.jit, donate_argnums=2)
def hand_loop(x, mixture, carry, num_steps):
    history = jnp.zeros((2, 1024))

    def body(step, state):
        carry, history = state
        carry, info = hand_step(x, mixture, carry)
        return carry, history.at[:, step].set(jnp.stack(info))

    return lax.fori_loop(0, num_steps, body, (carry, history))


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    x = (load_digits().data + np.random.default_rng(0).uniform(size=(1797, 64))) / 17
    x = x.astype(np.float32)
    fitted = GaussianMixture(50, covariance_type="diag", reg_covar=1e-4, random_state=0)
    base = ebm.from_sklearn(fitted.fit(x))

    def model(x):
        net = flax_module("net", Net(), input_shape=(64,))
        energy = ebm.EnergyDistribution(ebm.bounded(net, BOUND), base)
        with numpyro.plate("rows", len(x), subsample_size=BATCH):
            numpyro.sample("x", energy, obs=numpyro.subsample(x, event_dim=1))

    backend = ebm.MonteCarloMLE(model, OPTIM, num_draws=NUM_DRAWS)
    arguments = Arguments((jnp.asarray(x),))
    state = backend.init(random.key(0), *arguments.args)
    params = {"params": state.params["net$params"]}
    mixture = (base.means, base.inverses, base.log_weights)
    hand = (params, OPTIM.init(params), random.key(1))

    def package(num_steps):
        copy = jax.tree.map(jnp.array, state)
        began = time.perf_counter()
        jax.block_until_ready(run_chunk(backend, copy, arguments, num_steps))
        return (time.perf_counter() - began) / num_steps

    def by_hand(num_steps):
        copy = jax.tree.map(jnp.array, hand)
        began = time.perf_counter()
        jax.block_until_ready(hand_loop(arguments.args[0], mixture, copy, num_steps))
        return (time.perf_counter() - began) / num_steps

    for side in (package, by_hand):
        side(options.steps)
    times = []
    for pair in range(options.pairs):
        order = (package, by_hand, by_hand) if pair % 2 else (by_hand, by_hand, package)
        found = [side(options.steps) for side in order]
        times.append(found if pair % 2 else found[::-1])
    ours, hands, again = np.array(times).T
    print(f"ms per update: package {1e3 * np.median(ours):.2f}, by hand "
          f"{1e3 * np.median(hands):.2f}; {options.pairs} pairs of {options.steps}")  # fmt: skip
    print(f"  package / by hand {quartiles(ours / hands)} (bar 1.05)")
    print(f"  by hand against itself {quartiles(again / hands)}")
    one = flops(backend.update, state, *arguments.args)
    other = flops(partial(hand_step, arguments.args[0], mixture), hand)
    print(f"  flops: package {one / 1e6:.1f} M, by hand {other / 1e6:.1f} M")


if __name__ == "__main__":
    main()
