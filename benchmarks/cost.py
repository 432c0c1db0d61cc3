"""Time, flops and memory of an update against the same training step written by hand in
JAX and optax.

Two problems: the 50-dimensional mixture of gmm50.py (ULA, one move, full batch) and the
density net of optdigits.py (MALA, four moves, batches of 256, conditional-ESS control)
on synthetic rows of the digits' shape.  The hand-written steps know nothing of NumPyro
or of this package; they split their keys in the same way, so both sides follow one
trajectory up to rounding, which is checked first.  Printed per number of walkers: the
median (and quartiles) of pairwise time ratios in alternated runs, the same for the
hand-written loop against itself, the ratio of flops of one update, and of temporary
memory of one update and of the loop.

    OPENBLAS_NUM_THREADS=1 python benchmarks/cost.py [--problems mixture net] [--walkers
    64 625 6250] [--no-check]

``--walkers`` is per island, of 16 islands.  All of it takes about a quarter of an hour
on two cores.  The net's base solves triangular systems by LAPACK, on both sides; with
threads of its own it fights XLA's over the cores, at random.
"""

import argparse
import time
from functools import partial
from typing import Any, NamedTuple

import gmm50
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax import lax, random
from jax.nn import logsumexp
from jax.scipy.linalg import solve_triangular
from labelled_tables import Net
from numpyro.contrib.module import flax_module
from optdigits import dequantise, gaussian

import ebm_ppl as ebm
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.chunk import run_chunk

NUM_CHAINS, NUM_HOLDOUT = 16, 4
NUM_TRAINING = NUM_CHAINS - NUM_HOLDOUT
ULA_STEP, ESS_TARGET, ESS_THRESHOLD, NUM_MOVES = gmm50.STEP_SIZE, 0.99, 0.5, 4
NUM_ROWS, BATCH, PIXELS = 3_823, 256, 64
HEADLINE = {"mixture": 625, "net": 64}


# --- The hand-written side ------------------------------------------------------------


class HandState(NamedTuple):
    params: Any
    optim_state: Any
    position: Any  # (chains x walkers, dim), in whitened coordinates
    potential: Any  # (chains x walkers,)
    log_weight: Any  # (chains, walkers)
    past: Any  # log normalisers of past resamplings, (chains,)
    gradient: Any  # of log Z, from the training islands
    log_z: Any  # held out
    step_size: Any
    scale: Any
    key: Any


def islands(value):
    return value.reshape(NUM_CHAINS, -1, *value.shape[1:])


def log_mean_exp(value, axis):
    return logsumexp(value, axis=axis) - jnp.log(value.shape[axis])


def island_ess(log_weight):
    log_ess = 2 * logsumexp(log_weight, axis=1) - logsumexp(2 * log_weight, axis=1)
    return jnp.exp(log_ess) / log_weight.shape[1]


def conditional_ess(log_weight, increment):
    log_w = jax.nn.log_softmax(log_weight, axis=1) - jnp.log(len(log_weight))
    return jnp.exp(2 * logsumexp(log_w + increment) - logsumexp(log_w + 2 * increment))


def jackknife(log_z):
    num = len(log_z)
    left_out = log_mean_exp(
        jnp.stack(
            [jnp.delete(log_z, i, assume_unique_indices=True) for i in range(num)]
        ),
        1,
    )
    estimate = num * log_mean_exp(log_z, 0) - (num - 1) * left_out.mean()
    return estimate, jnp.sqrt((num - 1) * jnp.mean((left_out - left_out.mean()) ** 2))


def training_cotangent(log_weight):
    """-w, so that the potential pulled back along it is the gradient of log Z; held-out
    islands give nothing."""
    weight = jax.nn.softmax(log_weight[:NUM_TRAINING], axis=1) / NUM_TRAINING
    return -jnp.concatenate([weight, jnp.zeros_like(log_weight[NUM_TRAINING:])]).ravel()


