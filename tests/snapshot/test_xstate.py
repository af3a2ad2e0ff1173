"""AMX's tiles are asked for once by each process; where the CPU has none, nobody asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from coldframe.snapshot.xstate import ask_for, granted

ROOT = Path(__file__).parents[2]
TILES = 1 << 18
_AMX = "amx_tile" in Path("/proc/cpuinfo").read_text()


def in_another(code: str) -> str:
    """What a fresh process prints."""
    code = f"from coldframe.snapshot.xstate import ask_for, granted; {code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_what_is_granted_already_is_not_asked_for() -> None:
    before = granted()
    ask_for(before)
    ask_for(0)
    assert granted() == before


def test_a_process_gets_what_another_had_where_the_cpu_has_it() -> None:
    assert int(in_another("print(granted())")) & TILES == 0
    code = "from coldframe.loader.errors import SnapshotError\n"
    code += f"try: ask_for({TILES}); print(granted() & {TILES})\n"
    code += "except SnapshotError as error: print(error.where)"
    expected = str(TILES) if _AMX else "arch_prctl, feature 18"
    assert in_another("pass\n" + code) == expected


def test_what_no_cpu_has_is_refused() -> None:
    code = "from coldframe.loader.errors import SnapshotError\n"
    code += "try: ask_for(1 << 62)\nexcept SnapshotError as error: print(error.where)"
    refused = in_another("pass\n" + code)
    assert refused == "arch_prctl, feature 62"
