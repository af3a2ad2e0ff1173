"""An engine for which a container has not memory enough, in a container that has so much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import unavailable

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(200)]

Make = Callable[..., Path]

LIMIT = 1792 << 20
"""Enough for native workers and for a process that has imported vLLM."""

# Joins a group, then tells what comes of a replica whose engine is to have so much KV.
IN_A_GROUP = """
import json, os, sys
from pathlib import Path
model, runs, group, alone = sys.argv[1:]
Path(group, "cgroup.procs").write_text(str(os.getpid()))
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from tests.runtime.helpers import ask, finish, prompt_of, wait_for
alone = alone == "True"
vllm = VllmOptions(alone=alone, kv_bytes=4 << 30)
sizes = {"kv_bytes": 16 << 20, "threads": 1, "decode": 0 if alone else 1}
why = []
with Replica(ReplicaOptions(model, run_dir=runs, vllm=vllm, **sizes), warn=why.append) as replica:
    if not alone:
        finish(replica, ask(replica, prompt_of(30), 8))
    wait_for(replica, lambda: why or replica.error, 150)
    spans = replica.spans + replica.recorder.drain()
    error = replica.error and type(replica.error).__name__
    after = []
    if not alone:
        client = ask(replica, prompt_of(30), 8)
        finish(replica, client)
        after = client.tokens
print(json.dumps([error, [str(replica.error), *why][-1], after, [span.name for span in spans]]))
"""


@pytest.fixture
def container() -> Iterator[Path]:
    """A cgroup whose processes have so much memory together."""
    v1 = Path("/sys/fs/cgroup/memory")
    parent = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    group = parent / f"coldframe-memory-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        unavailable(f"no cgroup can be made here: {error}")
    try:
        limit = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        (group / limit).write_text(str(LIMIT))
        yield group
    except OSError as error:
        unavailable(f"no limit can be set here: {error}")
    finally:
        group.rmdir()


@pytest.mark.parametrize("alone", [False, True])
def test_it_is_refused_before_it_takes_any(
    demo_model: Make, no_leaks: Path, container: Path, alone: bool
) -> None:
    arguments = [str(demo_model()), str(no_leaks), str(container), str(alone)]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    error, why, tokens, spans = json.loads(done.stdout.splitlines()[-1])
    assert "not memory enough for a vLLM engine" in why
    assert "4,295 MB for KV" in why
    assert "--vllm-kv" in why
    assert "vllm_config" not in spans  # vLLM itself was asked for nothing
    if alone:
        assert error == "DeviceFull"
    else:
        assert (error, len(tokens)) == (None, 8)
