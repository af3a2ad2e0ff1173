"""What the page on security says of the code as a whole, and can be looked at from outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.docs.commands import ROOT

OURS = ("loader", "snapshot", "runtime")
UNPICKLING = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for floor in OURS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def test_nothing_of_ours_is_unpickled() -> None:
    for path, tree in modules():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
            assert not UNPICKLING & {name.partition(".")[0] for name in names}, path


def test_no_flag_is_for_a_secret() -> None:
    from docs.generate.flags import parsers

    secret = {"apikey", "credentials", "key", "keys", "password", "secret"}
    files = {"--snapshot-key"}  # names one
    for name, _, parser in parsers():
        for flag in set(parser._option_string_actions) - files:
            words = flag.strip("-").split("-")
            assert not secret & set(words), (name, flag)
            assert words[-1] != "token", (name, flag)