def langevin(key, position, slope, step_size):
    return (
        position
        - step_size * slope
        + jnp.sqrt(2 * step_size) * random.normal(key, position.shape)
    )


def log_ratio(x, potential_x, slope_x, y, potential_y, slope_y, step_size):
    inner = 0.5 * (y - x) * (slope_x + slope_y) + 0.25 * step_size * (
        slope_x**2 - slope_y**2
    )
    return potential_x - potential_y + inner.sum(-1)


def systematic(key, log_weight):
    cumulative = jnp.cumsum(jnp.exp(log_weight - log_weight.max()))
    num = len(log_weight)
    points = (jnp.arange(num) + random.uniform(key)) / num
    return jnp.minimum(
        jnp.searchsorted(cumulative, points * cumulative[-1], side="right"), num - 1
    )


def resample(key, low, position, potential, log_weight, past):
    def where_low(position, potential, log_weight, past):
        picked = jax.vmap(systematic)(random.split(key, NUM_CHAINS), log_weight)
        ancestors = jnp.where(low[:, None], picked, jnp.arange(log_weight.shape[1]))
        rows = (
            ancestors + log_weight.shape[1] * jnp.arange(NUM_CHAINS)[:, None]
        ).ravel()
        return (
            position[rows],
            potential[rows],
            jnp.where(low[:, None], 0.0, log_weight),
            jnp.where(low, past + log_mean_exp(log_weight, 1), past),
        )

    return lax.cond(
        jnp.any(low),
        where_low,
        lambda *same: same,
        position,
        potential,
        log_weight,
        past,
    )


def finish(key, loss, grads, acceptance, state):
    """Resample, estimate log Z and note what happened: the end of both steps."""
    ess = island_ess(state.log_weight)
    low = ess < ESS_THRESHOLD
    position, potential, log_weight, past = resample(
        key, low, state.position, state.potential, state.log_weight, state.past
    )
    log_zs = past + log_mean_exp(log_weight, 1)
    log_z, stderr = jackknife(log_zs[NUM_TRAINING:])
    state = state._replace(
        position=position,
        potential=potential,
        log_weight=log_weight,
        past=past,
        log_z=log_z,
    )
    return state, {
        "loss": loss,
        "ess": 1 / jnp.mean(1 / ess[:NUM_TRAINING]),
        "ess_holdout": 1 / jnp.mean(1 / ess[NUM_TRAINING:]),
        "log_normalizer": log_z,
        "log_normalizer_stderr": stderr,
        "log_normalizer_training": jackknife(log_zs[:NUM_TRAINING])[0],
        "update_scale": state.scale,
        "resampled": low.sum(),
        "acceptance": acceptance,
        "grad_norm": optax.tree.norm(grads),
    }


def mixture_step(optim, base, state, data):
    """One update of the mixture: ULA, weights, no control of the update."""
    _, key_move, key_resample, key = random.split(state.key, 4)
    means, scale, logits = base

    def log_base(x):
        z = (x[..., None, :] - means) / scale
        log_normal = -0.5 * z**2 - jnp.log(jnp.sqrt(2 * jnp.pi) * scale)
        log_joint = log_normal.sum(-1) + jax.nn.log_softmax(logits)
        # The guard is NumPyro's: the base is one of its distributions on the other
        # side.
        return logsumexp(
            jnp.where(jnp.isneginf(log_joint), -jnp.inf, log_joint), axis=-1
        )

    def energy(params, x):
        to_first = ((x - params["first"]) ** 2).sum(-1)
        to_second = ((x - params["second"]) ** 2).sum(-1) + 2 * params["log_mass"]
        return -logsumexp(-0.5 * jnp.stack([to_first, to_second]), axis=0) + log_base(x)

    def potential_at(params, x):
        return energy(params, x) - log_base(x)

    # Gradient
    loss, grads = jax.value_and_grad(lambda params: potential_at(params, data).sum())(
        state.params
    )
    loss = loss + len(data) * state.log_z
    grads = jax.tree.map(lambda g, z: g + len(data) * z, grads, state.gradient)
    updates, optim_state = optim.update(grads, state.optim_state, state.params)
    params = optax.apply_updates(state.params, updates)

    # Switch
    potential, pull = jax.vjp(potential_at, params, state.position)
    log_weight = state.log_weight + islands(state.potential - potential)
    slope = pull(jnp.ones_like(potential))[1]
    gradient = pull(training_cotangent(log_weight))[0]

    # Move
    position = langevin(
        random.fold_in(key_move, 0), state.position, slope, state.step_size
    )
    moved, pull = jax.vjp(partial(potential_at, params), position)
    (moved_slope,) = pull(jnp.ones_like(moved))
    ratio = log_ratio(
        state.position, potential, slope, position, moved, moved_slope, state.step_size
    )
    log_weight = log_weight + islands(ratio)

    state = state._replace(
        params=params,
        optim_state=optim_state,
        position=position,
        potential=moved,
        log_weight=log_weight,
        gradient=gradient,
        key=key,
    )
    return finish(random.fold_in(key_resample, 0), loss, grads, jnp.ones(()), state)


