"""One update of VERA against the same arithmetic written by hand, and against
persistent chains of 40 moves.

    OPENBLAS_NUM_THREADS=1 python benchmarks/vera_cost.py DATA_FOLDER [--pairs 40]
    [--seconds 60]

The joint model of optdigits (labelled_tables.py): 64 draws of a generator of two hidden
layers, 20 importance samples, batches of 256 rows and 100 labelled rows.  The
hand-written step knows nothing of NumPyro; it gives the estimator of the score its two
functions of a pair by hand.  PCD-40 is persistent contrastive divergence: 64 walkers
without weights, 40 Langevin moves each in base-standard coordinates before an update of
the same net on the same loss.

Printed: the median of paired time ratios (quartiles), flops of one update and what they
go into, and the accuracy that VERA and PCD-40 reach in the same wall time.
"""

import argparse
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import labelled_tables as tables
import numpy as np
import optax
from cost import quartiles, subsample
from jax import lax, random
from jax.nn import logsumexp
from jax.scipy.linalg import solve_triangular
from jax.scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.generators.scores.base import Pair
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.chunk import run_chunk

NUM_LATENTS, NUM_DRAWS, NUM_MOVES = tables.NUM_LATENTS, 64, 40
GAMMA, BOUND_MEMORY = 1.0, 100
LOW, HIGH = 0.01, 1.0
LANGEVIN_STEP = 0.1
NUM_COMPARED = 400
SCORE = ebm.ImportanceScore(local=False)
OPTIM, GENERATOR_OPTIM = (optax.adam(rate, b1=0.0, b2=0.9) for rate in (3e-4, 2e-3))


class HandState(NamedTuple):
    params: Any
    optim_state: Any
    generator: Any  # the net's parameters and the unconstrained scale
    generator_optim_state: Any
    score_state: Any
    bound: Any
    key: Any


class Problem(NamedTuple):
    """The hand-written side's functions of the model."""

    table: tables.Table
    net: Any
    generator_net: Any
    loc: Any
    root: Any
    data: tuple

    def potential(self, params, x):
        return -logsumexp(
            self.net.apply({"params": params}, x), axis=-1
        ) - self.log_base(x)

    def white_potential(self, params, u):
        """The sum of U over rows in base-standard coordinates, up to a constant: the
        base needs no solve there."""
        energy = -logsumexp(
            self.net.apply({"params": params}, self.loc + u @ self.root.T), axis=-1
        )
        return jnp.sum(energy) + 0.5 * jnp.sum(u**2)

    def log_base(self, x):
        white = solve_triangular(self.root, (x - self.loc).T, lower=True).T
        return jnp.sum(norm.logpdf(white), axis=-1) - jnp.sum(
            jnp.log(jnp.diagonal(self.root))
        )

    def coordinates(self, x):
        return solve_triangular(self.root, x - self.loc, lower=True)

    def centre(self, generator, z):
        return self.generator_net.apply({"params": generator["net"]}, z)

    def draw(self, generator, key):
        key_z, key_noise = random.split(key)
        z = random.normal(key_z, (NUM_LATENTS,))
        u = self.centre(generator, z) + scale_of(generator) * random.normal(
            key_noise, self.loc.shape
        )
        return self.loc + self.root @ u, z

    def pair(self, generator):
        log_det = jnp.sum(jnp.log(jnp.diagonal(self.root)))

        def log_prior(z):
            return jnp.sum(norm.logpdf(z))

        def log_joint(z, x):
            given = norm.logpdf(
                self.coordinates(x), self.centre(generator, z), scale_of(generator)
            )
            return log_prior(z) + jnp.sum(given) - log_det

        return Pair(log_prior, log_joint)

    def loss(self, params, draws, bound, key):
        """Negative log joint of a batch, the gradient penalty included."""
        key_rows, key_noise, key_labelled = random.split(key, 3)
        x, labelled, y = self.data
        rows = x[subsample(key_rows, len(x), tables.BATCH)]
        rows = self.table.dequantised(key_noise, rows)

        energy, pull = jax.vjp(
            lambda x: -logsumexp(self.net.apply({"params": params}, x), axis=-1), rows
        )
        (slope,) = pull(jnp.ones_like(energy))
        penalty = 0.5 * GAMMA * jnp.sum((slope @ self.root) ** 2)
        log_z = -jnp.mean(self.potential(params, draws))
        log_z = bound + log_z - lax.stop_gradient(log_z)
        unlabelled = jnp.sum(energy - self.log_base(rows)) + penalty + len(rows) * log_z
        shares = jnp.sum(
            jax.nn.softmax(self.net.apply({"params": params}, rows)), axis=0
        )
        counts = tables.LABELS_PER_CLASS * tables.BATCH / len(x) + shares
        logits = self.net.apply(
            {"params": params}, self.table.dequantised(key_labelled, labelled)
        )
        logits = logits - jnp.log(counts)
        labels = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return len(x) * (
            unlabelled / len(rows) + tables.LABEL_WEIGHT * jnp.mean(labels)
        )


