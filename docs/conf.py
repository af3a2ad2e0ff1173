"""How Sphinx builds the site: strictly, from this folder, and without a network (`make docs`)."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.generate import filled

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "coldframe"
version = release = installed("coldframe")
author = "the coldframe authors"
copyright = author

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["generate"]
nitpicky = True
smartquotes = False  # two dashes are those of a flag
highlight_language = "text"
myst_heading_anchors = 4

html_theme = "furo"
html_title = "coldframe"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}


def setup(app: Sphinx) -> dict[str, Any]:
    """Has what is made from the code put into each page before it is read."""

    def fill(_: Sphinx, __: str, source: list[str]) -> None:
        source[0] = filled(source[0])

    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
