"""The battery's quick form: nothing visible is certified and wrong, and its truths and
its judge are right."""

import dataclasses
import importlib
import pathlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def battery():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("hostile")


@pytest.fixture(scope="module")
def targets(battery):
    every = {family: list(members()) for family, members in battery.families().items()}
    battery.check_names(every)
    return every


def test_quick_battery_certifies_nothing_wrong(battery, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    status = battery.main(["--quick", "--results", str(path)])
    printed = capsys.readouterr().out
    lines = list(battery.read(path).values())
    wrong = [line["target"] for line in lines if line["outcome"] in ("wrong", "failed")]
    assert not wrong, printed
    assert status == 0
    # It would also certify nothing wrong by certifying nothing.
    assert sum(line["outcome"] == "right" for line in lines) >= 8
    assert "certified and wrong, or failed: 0" in printed
    # A second call runs nothing anew.
    kept = path.read_text()
    assert battery.main(["--quick", "--results", str(path)]) == 0
    assert path.read_text() == kept


def test_the_battery_is_large_and_its_marks_are_reasoned(targets):
    every = [target for members in targets.values() for target in members]
    assert len(every) >= 150
    assert 0.2 < np.mean([target.benign for target in every]) < 0.6
    assert sum(bool(target.invisible) for target in every) <= 0.05 * len(every)
    for target in every:
        assert not (target.benign and target.invisible)
        # Rows that lie in the well are what makes it visible.
        assert not (target.invisible and target.data is not None)
        if target.benign:
            assert np.isfinite(target.truth).all()


@pytest.mark.parametrize(
    "name",
    [
        "well d1 deep",
        "t1 d1",
        "pole at the origin d1, 0.6",
        "logistic, heavy left",
        "inverse gamma 3",
        "pole in an interval 0.1",
        "simplex (2, 3, 6) by quadrature",
        "batch of Gaussians by quadrature",
        "draws of a tail, one heavy",
        "Curie-Weiss 10, 0.5",
        "chain of 3 colours",
    ],
)
def test_truths_agree_with_sums(targets, name):
    truths = importlib.import_module("hostile_truths")
    (target,) = [
        target
        for members in targets.values()
        for target in members
        if target.name == name
    ]
    np.testing.assert_allclose(
        truths.truth_by_sums(target), target.truth, rtol=1e-5, atol=1e-5
    )


def test_wells_that_no_draw_can_see_are_found_by_counting(targets):
    wells = importlib.import_module("hostile_wells")
    p = wells.arrays(
        locs=[[0, 0], [1, 1]], scales=[1, 0.3], log_weights=[0, 0.5], base=1.5
    )
    draws = 1.5 * np.random.default_rng(0).normal(size=(400_000, 2))
    ratio = (
        0.5
        - 2 * np.log(0.3)
        - 0.5 * (((draws - 1) / 0.3) ** 2).sum(1)
        + 0.5 * (draws**2).sum(1)
    )
    counted = np.mean(ratio > 0)
    error = np.sqrt(counted * (1 - counted) / len(draws))
    assert abs(wells.expected_draws_in_well(p) / 1000 - counted) < 4 * error
    with pytest.raises(ValueError, match="neither visible nor not"):
        wells.well("between", 2, 0.0, 0.02, 0.0)


def result(estimate, stderr, lower, upper):
    values = (estimate, stderr, lower, upper)
    names = ("estimate", "stderr", "lower", "upper")
    return SimpleNamespace(
        **{
            name: {"x": jnp.asarray(v, float)}
            for name, v in zip(names, values, strict=True)
        }
    )


@pytest.mark.parametrize(
    ("truth", "log_z", "outcome"),
    [
        (1.0, (1.0, 0.01, 0.98, 1.02), "right"),
        (1.059, (1.0, 0.01, 0.98, 1.02), "right"),
        (1.061, (1.0, 0.01, 0.98, 1.02), "wrong"),
        (0.939, (1.0, 0.01, 0.98, 1.02), "wrong"),
        (np.inf, (1.0, 0.01, 0.98, np.inf), "wrong"),
        (np.nan, (1.0, 0.01, 0.98, 1.02), "wrong"),
        # One limit alone holds on both sides.
        (1.059, (1.0, 0.01, 0.98, np.inf), "right"),
        (1.061, (1.0, 0.01, 0.98, np.inf), "wrong"),
        (0.9, (1.0, 0.01, -np.inf, 1.02), "wrong"),
        # Exact methods.
        (2.0009, (2.0, 0.0, 2.0, 2.0), "right"),
        (2.0011, (2.0, 0.0, 2.0, 2.0), "wrong"),
        # One element of two.
        ([1.0, 2.0], ([1.0, 1.0], [0.01, 0.01], [0.98, 0.98], [1.02, 1.02]), "wrong"),
        ([1.0, 1.01], ([1.0, 1.0], [0.01, 0.01], [0.98, 0.98], [1.02, 1.02]), "right"),
    ],
)
def test_the_judge(battery, truth, log_z, outcome):
    assert battery.judge(np.asarray(truth), result(*log_z)) == outcome


def test_another_definition_is_run_anew(battery, targets):
    target = targets["wells"][0]
    assert (
        dataclasses.replace(target, truth=target.truth + 0.1).version != target.version
    )
    assert (
        dataclasses.replace(target, options={"num_walkers": 8}).version
        != target.version
    )
    changed = target.p | {"base": target.p["base"] * 1.01}
    assert dataclasses.replace(target, p=changed).version != target.version
    assert (
        dataclasses.replace(
            target, quick=not target.quick, benign=not target.benign
        ).version
        == target.version
    )


def test_lines_that_were_cut_off_are_done_again(battery, tmp_path):
    path = tmp_path / "results.jsonl"
    whole = '{"target": "a", "seed": 0, "version": "v", "outcome": "right"}'
    path.write_text(f"{whole}\n{whole[:30]}")
    assert list(battery.read(path)) == [("a", 0, "v")]
    battery.main(
        ["--targets", "bits in a field", "--seeds", "1", "--results", str(path)]
    )
    assert [key[0] for key in battery.read(path)] == ["a", "bits in a field"]
