"""One energy, three routes: what `numpyro.factor` gets wrong and what the package makes
of it.

E(x) = λx²/2 with prior λ ~ Gamma(2, 2) and 40 data points.  The closed forms: maximum
likelihood 3.275, MAP 2.590, posterior mean 2.714, LOO of the normalised model -34.24.

    python benchmarks/precision.py
"""

import warnings

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood

import ebm_ppl as ebm

X = np.random.default_rng(0).normal(size=40) * 0.7
FLAT = dist.ImproperUniform(constraints.real, (), ())


def precision(prior):
    if prior:
        return numpyro.sample("lam", dist.Gamma(2, 2))
    return numpyro.param("lam", 1.0, constraint=constraints.positive)


def factor_model(x, prior=True):
    lam = precision(prior)
    with numpyro.plate("data", len(x)):
        numpyro.factor("E", -0.5 * lam * x**2)


def energy_model(x=None, prior=True, known=False):
    lam = precision(prior)
    log_z = 0.5 * jnp.log(2 * jnp.pi / lam) if known else None
    energy = ebm.EnergyDistribution(
        lambda v: 0.5 * lam * v**2, FLAT, start=dist.Normal(0, 1), log_normalizer=log_z
    )
    with numpyro.plate("data", len(X)):
        numpyro.sample("x", energy, obs=x)


def svi(model, **kwargs):
    optim = numpyro.optim.Adam(0.05)
    fit = SVI(model, lambda *args, **kwargs: None, optim, Trace_ELBO())
    return float(
        fit.run(
            random.key(0), 2_000, X, prior=False, progress_bar=False, **kwargs
        ).params["lam"]
    )


def nuts(model, **kwargs):
    mcmc = MCMC(
        NUTS(model),
        num_warmup=1_000,
        num_samples=2_000,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), X, **kwargs)
    return mcmc


def loo(mcmc, model, var_name, **kwargs):
    # ArviZ 0.23 and 1.x name the result differently and convert differently; the arrays
    # are the same.
    samples = mcmc.get_samples(group_by_chain=True)
    log_lik = log_likelihood(model, samples, X, batch_ndims=2, **kwargs)[var_name]
    groups = {
        "posterior": {"lam": np.array(samples["lam"])},
        "log_likelihood": {var_name: np.array(log_lik)},
    }
    old = not hasattr(az, "plot_ppc_dist")
    data = az.from_dict(**groups) if old else az.from_dict(groups)
    result = az.loo(data, var_name=var_name, pointwise=True)
    return float(result.elpd_loo if old else result.elpd), float(
        np.max(result.pareto_k)
    )


def refused(call):
    try:
        call()
    except ebm.UnknownNormalizerError:
        return "raises"
    return "RAN"


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)
    scatter = (X**2).sum()
    exact_ml, exact_map = len(X) / scatter, (len(X) / 2 + 1) / (scatter / 2 + 2)
    exact_mean = (len(X) / 2 + 2) / (scatter / 2 + 2)

    wrong = nuts(factor_model)
    wrong_loo, wrong_khat = loo(wrong, factor_model, "E")
    right = nuts(energy_model, known=True)
    right_loo, right_khat = loo(right, energy_model, "x", known=True)

    optim = optax.adam(optax.cosine_decay_schedule(0.03, 2_000))
    backend = ebm.Jarzynski(energy_model, optim, num_walkers=1_000)
    fits = {
        prior: backend.run(random.key(0), 2_000, X, prior=prior, progress_bar=False)
        for prior in (False, True)
    }
    lam = {prior: float(fit.params["lam"]) for prior, fit in fits.items()}

    samples = {"lam": jnp.ones(2)}
    means = [run.get_samples()["lam"].mean() for run in (wrong, right)]
    rows = [
        ("", "factor(-E)", "no log Z", "with the package", "exact"),
        (
            "point estimate, no prior",
            f"{svi(factor_model):.4f}",
            refused(lambda: svi(energy_model)),
            lam[False],
            exact_ml,
        ),
        ("MAP with the Gamma prior", "", "", lam[True], exact_map),
        (
            "NUTS posterior mean",
            f"{means[0]:.3f}",
            refused(lambda: nuts(energy_model)),
            means[1],
            exact_mean,
        ),
        (
            "LOO elpd",
            wrong_loo,
            refused(lambda: log_likelihood(energy_model, samples, X)),
            right_loo,
            -34.24,
        ),
        ("LOO, largest k̂", wrong_khat, "", right_khat, ""),
        (
            "predictive draws of x",
            "",
            refused(lambda: Predictive(energy_model, samples)(random.key(0))),
            "",
            "",
        ),
    ]
    for name, *cells in rows:
        shown = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells]
        print(f"{name:25s} | " + " | ".join(f"{cell:>16}" for cell in shown))
    for prior, fit in fits.items():
        exact, found = (exact_map, lam[True]) if prior else (exact_ml, lam[False])
        log_z, stderr = (
            float(value) for value in fit.state.walkers["x"].log_normalizer()
        )
        truth = 0.5 * np.log(2 * np.pi / found)
        print(
            f"Jarzynski, {'MAP' if prior else 'ML '}: λ off by "
            f"{100 * (found / exact - 1):+.2f}% (bar 1%); log Z(λ) {log_z:.4f} ± "
            f"{stderr:.4f}, exact {truth:.4f}, off by {log_z - truth:+.4f} (bar 0.01)"
        )


if __name__ == "__main__":
    main()
