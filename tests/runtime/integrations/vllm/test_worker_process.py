"""What a vLLM worker's process is to the machine, before it has an engine."""

from __future__ import annotations

import subprocess
import sys


def test_where_memory_runs_out_the_engine_goes_and_nobody_else() -> None:
    code = (
        "from coldframe.runtime.integrations.vllm.worker_process import _go_first; "
        "_go_first(); print(open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert int(done.stdout) >= 500
