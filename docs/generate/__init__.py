"""The parts of these pages that are made from the code, each time the site is built.

A page names such a part in a comment, alone on its line, where it is to stand:

    <!-- made: flags -->

What is made is Markdown like the rest of the page: its headings are in the page's contents, and
links lead to it. So nothing that is told here of flags, variables, metrics and errors can be of
another version than the code beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docs.generate import errors, flags, metrics, settings

__all__ = ["MADE", "filled"]

_MARK = re.compile(r"^<!-- made: ([a-z-]+)(?: (\S+))? -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]+)\)")
_MAYBE = re.compile(r"^([a-z-]+)\?\n", re.MULTILINE)
_DOCS = Path(__file__).parents[1]

MADE: dict[str, Callable[[str], str]] = {
    "benchmark-flags": lambda _: flags.benchmarks(),
    "codes": lambda _: errors.codes(),
    "error": errors.facts,
    "errors": lambda _: errors.tree(),
    "flags": lambda _: flags.commands(),
    "metrics": lambda _: metrics.metrics(),
    "others": lambda _: settings.others(),
    "settings": lambda _: settings.settings(),
}
"""What a page may ask for; the word behind the name, where there is one, goes to it."""


def filled(page: str) -> str:
    """A page with all that it asks for.

    A file of the repository that it links to goes along with the site. A folder cannot: where a
    page links to one, only the words are left. A line of contents that ends in a question mark is
    of a page that need not be there.

    Raises:
        KeyError: It asks for something that is not made.
    """
    page = _MARK.sub(lambda mark: MADE[mark[1]](mark[2] or "").strip(), page)
    page = _MAYBE.sub(
        lambda name: f"{name[1]}\n" if (_DOCS / f"{name[1]}.md").exists() else "", page
    )
    return _LINK.sub(lambda link: link[1] if (_DOCS / link[2]).is_dir() else link[0], page)
