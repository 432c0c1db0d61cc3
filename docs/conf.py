"""Sphinx configuration. Builds without a network."""

import importlib.metadata
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # mathml.py

project = "ebm_ppl"
author = "The ebm_ppl developers"
copyright = author
release = importlib.metadata.version("ebm-ppl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "mathml",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_title = f"{project} {release}"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Overrides of NumPyro methods speak for themselves or not at all: host docstrings refer
# to host pages.
autodoc_inherit_docstrings = False

napoleon_numpy_docstring = False
# `Attributes:` sections become plain fields, so they never clash with the members
# autodoc finds.
napoleon_use_ivar = True


def _skip_field_aliases(app, what, name, obj, skip, options):
    """Leave out the "Alias for field number 0" members of named tuples."""
    return (
        True
        if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
        else None
    )


def setup(app):
    """Register the hook above."""
    app.connect("autodoc-skip-member", _skip_field_aliases)
