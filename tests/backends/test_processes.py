"""A state is arrays: it goes to another process and onto several devices.

Run as a script, with what to do and where the arrays lie, this is the other process.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ebm_ppl as ebm
from ebm_ppl.programs.arguments import Arguments

pytestmark = pytest.mark.xdist_group("processes")

X = np.random.default_rng(0).gamma(2.0, 0.5, size=(32, 2)).astype(np.float32)
BASE = dist.Normal(0, 1).expand([2]).to_event(1)
NUM_STEPS = 5


def model(x):
    a = numpyro.param("a", jnp.zeros(2))
    energy = ebm.EnergyDistribution(
        lambda v: 0.25 * (v**4).sum(-1) - (v * a).sum(-1), BASE
    )
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


def generator():
    bias = numpyro.param("bias", jnp.zeros(2))
    z = numpyro.sample("z", BASE)
    numpyro.sample("x", ebm.standardized_normal(BASE, 0.5 * z + bias, 0.5))


BACKENDS = {
    "jarzynski": ebm.Jarzynski(model, optax.adam(0.01), num_walkers=16, renew_every=50),
    "vera": ebm.VERA(
        model, generator, optax.adam(0.01, b1=0.0), optax.adam(0.01, b1=0.0)
    ),
}


def save(path, backend, state):
    ebm.save(path, ebm.Fit(backend.get_params(state), state, {}))


def advance(backend, state, num_steps):
    update = jax.jit(backend.update)
    for _ in range(num_steps):
        state, _ = update(state, X)
    # Fresh islands too.
    return backend.upkeep(state, Arguments((X,), {}))


def spread_over_devices(state, num_chains):
    """Islands over all devices, everything else on each of them."""
    mesh = Mesh(np.array(jax.devices()), ("islands",))

    def place(leaf):
        is_of_islands = jnp.ndim(leaf) > 1 and jnp.shape(leaf)[0] == num_chains
        spec = PartitionSpec("islands") if is_of_islands else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def continue_elsewhere(task, folder, name):
    """What the other process does: load, go on, save."""
    backend = BACKENDS[name]
    state = ebm.load(folder / "state.npz", backend, X).fit.state
    if task == "devices":
        assert len(jax.devices()) == 8
        state = spread_over_devices(state, backend.num_chains)
    after = advance(backend, state, NUM_STEPS)
    if task == "devices":
        old, new = (s.walkers["x"].ensemble.position for s in (state, after))
        assert len(old.sharding.device_set) == 8
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    save(folder / "there.npz", backend, after)


def run_elsewhere(task, folder, name, **environment):
    subprocess.run(
        [sys.executable, __file__, task, str(folder), name],
        check=True,
        env=os.environ | environment,
    )
    return np.load(folder / "there.npz")


@pytest.fixture(scope="module", params=BACKENDS)
def here(request, tmp_path_factory):
    """A state, kept, and where it leads in this process."""
    folder, backend = tmp_path_factory.mktemp(request.param), BACKENDS[request.param]
    state = backend.run(random.key(0), 20, X, progress_bar=False).state
    save(folder / "state.npz", backend, state)
    save(folder / "here.npz", backend, advance(backend, state, NUM_STEPS))
    return folder, request.param


def test_another_process_goes_on_bit_for_bit(here):
    folder, name = here
    there = run_elsewhere("process", folder, name)
    with np.load(folder / "here.npz") as expected:
        assert set(expected) == set(there)
        for key in expected:
            np.testing.assert_array_equal(there[key], expected[key])


@pytest.mark.parametrize("here", ["jarzynski"], indirect=True)
def test_eight_devices_give_the_same_numbers(here):
    folder, name = here
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    there = run_elsewhere("devices", folder, name, XLA_FLAGS=flags)
    with np.load(folder / "here.npz") as expected:
        for key in set(expected) - {"description"}:
            # Sums in another order.
            np.testing.assert_allclose(there[key], expected[key], rtol=2e-4, atol=2e-4)


if __name__ == "__main__":
    continue_elsewhere(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
