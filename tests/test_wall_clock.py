"""The wall clock jumps: when it is set, and with every leap of NTP. So nothing is timed by it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ("loader", "snapshot", "runtime")
CLOCKS = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "CLOCK_REALTIME"),
    ("datetime", "now"),
    ("datetime", "today"),
    ("datetime", "utcnow"),
    ("date", "today"),
}
FOR_PEOPLE = "people read it"
AGES = "the age of something on a disk that outlives processes and reboots"
ALLOWED = {
    "loader/disk_cache/folder.py": AGES,
    "loader/kv/disk.py": AGES,
    "loader/kv/fetch.py": AGES,
    "loader/kv/store.py": AGES,
    "loader/peers/http.py": "an HTTP date",
    "loader/web/http.py": "Retry-After may be a date; patience, which has another clock, bounds it",
    "runtime/batch/batch.py": "OpenAI's `created`",
    "runtime/checks/kernel.py": "whether it is right is what is looked into",
    "runtime/compiled/compiler.py": AGES,
    "runtime/compiled/compiling.py": AGES,
    "runtime/gateway/logs.py": FOR_PEOPLE,
    "runtime/gateway/openai/service.py": "OpenAI's `created`",
    "runtime/gateway/templates.py": "`strftime_now` of chat templates",
    "runtime/gateway/tracing.py": "spans in traces have the time of day",
    "runtime/planning/kept.py": AGES,
    "runtime/scaling/policy_state.py": AGES,
    "snapshot/bucket.py": AGES,
    "snapshot/directory.py": AGES,
    "snapshot/graph_store.py": AGES,
    "snapshot/hooks.py": "what logging counts from, in a clone",
    "snapshot/store.py": AGES,
}
"""Who may look at it, and what for."""


def test_nothing_is_timed_by_the_wall_clock() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
        if any(_looks(ast.parse(path.read_text())))
    }
    assert found == set(ALLOWED)


def _looks(tree: ast.AST) -> Iterator[bool]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield (node.value.id, node.attr) in CLOCKS
        elif isinstance(node, ast.ImportFrom):
            yield any((node.module, alias.name) in CLOCKS for alias in node.names)