def scale_of(generator):
    return LOW + (HIGH - LOW) * jax.nn.sigmoid(generator["scale"])


def hand_step(problem: Problem, state: HandState):
    key_draw, key_score, key_again, key_loss, key = random.split(state.key, 5)

    # Generator
    def draw_all(generator):
        keys = random.split(key_draw, NUM_DRAWS)
        return jax.vmap(partial(problem.draw, generator))(keys)

    values, pull, latents = jax.vjp(draw_all, state.generator, has_aux=True)
    potential, pull_potential = jax.vjp(
        partial(problem.potential, state.params), values
    )
    (force,) = pull_potential(jnp.ones_like(potential))
    found, score_state = SCORE.evaluate(
        key_score, state.score_state, problem.pair(state.generator), latents, values
    )
    (grads,) = pull((force + found.score) / NUM_DRAWS)
    updates, generator_optim_state = GENERATOR_OPTIM.update(
        grads, state.generator_optim_state
    )
    generator = optax.apply_updates(state.generator, updates)
    now = -jnp.mean(found.log_density) - jnp.mean(potential)
    bound = state.bound + (now - state.bound) / BOUND_MEMORY

    # Energy
    draws, _ = jax.vmap(partial(problem.draw, generator))(
        random.split(key_again, NUM_DRAWS)
    )
    loss, grads = jax.value_and_grad(problem.loss)(state.params, draws, bound, key_loss)
    updates, optim_state = OPTIM.update(grads, state.optim_state)
    params = optax.apply_updates(state.params, updates)
    state = HandState(
        params, optim_state, generator, generator_optim_state, score_state, bound, key
    )
    return state, loss


def pcd_step(problem: Problem, carry):
    """Persistent contrastive divergence: 40 unadjusted Langevin moves in base-standard
    coordinates, then an update."""
    params, optim_state, walkers, bound, key = carry
    key_move, key_loss, key = random.split(key, 3)

    def move(u, key):
        slope = jax.grad(partial(problem.white_potential, params))(u)
        return u - LANGEVIN_STEP * slope + jnp.sqrt(2 * LANGEVIN_STEP) * random.normal(
            key, u.shape
        ), None

    walkers, _ = lax.scan(move, walkers, random.split(key_move, NUM_MOVES))
    draws = problem.loc + walkers @ problem.root.T
    loss, grads = jax.value_and_grad(problem.loss)(params, draws, bound, key_loss)
    updates, optim_state = OPTIM.update(grads, optim_state)
    return (
        optax.apply_updates(params, updates),
        optim_state,
        walkers,
        bound,
        key,
    ), loss


def scanned(step):
    """A loop of ``step(carry) -> carry, loss``, compiled once per length."""
    return jax.jit(
        lambda carry, length: lax.scan(lambda c, _: step(c), carry, length=length),
        static_argnums=1,
    )


def timed(loop, carry, num_steps):
    carry = jax.block_until_ready(jax.tree.map(jnp.copy, carry))
    began = time.perf_counter()
    out = jax.block_until_ready(loop(carry, num_steps))
    return time.perf_counter() - began, out[0]


