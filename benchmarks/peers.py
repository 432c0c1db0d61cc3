"""Time of an update beside the PyTorch packages that do the same.

    pip install torch torchebm ebmkit
    python benchmarks/peers.py [--pairs 15] [--updates 20] [--rows NAME ...]
    python benchmarks/peers.py --memory

One net (16 inputs, two hidden layers of 256 with SiLU), batches of 256 rows, Adam; 256
chains of 40 unadjusted Langevin moves where there are chains.  Persistent contrastive
divergence, contrastive divergence from the rows (torchebm; ebmkit has it from noise, as
method="base"), score matching: sliced with one direction, denoising, and exact.
Printed: milliseconds per update and the median (quartiles) of paired ratios, package
over peer, measured in turns in one process after all have run once.  ``--memory``: the
largest resident memory of a process that does one of them alone.
"""

import argparse
import itertools
import resource
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints

import ebm_ppl as ebm

DIM, HIDDEN, BATCH, MOVES, STEP = 16, 256, 256, 40, 1e-2
SIGMA = 0.1
X = np.random.default_rng(0).normal(size=(BATCH, DIM)).astype(np.float32)
FLAT = dist.ImproperUniform(constraints.real_vector, (), (DIM,))
START = dist.Normal(jnp.zeros(DIM), 1.0).to_event(1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.silu(nn.Dense(HIDDEN)(x))
        return nn.Dense(1)(x)[..., 0]


def model(x):
    net = flax_module("net", Net(), input_shape=(DIM,))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(net, FLAT, start=START), obs=x)


def by_package(make):
    """A function of the number of updates."""
    backend, x = make(model, optax.adam(1e-3)), jnp.asarray(X)
    state = backend.init(random.key(0), x)

    @partial(jax.jit, static_argnums=1)
    def loop(state, num):
        return lax.fori_loop(0, num, lambda _, s: backend.update(s, x)[0], state)

    def run(num):
        nonlocal state
        state = jax.block_until_ready(loop(state, num))

    return run


def torch_net():
    import torch

    torch.manual_seed(0)
    sizes = [DIM, HIDDEN, HIDDEN, 1]
    layers = []
    for one, other in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(one, other), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers[:-1])


def by_torch(net, loss_of):
    import torch

    optim, x = torch.optim.Adam(net.parameters(), 1e-3), torch.from_numpy(X)

    def run(num):
        for _ in range(num):
            optim.zero_grad()
            loss_of(x).backward()
            optim.step()

    return run


def by_torchebm(name):
    import torchebm.core
    import torchebm.losses as losses
    import torchebm.samplers as samplers

    inner = torch_net()

    class Energy(torchebm.core.BaseModel):
        def __init__(self):
            super().__init__()
            self.net = inner

        def forward(self, x, *args, **kwargs):
            return self.net(x)[..., 0]

    net = Energy()
    if name in ("PCD", "CD"):
        sampler = samplers.LangevinDynamics(net, step_size=STEP)
        loss = losses.ContrastiveDivergence(
            net,
            sampler,
            k_steps=MOVES,
            persistent=name == "PCD",
            buffer_size=BATCH,
            new_sample_ratio=0.0,
            energy_reg_weight=0.0,
        )
        return by_torch(net, lambda x: loss(x)[0])
    loss = {
        "sliced": partial(losses.SlicedScoreMatching, n_projections=1),
        "denoising": partial(losses.DenoisingScoreMatching, noise_scale=SIGMA),
        "exact": losses.ScoreMatching,
    }[name](net)
    return by_torch(net, loss)


def by_ebmkit(name):
    import ebm as kit

    net = torch_net()
    energy = lambda x: net(x)[..., 0]  # noqa: E731
    if name in ("PCD", "short runs"):
        sampler = kit.LangevinDynamics(step_size=STEP, steps=MOVES)
        buffer = kit.ReplayBuffer(BATCH, (DIM,), reinit_prob=0.0)
        loss = kit.ContrastiveDivergence(sampler, buffer if name == "PCD" else None)
    else:
        loss = {
            "sliced": kit.SlicedScoreMatching,
            "denoising": partial(kit.DenoisingScoreMatching, sigma=SIGMA),
            "exact": kit.ExactScoreMatching,
        }[name]()
    return by_torch(net, lambda x: loss(energy, x).loss)


WALKS = partial(
    ebm.ContrastiveDivergence,
    kernel=ebm.ULA(STEP),
    num_walkers=BATCH,
    num_kernel_steps=MOVES,
)
# By row: the package's way, and the peers that have it.
ROWS = {
    "PCD": (WALKS, (by_torchebm, by_ebmkit)),
    "CD": (partial(WALKS, method="data"), (by_torchebm,)),
    "short runs": (partial(WALKS, method="base"), (by_ebmkit,)),
    "sliced": (
        partial(ebm.ScoreMatching, method="sliced"),
        (by_torchebm, by_ebmkit),
    ),
    "denoising": (
        partial(ebm.ScoreMatching, method="denoising", noise_scale=SIGMA),
        (by_torchebm, by_ebmkit),
    ),
    "exact": (ebm.ScoreMatching, (by_torchebm, by_ebmkit)),
}


def timed(run, num):
    began = time.perf_counter()
    run(num)
    return (time.perf_counter() - began) / num


def quartiles(values):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def compare(name, num_pairs, num_updates):
    make, peers = ROWS[name]
    runs = {"package": by_package(make)}
    runs |= {peer.__name__.removeprefix("by_"): peer(name) for peer in peers}
    for run in runs.values():
        run(num_updates)
    times = {key: [] for key in runs}
    for _ in range(num_pairs):
        for key, run in runs.items():
            times[key].append(timed(run, num_updates))

    told = ", ".join(f"{k} {1e3 * np.median(t):.2f} ms" for k, t in times.items())
    print(f"{name}: {told}")
    ours = np.array(times.pop("package"))
    for key, theirs in times.items():
        print(f"  package / {key}: {quartiles(ours / np.array(theirs))}", flush=True)


def memory_of(name, who):
    """In MiB, of this process after a hundred updates."""
    make, _ = ROWS[name]
    run = by_package(make) if who == "package" else globals()[who](name)
    run(100)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--alone", help="who does a row, for its memory")
    asked = parser.parse_args()

    if asked.alone:
        memory_of(asked.rows[0], asked.alone)
        return
    names = ("torch", "torchebm", "ebmkit", "jax", "ebm_ppl")
    print(", ".join(f"{name} {version(name)}" for name in names))
    for name in asked.rows:
        if not asked.memory:
            compare(name, asked.pairs, asked.updates)
            continue
        for who in ("package", *(peer.__name__ for peer in ROWS[name][1])):
            command = [sys.executable, __file__, "--rows", name, "--alone", who]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name}, {who.removeprefix('by_')}: {done.stdout.strip()} MiB")


if __name__ == "__main__":
    main()
