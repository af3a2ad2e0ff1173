"""What a vLLM process is given by the plug-in; without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TILES = 1 << 18
_ROOT = Path(__file__).parents[4]
_CODE = """
from coldframe.runtime.integrations.vllm.plugin import ask_for_tiles
from coldframe.snapshot.xstate import granted
before = granted()
ask_for_tiles()
ask_for_tiles()
print(before, granted())
"""


def test_amx_may_be_used_where_the_cpu_has_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert not before & TILES
    assert bool(after & TILES) == ("amx_tile" in Path("/proc/cpuinfo").read_text())
