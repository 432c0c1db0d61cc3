"""The README, the tutorial and the examples run."""

import importlib.util
import pathlib
import re

import matplotlib
import pytest

matplotlib.use("Agg")
ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_pages_run_from_top_to_bottom(page):
    blocks = python_blocks(page)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    if page == "docs/tutorial.md":
        # What the comments in it claim.
        assert scope["nuts_mean"](scope["factor_model"]) < 0.5
        assert float(scope["fit"].params["lam"]) == pytest.approx(2.590, rel=0.01)


def test_the_readme_model_is_short():
    (block,) = python_blocks("README.md")
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 22


def test_digits_example_with_tiny_settings(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    digits.main(["--steps", "20", "--walkers", "10", "--temperatures", "16", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "training.png", "energies.png", "digits.nc"}
    printed = capsys.readouterr().out
    for row in ("energy model", "Gaussian (the base)", "mixture", "labels alone", "kNN label spreading", "r_hat"):
        assert row in printed


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
