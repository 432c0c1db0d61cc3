"""How the code is set: air between stages, short lines, short files, short bodies.

``python tests/test_house.py`` prints the numbers, and every place that breaks a rule.
"""

import ast
import pathlib
import statistics

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "ebm_ppl"
FILES = sorted(PACKAGE.rglob("*.py"))

LONG_LINE = 88
LONG_FUNCTION = 20
LONG_BLOCK = 20
LONG_BODY = 50
LONG_FILE = 350


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def functions_of(path):
    """Each function with the numbers of its first and last line, docstring left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                # From the line after what was left out, so that comments count.
                first = (
                    node.body[0].end_lineno + 1
                    if body is not node.body
                    else body[0].lineno
                )
                yield node, first, node.end_lineno


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def blocks_of(lines, first):
    """Lengths of the runs of lines that no blank line breaks, with where they begin."""
    begin = None
    for number, line in enumerate([*lines, ""], start=first):
        if line.strip():
            begin = number if begin is None else begin
        elif begin is not None:
            yield number - begin, begin
            begin = None


def long_lines():
    return [
        f"{name_of(path)}:{number}"
        for path in FILES
        for number, line in enumerate(lines_of(path), start=1)
        if len(line) > LONG_LINE
    ]


def share_of_long_lines():
    return len(long_lines()) / sum(len(lines_of(path)) for path in FILES)


def long_functions():
    """Names of the functions of 20 lines or more, and whether each has a blank line."""
    found = {}
    for path in FILES:
        lines = lines_of(path)
        for node, first, last in functions_of(path):
            if last - first + 1 >= LONG_FUNCTION:
                body = lines[first - 1 : last]
                place = f"{name_of(path)}:{node.lineno} {node.name}"
                found[place] = any(not line.strip() for line in body)
    return found


def long_blocks():
    return sorted(
        {
            f"{name_of(path)}:{begin} ({length} lines)"
            for path in FILES
            for _, first, last in functions_of(path)
            for length, begin in blocks_of(lines_of(path)[first - 1 : last], first)
            if length >= LONG_BLOCK
        }
    )


def long_bodies():
    """Functions of more than 50 lines whose docstring gives no reason."""
    return [
        f"{name_of(path)}:{node.lineno} {node.name} ({last - first + 1} lines)"
        for path in FILES
        for node, first, last in functions_of(path)
        if last - first + 1 > LONG_BODY
        and "One body" not in (ast.get_docstring(node) or "")
    ]


def sizes():
    return {name_of(path): len(lines_of(path)) for path in FILES}


def test_lines_are_short():
    assert share_of_long_lines() <= 0.03


def test_long_functions_have_a_breath():
    found = long_functions()
    assert sum(found.values()) >= 0.85 * len(found)


@pytest.mark.parametrize("broken", [long_blocks, long_bodies])
def test_nothing_stands_in_one_slab(broken):
    assert broken() == []


def test_files_are_short():
    assert max(sizes().values()) <= LONG_FILE
    assert statistics.median(sizes().values()) <= 130


if __name__ == "__main__":
    found = long_functions()
    share = sum(found.values()) / len(found)
    print(f"functions of {LONG_FUNCTION} lines or more with a blank line: {share:.0%}")
    print(f"lines over {LONG_LINE} columns: {share_of_long_lines():.1%}")
    print(
        f"files: longest {max(sizes().values())}, median {statistics.median(sizes().values()):.0f}"
    )
    over = {name: size for name, size in sizes().items() if size > LONG_FILE}
    print(f"files over {LONG_FILE} lines: {over}")
    for title, places in (("blocks", long_blocks()), ("bodies", long_bodies())):
        print(f"long {title}: {len(places)}", *places, sep="\n  ")
    print(
        "without a blank line:",
        *(place for place, has in found.items() if not has),
        sep="\n  ",
    )
