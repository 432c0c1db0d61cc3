"""Energies on mixtures against flows that were given the same time, on held-out rows.

    pip install flowjax
    python benchmarks/flows.py DATA_FOLDER [SET ...] [--seeds 2] [--bound 5] [--on-flow]

Rows, mixtures and tilted fits are those of tilt.py.  Then flows of flowjax, coupling and
autoregressive with rational quadratic splines, train on the same rows for as long as
the tilted fit took, each: Adam on a cosine to 0 over the updates that this time buys,
fresh noise for integer rows, rows standardised, the best average by validation density
kept.  The better one on the validation rows meets the test rows.  ``--on-flow`` puts the
energy on the coupling flow besides.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.bijections import Affine, RationalQuadraticSpline
from flowjax.distributions import StandardNormal, Transformed
from flowjax.experimental.numpyro import distribution_to_numpyro
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from jax import lax, random
from tilt import (
    BY_BASE,
    SETS,
    arguments,
    load,
    mean_log_density,
    mixtures,
    tilted,
    values_of,
)

import ebm_ppl as ebm

BATCH = 256
LOOK_EVERY = 100
FLOWS = {"coupling": coupling_flow, "autoregressive": masked_autoregressive_flow}


def untrained(kind, train):
    """A flow in coordinates in which the rows are standardised."""
    num_columns = train.shape[1]
    flow = FLOWS[kind](
        random.key(0),
        base_dist=StandardNormal((num_columns,)),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
        flow_layers=6,
        nn_width=64,
    )
    scale = Affine(jnp.asarray(train.mean(0)), jnp.asarray(train.std(0)))
    return Transformed(flow, paramax.non_trainable(scale))


def parts(flow):
    return eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )


class Training:
    """Updates of one flow, a hundred per call, and its density of the validation rows."""

    def __init__(self, flow, rows, valid, num_updates):
        self.params, self.static = parts(flow)
        rate = optax.cosine_decay_schedule(1e-3, num_updates)
        self.optim = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(rate))
        self.state = self.optim.init(self.params)
        self.average = self.params
        self.rows, self.valid = rows, jnp.asarray(valid)
        self.density = jax.jit(lambda p, x: jnp.mean(self.log_prob(p, x)))
        self.many = jax.jit(self._many)

    def log_prob(self, params, x):
        return paramax.unwrap(eqx.combine(params, self.static)).log_prob(x)

    def _many(self, params, state, average, key):
        def update(carry, key):
            params, state, average = carry
            key_batch, key_noise = random.split(key)
            raw = jnp.asarray(self.rows.train)
            batch = raw[random.choice(key_batch, len(raw), (BATCH,))]
            x = self.rows.values(batch, key_noise)
            slope = jax.grad(lambda p: -jnp.mean(self.log_prob(p, x)))(params)
            step, state = self.optim.update(slope, state, params)
            params = optax.apply_updates(params, step)
            average = optax.incremental_update(params, average, 0.01)
            return (params, state, average), None

        keys = random.split(key, LOOK_EVERY)
        return lax.scan(update, (params, state, average), keys)[0]

    def advance(self, key):
        carry = self.many(self.params, self.state, self.average, key)
        self.params, self.state, self.average = carry
        return float(self.density(self.average, self.valid))


def trained(kind, rows, train, valid, seconds):
    """The best average that so much time found, compilation left out of it."""
    # Its time per update
    probe = Training(untrained(kind, train), rows, valid, 1000)
    probe.advance(random.key(0))
    began = time.perf_counter()
    probe.advance(random.key(1))
    num_looks = max(1, int(seconds / (time.perf_counter() - began)))

    # The same again, on a cosine that ends with the time
    run = Training(untrained(kind, train), rows, valid, num_looks * LOOK_EVERY)
    best, kept, step = -np.inf, run.average, 0
    for look in range(num_looks):
        density = run.advance(random.key(2 + look))
        if density > best:
            best, kept, step = density, run.average, (look + 1) * LOOK_EVERY
    flow = paramax.unwrap(eqx.combine(kept, run.static))
    return best, f"{kind}, step {step} of {num_looks * LOOK_EVERY}", flow


def mean_score(flow, x):
    densities = eqx.filter_jit(lambda flow, x: flow.log_prob(x))(flow, jnp.asarray(x))
    return float(jnp.mean(densities))


def report(name, asked):
    rows = load(asked.folder, name)
    train, valid, test = values_of(rows)
    mixture = mixtures(train, valid)[0][2]
    base = ebm.from_sklearn(mixture)
    print(f"{name}: mixture {mixture.score(test):.2f} on test", flush=True)

    # Energies on the mixture
    densities, seconds = [], []
    for seed in range(asked.seeds):
        began = time.perf_counter()
        fit, model = tilted(base, rows, asked, seed)
        seconds.append(time.perf_counter() - began)
        densities.append(mean_log_density(fit, model, rows.test, **BY_BASE)[1])
        jax.clear_caches()
    texts = ", ".join(f"{density:.2f}" for density in densities)
    print(f"  tilted {texts} ({np.mean(seconds):.0f} s a fit)", flush=True)

    # Flows
    flows = {
        kind: trained(kind, rows, train, valid, np.mean(seconds)) for kind in FLOWS
    }
    scores = {kind: mean_score(flow, test) for kind, (_, _, flow) in flows.items()}
    chosen = max(flows, key=lambda kind: flows[kind][0])
    score = scores[chosen]
    texts = ", ".join(f"{kind} {value:.2f}" for kind, value in scores.items())
    print(
        f"  flows {texts}; by validation {flows[chosen][1]}: {score:.2f}; tilted mixtures "
        f"stand {np.min(densities) - score:+.2f} or more over it",
        flush=True,
    )

    # The energy on a flow
    if asked.on_flow:
        base = distribution_to_numpyro(flows["coupling"][2])
        began = time.perf_counter()
        fit, model = tilted(base, rows, asked, 0)
        seconds = time.perf_counter() - began
        log_z, density = mean_log_density(fit, model, rows.test, **BY_BASE)
        print(
            f"  on the coupling flow {density:.2f}, {density - scores['coupling']:+.2f} "
            f"over it ({seconds:.0f} s); log Z {float(log_z.estimate['x']):.3f} ± "
            f"{float(log_z.stderr['x']):.3f}",
            flush=True,
        )
    jax.clear_caches()


def main():
    parser = arguments()
    parser.add_argument("--on-flow", action="store_true")
    asked = parser.parse_args()
    for name in asked.names or SETS:
        report(name, asked)


if __name__ == "__main__":
    main()