def subsample(key, size, num):
    """The rows of a mini-batch: the last of a partial Fisher-Yates shuffle, as
    NumPyro's plate draws them on a CPU."""
    keys = random.split(key, num)

    def swap(rows, index):
        last = size - index - 1
        other = random.randint(keys[index], (), 0, last + 1)
        return rows.at[jnp.array([last, other])].set(
            rows[jnp.array([other, last])]
        ), None

    return lax.scan(swap, jnp.arange(size), jnp.arange(num))[0][-num:]


def net_step(optim, base, state, data):
    """One update of the density net: MALA, conditional-ESS control, mini-batches."""
    key_model, key_move, key_resample, key = random.split(state.key, 4)
    loc, factor, whiten = base
    log_det = jnp.log(jnp.diagonal(factor)).sum()

    def net(params, x):
        layers = params["net$params"]
        for name in ("Dense_0", "Dense_1"):
            x = jax.nn.swish(x @ layers[name]["kernel"] + layers[name]["bias"])
        return (x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"])[..., 0]

    def log_base(x):
        z = solve_triangular(factor, (x - loc).T, lower=True)
        return -0.5 * (z**2).sum(0) - log_det - 0.5 * PIXELS * jnp.log(2 * jnp.pi)

    def potential_of_value(params, x):
        return net(params, (x - loc) @ whiten) - log_base(x)

    def potential_at(params, u):
        return potential_of_value(params, loc + u @ factor.T) - log_det

    # Gradient
    key_next, key_rows = random.split(key_model)
    _, key_noise = random.split(key_next)
    batch = data[subsample(key_rows, NUM_ROWS, BATCH)]
    batch = (batch + random.uniform(key_noise, batch.shape)) / 17.0
    weight = NUM_ROWS / BATCH
    loss, grads = jax.value_and_grad(
        lambda params: weight * potential_of_value(params, batch).sum()
    )(state.params)
    loss = loss + NUM_ROWS * state.log_z
    grads = jax.tree.map(lambda g, z: g + NUM_ROWS * z, grads, state.gradient)
    updates, optim_state = optim.update(grads, state.optim_state, state.params)

    # Switch
    def switch(scale):
        params = optax.apply_updates(
            state.params, jax.tree.map(lambda u: scale * u, updates)
        )
        potential, pull = jax.vjp(potential_at, params, state.position)
        increment = islands(state.potential - potential)
        log_weight = state.log_weight + increment
        slope = pull(jnp.ones_like(potential))[1]
        gradient = pull(training_cotangent(log_weight))[0]
        ess = conditional_ess(state.log_weight[:NUM_TRAINING], increment[:NUM_TRAINING])
        return (scale, params, potential, slope, log_weight, gradient), ess

    recovered = jnp.minimum(1.0, 1.01 * state.scale)
    first, ess = switch(recovered)
    shrink = jnp.sqrt((1 - ESS_TARGET) / (1 - ess))
    scale, params, potential, slope, log_weight, gradient = lax.cond(
        ess < ESS_TARGET, lambda: switch(recovered * shrink)[0], lambda: first
    )

    # Move
    def move(carry, key):
        x, potential_x, slope_x, acceptance = carry
        key_proposal, key_accept = random.split(key)
        y = langevin(key_proposal, x, slope_x, state.step_size)
        potential_y, pull = jax.vjp(partial(potential_at, params), y)
        (slope_y,) = pull(jnp.ones_like(potential_y))
        ratio = log_ratio(
            x, potential_x, slope_x, y, potential_y, slope_y, state.step_size
        )
        accept = jnp.log1p(-random.uniform(key_accept, ratio.shape)) < ratio
        x = jnp.where(accept[..., None], y, x)
        slope_x = jnp.where(accept[..., None], slope_y, slope_x)
        potential_x = jnp.where(accept, potential_y, potential_x)
        return (
            x,
            potential_x,
            slope_x,
            acceptance + jnp.exp(jnp.minimum(ratio, 0.0)),
        ), None

    start = (state.position, potential, slope, jnp.zeros_like(potential))
    keys = random.split(random.fold_in(key_move, 0), NUM_MOVES)
    (position, potential, _, acceptance), _ = lax.scan(move, start, keys)
    acceptance = islands(acceptance)[:NUM_TRAINING].mean() / NUM_MOVES

    state = state._replace(
        params=params,
        optim_state=optim_state,
        position=position,
        potential=potential,
        log_weight=log_weight,
        gradient=gradient,
        step_size=state.step_size * jnp.exp(0.05 * (acceptance - 0.574)),
        scale=scale,
        key=key,
    )
    return finish(random.fold_in(key_resample, 0), loss, grads, acceptance, state)


# --- The package's side ---------------------------------------------------------------


def mixture_problem(num_walkers):
    init = gmm50.initial_params(0)
    optim = gmm50.sgd()
    backend = ebm.Jarzynski(
        gmm50.make_model(init),
        optim,
        kernel=ebm.ULA(ULA_STEP),
        num_chains=NUM_CHAINS,
        num_walkers=num_walkers,
        num_holdout_chains=NUM_HOLDOUT,
        ess_target=None,
        ess_threshold=ESS_THRESHOLD,
    )
    means = jnp.stack([init["first"], init["second"]])
    base = means, jnp.ones_like(means), jnp.stack([0.0, -init["log_mass"]])
    return backend, gmm50.make_data(0), partial(mixture_step, optim, base)


def net_problem(num_walkers):
    rows = np.random.default_rng(0).integers(0, 17, (NUM_ROWS, PIXELS))
    data = jnp.asarray(rows, jnp.float32)
    base = gaussian(data, random.key(1))
    whiten = jnp.linalg.inv(base.scale_tril).T

    def model(x):
        net = flax_module("net", Net(1), input_shape=(PIXELS,))
        energy = lambda v: net((v - base.loc) @ whiten)[..., 0]  # noqa: E731
        with numpyro.plate("rows", x.shape[0], subsample_size=BATCH):
            batch = dequantise(numpyro.prng_key(), numpyro.subsample(x, event_dim=1))
            numpyro.sample("x", ebm.EnergyDistribution(energy, base), obs=batch)

    optim = optax.adamw(
        optax.cosine_decay_schedule(1e-3, 12_000, 0.02), weight_decay=1e-4
    )
    backend = ebm.Jarzynski(
        model,
        optim,
        num_chains=NUM_CHAINS,
        num_walkers=num_walkers,
        num_holdout_chains=NUM_HOLDOUT,
        num_kernel_steps=NUM_MOVES,
        ess_target=ESS_TARGET,
        ess_threshold=ESS_THRESHOLD,
    )
    return backend, data, partial(net_step, optim, (base.loc, base.scale_tril, whiten))


PROBLEMS = {"mixture": mixture_problem, "net": net_problem}


def to_hand(state):
    """The package's state as the hand-written step keeps it."""
    walkers = state.walkers["x"]
    ensemble = walkers.ensemble
    return HandState(
        state.params,
        state.optim_state,
        ensemble.position.reshape(ensemble.log_weight.size, -1),
        ensemble.potential.ravel(),
        ensemble.log_weight,
        ensemble.past,
        walkers.gradient,
        walkers.log_normalizer()[0],
        walkers.tuning,
        state.update_scale,
        state.rng_key,
    )


# --- The comparison -------------------------------------------------------------------


class Sides(NamedTuple):
    """Both updates and both loops; a loop takes a state, which it consumes, and a
    number of steps."""

    state: Any
    update: Any
    hand_update: Any
    loop: Any
    hand_loop: Any
    lower_loop: Any
    lower_hand_loop: Any


def prepare(problem, num_walkers):
    backend, data, hand_step = PROBLEMS[problem](num_walkers)
    arguments = Arguments((data,))

    @partial(jax.jit, static_argnums=2, donate_argnums=0)
    def hand_scan(state, data, num_steps):
        return lax.scan(
            lambda state, _: hand_step(state, data), state, length=num_steps
        )

    state = backend.init(random.key(0), data)
    return Sides(
        state,
        jax.jit(backend.update).lower(state, data),
        jax.jit(hand_step).lower(to_hand(state), data),
        lambda state, num_steps: run_chunk(backend, state, arguments, num_steps),
        lambda state, num_steps: hand_scan(state, data, num_steps),
        lambda num_steps: run_chunk.lower(backend, state, arguments, num_steps),
        lambda num_steps: hand_scan.lower(to_hand(state), data, num_steps),
    )


def copied(state):
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def check(problem, num_walkers, num_steps):
    """Both sides from one state: the same trajectory at first, the same statistics
    later."""
    sides = prepare(problem, num_walkers)
    state, history, _, _ = sides.loop(copied(sides.state), num_steps)
    hand, hand_history = sides.hand_loop(copied(to_hand(sides.state)), num_steps)
    flat, hand_flat, start = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree.params)])
        for tree in (state, hand, sides.state)
    )
    gap = np.linalg.norm(flat - hand_flat) / np.linalg.norm(flat - start)
    print(
        f"\n{problem}, {NUM_CHAINS * num_walkers} walkers, {num_steps} steps from one "
        "state on both sides"
    )
    print(f"  parameters differ by {gap:.1e} of the distance travelled")
    print(
        "  diagnostic               |   step 1: package    by hand | mean of the last "
        "half: package    by hand"
    )
    half = num_steps // 2
    for name, by_hand in hand_history.items():
        package = (
            history[name]["x"] if isinstance(history[name], dict) else history[name]
        )
        package, by_hand = np.asarray(package)[:num_steps], np.asarray(by_hand)
        print(
            f"  {name:<24} | {package[0]:17.6g} {by_hand[0]:10.6g} | "
            f"{package[half:].mean():30.6g} {by_hand[half:].mean():10.6g}"
        )
    if problem == "net":
        # The loss does not depend on the output bias: Adam walks it on rounding errors,
        # and log Z with it.
        (package,), (by_hand,) = (
            side.params["net$params"]["Dense_2"]["bias"] for side in (state, hand)
        )
        package, by_hand = (
            package + history["log_normalizer"]["x"][num_steps - 1],
            by_hand + hand.log_z,
        )
        print(f"  log Z + output bias, last step: {package:.6g} and {by_hand:.6g}")


