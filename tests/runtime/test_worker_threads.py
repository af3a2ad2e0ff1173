"""Only a worker's main thread makes tensors: see `TorchMemory`, which torch calls under its lock.

What the other threads run is in modules that have no torch at all, as far as that can be read off
them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = (
    *("worker/text", "worker/stops", "worker/prompts"),
    *("engine/spec", "engine/fields", "engine/families"),
)
"""What the thread that reads the control socket prepares with, and who tokenises beside."""
OTHERS = {"gateway", "integrations", "planning", "checks", "transport", "commands"}
"""What no worker of ours is made of, and no front that has one."""


def imports(path: Path) -> set[str]:
    """All that a module imports, wherever in it; but for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("name", BESIDE)
def test_what_other_threads_run_knows_no_torch(name: str) -> None:
    assert "torch" not in imports(ROOT / "runtime" / f"{name}.py")


def test_the_floors_below_know_none_either() -> None:
    """The memory client's threads, which map, enter pages and read."""
    for path in (ROOT / "loader").rglob("*.py"):
        assert "torch" not in imports(path), path


def test_no_other_thread_is_started_in_a_worker() -> None:
    """Whoever adds one says here what it runs."""
    known = {"worker/worker.py": 1, "worker/prefill.py": 1}
    known |= {"graphs/shelf.py": 1, "machine/probe.py": 1}  # the front's, as are these
    known |= {"endpoint/whereabouts.py": 1, "scaling/late_writer.py": 1}
    found = {}
    for path in (ROOT / "runtime").rglob("*.py"):
        if path.relative_to(ROOT / "runtime").parts[0] in OTHERS:
            continue
        calls = path.read_text().count("Thread(") + path.read_text().count("ThreadPoolExecutor(")
        if calls:
            found[path.relative_to(ROOT / "runtime").as_posix()] = calls
    assert found == known
