"""Servers that do not end as they should."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from coldframe.benchmarks import servers
from coldframe.benchmarks.servers import vllm_server
from coldframe.loader.errors import PlatformError
from tests.benchmarks.test_gpu_budget import runs
from tests.runtime.snapshots import eventually

SERVER = f"""#!{sys.executable}
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
print("up", flush=True)
time.sleep(1000)
"""


def test_one_that_does_not_end_has_failed_and_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_END_S", 0.2)
    python = tmp_path / "python"
    python.write_text(SERVER)
    python.chmod(0o755)
    found: list[psutil.Process] = []

    def serve() -> None:
        with vllm_server(python, tmp_path) as server:
            while "up" not in server.words():
                assert psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE, server.words()
            first = psutil.Process(server.pid)
            found.extend([first, *first.children()])

    with pytest.raises(PlatformError, match=r"a server does not end.* it said: up"):
        serve()
    assert len(found) == 2
    for process in found:
        eventually(lambda pid=process.pid: not runs(pid))
