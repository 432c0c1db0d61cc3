"""Run a page's code and save its figures where the page shows them.

python docs/draw.py docs/regression.md docs/gallery/ising.md
"""

import pathlib
import re
import sys

import matplotlib
import matplotlib.pyplot as plt

BLOCK_OR_IMAGE = re.compile(
    r"```python\n(.*?)```|!\[[^\]]*\]\(([^)]+\.png)\)", re.DOTALL
)


def main():
    matplotlib.use("Agg")
    for name in sys.argv[1:]:
        page, scope = pathlib.Path(name), {}
        for block, image in BLOCK_OR_IMAGE.findall(page.read_text(encoding="utf-8")):
            if block:
                exec(compile(block, name, "exec"), scope)
            else:
                # The figure that was made last
                plt.savefig((page.parent / image).resolve(), dpi=120)
        plt.close("all")


if __name__ == "__main__":
    main()
