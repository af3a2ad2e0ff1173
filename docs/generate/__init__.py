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

__all__ = ["MADE", "filled"]

_MARK = re.compile(r"^<!-- made: ([a-z-]+)(?: (\S+))? -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]+)\)")
_DOCS = Path(__file__).parents[1]


def _flags(_: str) -> str:
    from docs.generate.flags import commands

    return commands()


def _benchmark_flags(_: str) -> str:
    from docs.generate.flags import benchmarks

    return benchmarks()


def _settings(_: str) -> str:
    from docs.generate.settings import settings

    return settings()


def _others(_: str) -> str:
    from docs.generate.settings import others

    return others()


def _metrics(_: str) -> str:
    from docs.generate.metrics import metrics

    return metrics()


def _codes(_: str) -> str:
    from docs.generate.errors import codes

    return codes()


def _tree(_: str) -> str:
    from docs.generate.errors import tree

    return tree()


def _error(name: str) -> str:
    from docs.generate.errors import facts

    return facts(name)


MADE: dict[str, Callable[[str], str]] = {
    "benchmark-flags": _benchmark_flags,
    "codes": _codes,
    "error": _error,
    "errors": _tree,
    "flags": _flags,
    "metrics": _metrics,
    "others": _others,
    "settings": _settings,
}
"""What a page may ask for; an argument behind the name goes to it."""


def filled(page: str) -> str:
    """A page with all that it asks for.

    A file of the repository that it links to goes along with the site. A folder cannot: where a page
    links to one, only the words are left.

    Raises:
        KeyError: It asks for something that is not made.
    """
    page = _MARK.sub(lambda mark: MADE[mark[1]](mark[2] or "").strip(), page)
    return _LINK.sub(lambda link: link[1] if (_DOCS / link[2]).is_dir() else link[0], page)