def compare_runs(package_loop, state, hand_loop, hand):
    """Both sides draw their own random numbers: the same training shows in means over
    updates."""
    _, history, *_ = package_loop(jax.tree.map(jnp.copy, state), NUM_COMPARED)
    hand, losses = hand_loop(hand, NUM_COMPARED)
    (bounds,) = history["log_normalizer_bound"].values()
    late = slice(NUM_COMPARED // 2, NUM_COMPARED)
    ours, theirs = np.asarray(history["loss"])[late], np.asarray(losses)[late]
    error = np.hypot(ours.std(), theirs.std()) / np.sqrt(len(ours))
    print(
        f"mean loss of updates {late.start} to {late.stop}: package {ours.mean():.0f}, "
        f"by hand {theirs.mean():.0f}, difference "
        f"{abs(ours.mean() - theirs.mean()) / error:.1f} standard errors (of "
        f"independent updates); bound on log Z then: {bounds[NUM_COMPARED - 1]:.2f}, "
        f"{float(hand.bound):.2f}"
    )


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def train_for(loop, carry, seconds):
    """Updates until the time is up, compilation left out; how many."""
    loop(jax.tree.map(jnp.copy, carry), 200)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        carry = jax.block_until_ready(loop(carry, 200))[0]
        done += 200
    return carry, done


def accuracy(params, joint, table):
    logits = np.asarray(joint.net.apply({"params": params}, table.x_test))
    return 100 * np.mean(logits.argmax(1) == table.y_test)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="updates per timed run")
    parser.add_argument(
        "--seconds", type=float, default=60, help="training time for the accuracies"
    )
    options = parser.parse_args()
    table = tables.load(options.folder, "optdigits")
    joint = tables.joint(table, tables.draw_labels(table.y, 0))
    backend = ebm.VERA(
        joint.model,
        tables.make_generator(joint.base),
        OPTIM,
        GENERATOR_OPTIM,
        num_particles=NUM_DRAWS,
        gradient_penalty=GAMMA,
        score=SCORE,
    )
    arguments = Arguments(joint.data)
    state = backend.init(random.key(0), *joint.data)
    generator_net = tables.GeneratorNet(table.x.shape[1])
    problem = Problem(
        table,
        joint.net,
        generator_net,
        joint.base.loc,
        joint.base.scale_tril,
        joint.data,
    )
    generator = {
        "net": state.generator_params["generator$params"],
        "scale": state.generator_params["scale"],
    }
    params = state.params["net$params"]
    hand = HandState(
        params,
        OPTIM.init(params),
        generator,
        GENERATOR_OPTIM.init(generator),
        state.score_state,
        state.log_normalizer_bound,
        random.key(1),
    )
    walkers = random.normal(random.key(2), (NUM_DRAWS, table.x.shape[1]))
    pcd = (params, OPTIM.init(params), walkers, jnp.zeros(()), random.key(3))

    package_loop = lambda carry, length: run_chunk(backend, carry, arguments, length)  # noqa: E731
    hand_loop, pcd_loop = (
        scanned(partial(hand_step, problem)),
        scanned(partial(pcd_step, problem)),
    )
    compare_runs(package_loop, state, hand_loop, hand)
    sides = (
        (package_loop, state),
        (hand_loop, hand),
        (hand_loop, hand),
        (pcd_loop, pcd),
    )
    for loop, carry in sides:
        timed(loop, carry, options.steps)
    rows = []
    for pair in range(options.pairs):
        row = [0.0] * len(sides)
        for place in range(len(sides)):
            which = (pair + place) % len(sides)
            row[which], _ = timed(*sides[which], options.steps)
        rows.append(row)
    package, by_hand, again, by_pcd = np.array(rows).T / options.steps
    milliseconds = [
        f"{1e3 * np.median(found):.2f}" for found in (package, by_hand, by_pcd)
    ]
    print(
        f"ms per update: package {milliseconds[0]}, by hand {milliseconds[1]}, "
        f"PCD-{NUM_MOVES} {milliseconds[2]}"
    )
    print(f"  {options.pairs} pairs of {options.steps} updates")
    print(f"  package / by hand {quartiles(package / by_hand)} (bar 1.1)")
    print(f"  by hand against itself {quartiles(again / by_hand)}")
    print(f"  package / PCD-{NUM_MOVES} {quartiles(package / by_pcd)}")

    x = jnp.zeros((NUM_DRAWS, table.x.shape[1]))
    z = jnp.zeros((NUM_DRAWS, NUM_LATENTS))
    in_all = [
        flops(backend.update, state, *joint.data),
        flops(partial(hand_step, problem), hand),
        flops(partial(pcd_step, problem), pcd),
    ]
    pair = problem.pair(generator)
    parts = {
        f"score ({SCORE.num_samples} samples per draw, global proposals)": flops(
            lambda key, z, x: SCORE.evaluate(key, hand.score_state, pair, z, x),
            random.key(0),
            z,
            x,
        ),
        f"generator at {NUM_DRAWS} latents": flops(
            jax.vmap(partial(problem.centre, generator)), z
        ),
        f"energy's net at {NUM_DRAWS} rows": flops(
            partial(joint.net.apply, {"params": params}), x
        ),
    }
    # A loop's body is counted once: PCD's moves are added by hand.
    move = flops(jax.grad(partial(problem.white_potential, params)), x)
    print(
        f"Mflop per update: package {in_all[0] / 1e6:.0f}, by hand "
        f"{in_all[1] / 1e6:.0f}, PCD-{NUM_MOVES} "
        f"{(in_all[2] + (NUM_MOVES - 1) * move) / 1e6:.0f} (one move {move / 1e6:.1f})"
    )
    for name, value in parts.items():
        print(f"  {name}: {value / 1e6:.1f}")

    for name, loop, carry in (
        ("VERA, by hand", hand_loop, hand),
        (f"PCD-{NUM_MOVES}", pcd_loop, pcd),
    ):
        carry, done = train_for(loop, carry, options.seconds)
        print(
            f"{name}: {accuracy(carry[0], joint, table):.1f}% after "
            f"{options.seconds:.0f} s, {done} updates",
            flush=True,
        )


if __name__ == "__main__":
    main()
