"""Code of the documentation's pages, for tests that hold it to more than running."""

import pathlib
import re
import sys
import types

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

ROOT = pathlib.Path(__file__).parents[1]


def blocks_of(page):
    """The Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def scope_of(page):
    """The names that a page's code defines, run from top to bottom."""
    scope = {}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), scope)
    plt.close("all")
    return scope


def definitions_of(page, *titles):
    """A module made of the blocks that define ``titles``, and of all before them that
    import or define."""
    name = pathlib.Path(page).stem
    module = types.ModuleType(f"page_{name}")
    sys.modules[module.__name__] = module
    for block in blocks_of(page):
        if re.search(r"^(class|@dataclass)", block, re.MULTILINE):
            # What is run with the definitions is the page's own business.
            head = re.split(r"^\w+ = ", block, maxsplit=1, flags=re.MULTILINE)[0]
            exec(compile(head, page, "exec"), module.__dict__)
    return [getattr(module, title) for title in titles]
