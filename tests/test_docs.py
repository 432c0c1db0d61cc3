"""The README, the pages of the documentation and the examples run."""

import importlib.util
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from pages import blocks_of, scope_of

ROOT = pathlib.Path(__file__).parent.parent


def tutorial_is_right(scope):
    assert scope["nuts_mean"](scope["factor_model"]) < 0.5
    assert float(scope["fit"].params["lam"]) == pytest.approx(2.590, rel=0.01)
    assert scope["test"].is_at_maximum
    best = scope["best"]
    assert best.flags == ()
    assert abs(best.params["lam"] - 2.590) < 4 * best.monte_carlo_errors["lam"]
    # λ is fitted on the log scale: its information is n/2 + the prior's b λ.
    error = 2.590 / np.sqrt(20 + 2 * 2.590)
    assert best.standard_errors["lam"] == pytest.approx(error, rel=0.1)


def checking_is_right(scope):
    history, log_z = scope["fit"].history, scope["log_z"]
    for key in ("ess", "ess_holdout"):
        assert history[key]["x"][-100:].mean() > 0.5
    assert history["acceptance"]["x"][-100:].mean() == pytest.approx(0.57, abs=0.05)
    assert scope["islands"]["khat"].max() < 0.7
    assert log_z.upper["x"] - log_z.lower["x"] < 0.2
    assert -0.5 < scope["claimed"] - float(scope["running"].estimate["x"]) < -0.05
    gain = scope["gain"]
    assert float(gain.mean()) == pytest.approx(3.3, abs=0.2)
    assert gain.std() / np.sqrt(len(gain)) < 0.15
    fitted, x, x_test = scope["fitted"], scope["x"], scope["x_test"]
    assert float(fitted.log_prob(x_test).mean()) == pytest.approx(-8, abs=0.3)
    assert float(scope["base"].log_prob(x_test).mean()) == pytest.approx(
        -11.4, abs=0.05
    )
    assert float(
        fitted.log_prob(x).mean() - fitted.log_prob(x_test).mean()
    ) == pytest.approx(0.5, abs=0.2)
    assert scope["summary"]["r_hat"].max() < 1.05
    assert scope["summary"]["ess_bulk"].min() > 500
    assert float(fitted.energy(x).mean() - scope["level"]) == pytest.approx(
        -0.5, abs=0.25
    )
    assert abs(fitted.energy(x_test).mean() - scope["level"]) < 0.25


def using_is_right(scope):
    assert scope["gain"].mean() > 0.5
    far, typical = scope["density"].log_prob(scope["odd"])
    assert typical - far > 3
    # Of the two moons at 1.8 the lower one is there, at about 0.1.
    assert scope["second"].mean() == pytest.approx(0.1, abs=0.15)
    assert np.array_equal(scope["same"], scope["scores"])
    assert len(scope["more"].history["loss"]) == 10
    assert len(scope["first"].history["loss"]) == 200

    # log Z of the chain is −½ log det(I + λ L), L its Laplacian.
    laplacian = np.diff(np.eye(4), axis=0).T @ np.diff(np.eye(4), axis=0)
    rates = np.linspace(0.1, 6.0, 1_000)
    values = np.linalg.eigvalsh(laplacian)
    log_z = -0.5 * np.log1p(rates[:, None] * values).sum(1)
    pull = 0.5 * np.sum(np.diff(scope["rows"]) ** 2)
    posterior = np.log(rates) - rates * (1 + pull) - 8 * log_z
    weights = np.exp(posterior - posterior.max())
    mean = np.sum(weights * rates) / weights.sum()
    assert scope["table"].is_certified
    drawn = np.asarray(scope["mcmc"].get_samples()["stiffness"])
    # A fifth of a nat, and 1,000 draws of which a third counts
    deviation = np.sqrt(np.sum(weights * (rates - mean) ** 2) / weights.sum())
    assert abs(drawn.mean() - mean) < (0.1 + 4 / np.sqrt(333)) * deviation


def regression_is_right(scope):
    scores, truth = scope["scores"], scope["truth"]
    assert scope["log_z"].is_certified
    assert scores.shape == (400,)
    assert -0.1 < scores.mean() - truth.mean() < 0.02
    assert scores.mean() > scope["gaussian"].mean() + 0.3
    mass = np.trapezoid(scope["heights"], scope["values"], axis=0)
    np.testing.assert_allclose(mass, 1, atol=0.03)
    share = np.asarray(scope["draws"] > 0).mean((0, 1))
    # Standard errors of 1,000 draws, and what the fit is off by
    np.testing.assert_allclose(share[1:], 0.3, atol=0.045 + 0.05)


