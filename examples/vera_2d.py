"""Two-dimensional densities by VERA: an energy, its generator, and both refined by
MALA.

Two moons and two circles.  A small net is the energy over the Gaussian of the data,
another turns two latents into draws.  After training, log Z comes from annealed
walkers, which never look at the generator: held-out log-likelihoods are normalised and
certified, beside the Gaussian's and a 20-component mixture's.

Prints the table, writes one figure (data, energy surface with the generator's draws,
these draws after MALA) and NetCDF files, and ends with ArviZ's summary of the refined
draws.

    python examples/vera_2d.py [--steps 6000] [--output examples/output]
"""

import argparse
import pathlib
import time
from functools import partial

import arviz as az
import flax.linen as nn
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from sklearn.datasets import make_circles, make_moons
from sklearn.mixture import GaussianMixture

import ebm_ppl as ebm

NUM_LATENTS = 2
DATA = {
    "moons": lambda n, seed: make_moons(n, noise=0.08, random_state=seed)[0],
    "circles": lambda n, seed: (
        2 * make_circles(n, noise=0.06, factor=0.45, random_state=seed)[0]
    ),
}


class Net(nn.Module):
    """Three hidden layers; ``last`` initialises the output layer."""

    outputs: int
    last: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.swish(nn.Dense(128)(x))
        return nn.Dense(self.outputs, kernel_init=self.last)(x)


ENERGY_NET = Net(1, last=nn.initializers.zeros)


def make_energy(base, net):
    """The net sees whitened points and starts at zero, so the model starts at its
    base."""
    return ebm.EnergyDistribution(
        lambda v: net((v - base.mean) / base.variance**0.5)[..., 0], base
    )


def make_model(base):
    def model(x):
        net = flax_module("net", ENERGY_NET, input_shape=(2,))
        with numpyro.plate("rows", len(x), subsample_size=256):
            numpyro.sample(
                "x", make_energy(base, net), obs=numpyro.subsample(x, event_dim=1)
            )

    return model


def make_generator(base):
    def generator():
        net = flax_module("generator", Net(2), input_shape=(NUM_LATENTS,))
        scale = numpyro.param("scale", 0.3, constraint=constraints.interval(0.01, 1.0))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([NUM_LATENTS]).to_event(1))
        numpyro.sample("x", ebm.standardized_normal(base, net(z), scale))

    return generator


def fit_one(name, options):
    """Fit one density, print its row of the table, save its data; what the figure
    shows."""
    steps = options.steps
    train, test = (
        DATA[name](size, seed).astype(np.float32)
        for size, seed in ((4_000, 0), (2_000, 1))
    )
    base = dist.Normal(train.mean(0), train.std(0)).to_event(1)
    model = make_model(base)
    # No momentum: two players who chase each other circle with it.  A light gradient
    # penalty: thin shapes need steep energies.
    optim, generator_optim = (
        optax.adam(optax.cosine_decay_schedule(rate, steps, 0.05), b1=0.0, b2=0.9)
        for rate in (5e-4, 1e-3)
    )
    backend = ebm.VERA(
        model,
        make_generator(base),
        optim,
        generator_optim,
        num_particles=options.particles,
        gradient_penalty=0.01,
    )
    began = time.perf_counter()
    fit = backend.run(random.key(0), steps, train)
    seconds = time.perf_counter() - began

    log_z = ebm.log_normalizer(
        random.key(1),
        model,
        fit.params,
        train,
        num_walkers=options.walkers,
        num_temperatures=options.temperatures,
    )
    _, drawn = fit.state.draws(random.key(2), 2_000)
    # Many short chains, each from a draw of the generator.
    refined = ebm.sample(
        random.key(3),
        model,
        fit.params,
        train,
        method="mala",
        num_chains=200,
        num_draws=20,
        initial={"x": drawn[:200]},
    )
    # With the test data as observed data: their normalised mean log density is among
    # the attributes.
    idata = ebm.to_arviz(
        fit, model, test, log_normalizer=log_z, draws=refined, allow_uncertified=True
    )
    idata.to_netcdf(options.output / f"vera_{name}.nc")
    mixture = GaussianMixture(20, random_state=0).fit(train).score(test)
    print(
        f"{name}: test log-likelihood {idata.attrs['mean_log_density']:.3f} ± "
        f"{float(log_z.stderr['x']):.3f} "
        f"({'certified' if log_z.is_certified else 'NOT certified'}); mixture of 20 "
        f"Gaussians {mixture:.3f}; the base {float(base.log_prob(test).mean()):.3f}; "
        f"log Z {float(log_z.estimate['x']):.3f}, the generator's bound "
        f"{float(fit.state.log_normalizer_bound):.3f}; {steps} updates in "
        f"{seconds:.0f} s"
    )
    return fit, idata, base, train, drawn, refined["x"]


def draw_row(axes, name, fit, base, train, drawn, refined):
    energy = make_energy(
        base, partial(ENERGY_NET.apply, {"params": fit.params["net$params"]})
    )
    for ax, points, title in zip(
        axes,
        (train[:2_000], drawn, refined.reshape(-1, 2)[::2]),
        (f"{name}: data", "energy and the generator's draws", "the same after MALA"),
        strict=True,
    ):
        if ax is axes[1]:
            ebm.plot_energy_surface(energy, samples=points, ax=ax)
        else:
            ax.scatter(*np.asarray(points).T, s=2, alpha=0.5)
        ax.set_title(title, fontsize=9)
    axes[2].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--names", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--temperatures", type=int, default=512)
    parser.add_argument("--walkers", type=int, default=64)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "output"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    num_rows = len(options.names)
    figure, axes = plt.subplots(
        num_rows, 3, figsize=(10, 3.4 * num_rows), layout="constrained", squeeze=False
    )
    for name, row in zip(options.names, axes, strict=True):
        fit, idata, base, train, drawn, refined = fit_one(name, options)
        draw_row(row, name, fit, base, train, drawn, refined)
    figure.savefig(options.output / "vera_2d.png", dpi=120)
    plt.close(figure)
    print(f"figure and data: {options.output}")
    print(az.summary(idata, group="posterior_predictive"))


if __name__ == "__main__":
    main()
