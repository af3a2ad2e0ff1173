"""What the page on security says of the code as a whole, and can be looked at from outside."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.docs.commands import ROOT
from tests.runtime.listening import paths, ports
from tests.runtime.serving import served

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


LISTENING = {
    "loader/memory_service/reactor.py": "the replica's own processes",
    "loader/peers/listener.py": "weights for peers",
    "runtime/gateway/listen.py": "the endpoint",
    "runtime/planning/endpoint_client.py": None,  # a rehearsal's own port is drawn with it
    "snapshot/template_socket.py": "a template",
}
"""Who binds sockets, and for which row of the page; `listener` is the one of KV as well."""


def binds(node: ast.AST) -> bool:
    """Whether something is bound to an address, as sockets are and contexts of GPUs are not."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    name, of = node.func.attr, ast.unparse(node.func.value)
    return name in {"create_server", "start_server", "start_unix_server"} or (
        name == "bind" and len(node.args) == 1 and not of.endswith("_scheduler")
    )


def test_whoever_listens_has_a_row() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path, tree in modules()
        if any(binds(node) for node in ast.walk(tree))
    }
    assert found == set(LISTENING)
    page = (ROOT / "docs" / "security.md").read_text()
    table = page.partition("## What listens")[2].partition("\n## ")[0]
    for row in filter(None, LISTENING.values()):
        assert re.search(rf"^\| {row}", table, re.MULTILINE), row


def test_nothing_else_listens(demo_model: Callable[..., Path]) -> None:
    told = ("--serve-peers", "127.0.0.1:0", "--kv-listen", "127.0.0.1:0")
    secret = {"COLDFRAME_KV_SECRET": "a secret of sixteen bytes"}
    for flags, more in (((), {}), (told, secret)):
        with served(demo_model(), *flags, **more) as server:
            server.ready()
            found = Counter(who for who, _ in ports(server))
            assert found == Counter({"front": 1, **({"memory": 2} if flags else {})})
            folders = paths(server)
            assert folders
            for path in folders:
                folder = path.parent
                assert folder.parent == server.runs
                assert folder.stat().st_mode & 0o777 == 0o700