def extending_is_right(scope):
    right = 1 / float(np.mean(scope["x"] ** 2))
    assert float(scope["fit"].params["lam"]) == pytest.approx(right, rel=0.1)
    assert float(scope["walked"].params["lam"]) == pytest.approx(right, rel=0.15)


def concepts_are_right(scope):
    draws = Predictive(scope["generator"], num_samples=50)(random.key(0))["x"]
    assert draws.shape == (50, 2)

    # What the page says cannot be detected is not.
    assert scope["missed"].is_certified
    assert float(scope["missed"].estimate["x"]) == pytest.approx(0, abs=1e-3)
    assert abs(float(scope["mass"]) - 1) > 0.3
    assert float(scope["slope"]) == pytest.approx(-0.5)
    assert float(scope["ratio"]) == pytest.approx(-0.5)
    assert np.isnan(scope["thin"])
    log_joint = log_density(scope["by_hand"], (np.zeros(3),), {}, {"lam": 9.0})[0]
    assert log_joint == 0


def comparing_is_right(scope):
    elpds = {name: elpd(loo) for name, loo in scope["loos"].items()} | {
        "over draws": elpd(scope["loo"])
    }
    expected = {
        "normal": -34.24,
        "energy": -34.24,
        "Laplace energy": -35.5,
        "over draws": -34.24,
    }
    assert elpds == pytest.approx(expected, abs=0.2)
    assert scope["table"].index[-1] == "Laplace energy"
    assert np.abs(scope["log_z"].estimate["x"] - scope["exact"]).max() < 0.03
    assert 40 * np.median(scope["log_z"].stderr["x"]) == pytest.approx(0.1, abs=0.05)
    assert (
        "nats wide in 200 of 200 elements, over the tolerance of 0.001"
        in scope["strict"].flags["x"][-1]
    )


def tilting_is_right(scope):
    """The gain is there, and three ways to log Z agree, the third by a grid."""
    base, log_z, bracket = scope["base"], scope["log_z"], scope["bracket"]
    assert scope["tilted"] - scope["mixture"].score(scope["test"]) > 0.2
    assert log_z.is_certified
    assert bracket.is_certified
    gap = float(log_z.estimate["x"] - bracket.estimate["x"])
    assert abs(gap) < 5 * np.hypot(log_z.stderr["x"], bracket.stderr["x"])

    model, params = scope["model"], scope["fit"].params
    trace = handlers.trace(handlers.seed(handlers.substitute(model, params), 0))
    energy = trace.get_trace(scope["test"])["x"]["fn"].base_dist
    line = np.linspace(-6, 7, 601)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2).astype(np.float32)
    log_density = np.asarray(base.log_prob(grid) - energy.energy(grid), float)
    exact = np.log(np.sum(np.exp(log_density))) + 2 * np.log(line[1] - line[0])
    assert log_z.lower["x"] < exact < log_z.upper["x"]
    assert abs(exact - log_z.estimate["x"]) < 5 * log_z.stderr["x"]


def walkers_are_right(scope):
    """The bias follows the law, and renewal undoes it."""
    paper, renewed, law = scope["paper"], scope["renewed"], scope["law"]
    gaps = [
        fit.history["log_normalizer_training"]["x"] - fit.history["log_normalizer"]["x"]
        for fit in (paper, renewed)
    ]
    assert gaps[0][-200:].mean() == pytest.approx(law[-200:].mean(), rel=0.25)
    assert abs(gaps[1][-200:].mean()) < 0.1
    assert "renew_every" in str(scope["told"][0].message)


def semi_supervised_is_right(scope):
    x = random.normal(random.key(0), (20, 3))
    model = handlers.seed(scope["rows_and_labels"], 0)
    trace = handlers.trace(model).get_trace(
        lambda v: v, dist.Normal(0, 1).expand([3]).to_event(1), x, x[:4], [0, 1, 2, 0]
    )
    chances = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    # Ten labels of each class beside the twenty rows.
    shares = (10 + chances.sum(0)) / 50
    np.testing.assert_allclose(
        trace["y"]["fn"].logits, x[:4] - np.log(shares), rtol=1e-5
    )
    assert trace["y"]["scale"] == pytest.approx(3 * 20 / 4)