def timed(loop, state, num_steps):
    state = copied(state)
    began = time.perf_counter()
    out = jax.block_until_ready(loop(state, num_steps))
    return time.perf_counter() - began, out[0]


def quartiles(ratios):
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def measure(problem, num_walkers, *, max_pairs, seconds_per_run, seconds_in_all):
    sides = prepare(problem, num_walkers)
    update, hand_update = sides.update.compile(), sides.hand_update.compile()
    # Compile and warm up, then choose how long one run is.
    seconds, state = np.inf, sides.state
    for _ in range(4):
        elapsed, state = timed(sides.loop, state, 2)
        seconds = min(seconds, elapsed / 2)
    num_steps = max(2, min(1_000, round(seconds_per_run / seconds)))
    num_pairs = int(max(5, min(max_pairs, seconds_in_all // (3 * num_steps * seconds))))
    timed(sides.hand_loop, to_hand(state), num_steps)

    # Every triple starts from one state: the package, the hand-written loop and the
    # hand-written loop again, in rotating order.
    rows = []
    for pair in range(num_pairs):
        runs = [
            (sides.loop, state),
            (sides.hand_loop, to_hand(state)),
            (sides.hand_loop, to_hand(state)),
        ]
        row = [0.0] * 3
        for place in range(3):
            which = (pair + place) % 3
            row[which], last = timed(*runs[which], num_steps)
            if which == 0:
                state = last
        rows.append(row)
    package, hand, again = np.array(rows).T
    nearest = np.where(
        np.arange(num_pairs) % 3 == 1, again, hand
    )  # the hand-written run next to the package's

    flops = [compiled.cost_analysis()["flops"] for compiled in (update, hand_update)]
    memory = [
        compiled.memory_analysis().temp_size_in_bytes
        for compiled in (update, hand_update)
    ]
    loops = [
        lower(num_steps).compile()
        for lower in (sides.lower_loop, sides.lower_hand_loop)
    ]
    loop_memory = [compiled.memory_analysis().temp_size_in_bytes for compiled in loops]
    headline = " *" if HEADLINE[problem] == num_walkers else ""
    columns = (
        f"{problem + headline:<9}",
        f"{NUM_CHAINS * num_walkers:7d}",
        f"{num_pairs:3d} x {num_steps:<4d}",
        f"{1e3 * np.median(package) / num_steps:11.2f} "
        f"{1e3 * np.median(hand) / num_steps:8.2f}",
        f"{quartiles(package / nearest)}",
        f"{quartiles(again / hand)}",
        f"{flops[0] / flops[1]:.4f} ({flops[1]:.3g})",
        f"{memory[0] / memory[1]:.3f} ({memory[1] / 1e6:6.2f} MB)",
        f"{loop_memory[0] / loop_memory[1]:.3f} ({loop_memory[1] / 1e6:6.2f} MB)",
    )
    print(" | ".join(columns), flush=True)


HEADER = """
* headline size. Bars: time ratio 1.05 at it, 1.1 elsewhere; flops 1 ± 0.01; memory 1.1.
problem   | walkers | pairs x st | ms: package  by hand | time ratio (quartiles) | hand \
against itself  | flops (hand)      | memory, update    | memory, loop"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS)
    )
    parser.add_argument(
        "--walkers", nargs="+", type=int, default=[64, 625, 6_250], help="per island"
    )
    parser.add_argument(
        "--pairs", type=int, default=60, help="at most; fewer at 10⁵ walkers"
    )
    parser.add_argument("--seconds", type=float, default=0.25, help="length of one run")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="skip the comparison of the two trajectories",
    )
    options = parser.parse_args()
    if not options.no_check:
        for problem in options.problems:
            check(problem, HEADLINE[problem], 200)
    print(HEADER)
    for problem in options.problems:
        for num_walkers in options.walkers:
            headline = HEADLINE[problem] == num_walkers
            measure(
                problem,
                num_walkers,
                max_pairs=options.pairs,
                seconds_per_run=options.seconds,
                seconds_in_all=np.inf if headline else 240,
            )


if __name__ == "__main__":
    main()
