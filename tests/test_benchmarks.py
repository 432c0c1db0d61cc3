"""The suite of benchmarks asks its scripts for what they take."""

import importlib.util
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("suite", FOLDER / "suite.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["suite"]


def test_rows_ask_for_what_scripts_take(suite):
    assert len({row.name for row in suite.ROWS}) == len(suite.ROWS)
    for row in suite.ROWS:
        for is_quick in (False, True):
            script, *arguments = row.command("folder", is_quick)
            source = (FOLDER / script).read_text(encoding="utf-8")
            for option in arguments:
                assert not option.startswith("--") or f'"{option}"' in source
            assert ("folder" in arguments) == row.needs_data


def test_what_is_kept_is_not_run_again(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "PAGE", tmp_path / "benchmarks.md")
    script = tmp_path / "script.py"
    script.write_text("import sys; print('came out', sys.argv[1])")
    rows = [
        suite.row("one", "A claim.", 1, f"{script} 7", f"{script} 1"),
        suite.row("two", "Needs data.", 1, f"{script} DATA_FOLDER", f"{script} 1"),
    ]
    monkeypatch.setattr(suite, "ROWS", rows)
    monkeypatch.setattr(sys, "argv", ["suite.py"])

    assert suite.main() == 0
    assert "one: ok" in capsys.readouterr().out
    written = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "## One\n\nA claim." in written
    assert "came out 7" in written
    assert "## Two" not in written

    assert suite.main() == 0
    told = capsys.readouterr().out
    assert "kept" in told
    assert "no data" in told
    assert "ok" not in told

    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(sys, "argv", ["suite.py", "--again"])
    assert suite.main() == 1
    assert suite.kept(rows[0])["output"] == "came out 7\n"