def baselines_are_right(scope):
    """What each method knows of a mode's mass, whose standard error is 0.0145."""
    shares, log_z = scope["shares"], scope["log_z"]
    assert shares["score matching"] < 0.1
    assert shares["CD-1"] == pytest.approx(0.38, abs=0.04)
    for name in ("PCD", "noise-contrastive", "Monte Carlo"):
        assert shares[name] == pytest.approx(0.30, abs=0.02)
    assert any("Not at a maximum" in text for text in scope["fits"]["CD-1"].findings)
    assert log_z.is_certified
    learned = float(scope["fit"].state.log_normalizers["x"])
    assert learned == pytest.approx(float(log_z.estimate["x"]), abs=0.05)


def elpd(loo):
    return loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo


def plane_is_right(scope):
    """Chains in latent space have the skewed energy's moments, by quadrature, not those
    of the Gaussian generator."""
    u = np.linspace(-9, 5, 20_001)
    log_density = -0.5 * u**2 - float(scope["fit"].params["steepness"]) * np.logaddexp(
        0, 4 * u
    )
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = density @ u
    deviation = np.sqrt(density @ (u - mean) ** 2)
    skewness = density @ ((u - mean) / deviation) ** 3
    assert skewness < -0.5
    drawn = np.asarray(scope["drawn"])
    for expected, values in (
        (mean, drawn),
        (deviation**2, (drawn - mean) ** 2),
        (skewness, ((drawn - mean) / deviation) ** 3),
    ):
        # Both coordinates have the same density.
        error = (
            np.sqrt((values.var(axis=(0, 1)) / effective_sample_size(values)).sum()) / 2
        )
        assert abs(values.mean() - expected) < 4.5 * error
        assert error < 0.3 * abs(expected)


# Nets outrun the walkers that they learn from, and contrastive divergence ends beside the
# maximum, as the pages say.
@pytest.mark.filterwarnings("ignore:The training walkers of energy site")
@pytest.mark.filterwarnings("ignore:Not at a maximum")
@pytest.mark.parametrize(
    ("page", "is_right"),
    [
        # The longest first.
        ("docs/using.md", using_is_right),
        ("docs/checking.md", checking_is_right),
        ("docs/comparing.md", comparing_is_right),
        ("docs/regression.md", regression_is_right),
        ("docs/tutorial.md", tutorial_is_right),
        ("README.md", None),
        ("docs/concepts.md", concepts_are_right),
        ("docs/tilting.md", tilting_is_right),
        ("docs/plane.md", plane_is_right),
        ("docs/baselines.md", baselines_are_right),
        ("docs/extending.md", extending_is_right),
        ("docs/semi_supervised.md", semi_supervised_is_right),
        ("docs/walkers.md", walkers_are_right),
    ],
)
def test_pages_run_from_top_to_bottom(page, is_right):
    assert blocks_of(page)
    scope = scope_of(page)
    # What the comments in it claim.
    if is_right is not None:
        is_right(scope)


def test_the_readme_model_is_short():
    (block,) = blocks_of("README.md")
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 22


TINY = ["--steps", "20", "--temperatures", "16"]


# Nets outrun the walkers that they learn from, as the pages say.
@pytest.mark.filterwarnings("ignore:The training walkers of energy site")
@pytest.mark.parametrize(
    ("name", "arguments", "files", "parts"),
    [
        (
            "digits",
            [*TINY, "--walkers", "4", "--tilting-steps", "20"],
            {"samples.png", "training.png", "energies.png", "digits.nc"},
            [
                "energy model",
                "Gaussian (the base)",
                "mixture",
                "an energy on that mixture",
                "labels alone",
                "kNN label spreading",
                "r_hat",
            ],
        ),
        (
            "vera_2d",
            [*TINY, "--walkers", "4", "--names", "moons", "--particles", "8"],
            {"vera_2d.png", "vera_moons.nc"},
            [
                "moons: test log-likelihood",
                "mixture of 20 Gaussians",
                "the generator's bound",
                "r_hat",
            ],
        ),
        (
            "semi_supervised",
            [*TINY, "--walkers", "4", "--table", "breast_cancer"],
            {
                "breast_cancer.png",
                "breast_cancer_jarzynski.nc",
                "breast_cancer_vera.nc",
            },
            [
                "Jarzynski: fitted",
                "VERA: fitted",
                "labels alone",
                "kNN label spreading",
                "midpoints",
                "r_hat",
            ],
        ),
    ],
)
def test_examples_with_tiny_settings(name, arguments, files, parts, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "examples" / f"{name}.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    open_before = plt.get_fignums()
    example.main([*arguments, "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == files
    printed = capsys.readouterr().out
    for part in parts:
        assert part in printed
    assert plt.get_fignums() == open_before


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(page):
    for target in re.findall(
        r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")
    ):
        assert (ROOT / target).exists(), target
