"""What a worker measures: before it is frozen, or else when nobody asks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.engine.saturation import SIZES
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.frozen.calibration import measure_apart, measure_saturation
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for
from tests.snapshot.frozen import ENVIRONMENT, ROOT

Make = Callable[..., Path]
FROZEN = """
import json, os, sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
from coldframe.runtime.worker import prefill as prefill_worker
from coldframe.runtime.frozen.calibration import measure_apart
from coldframe.runtime.engine.spec import ModelSpec
spec = ModelSpec.from_config(json.loads((Path({model!r}) / "config.json").read_text()))
"""


def frozen(model: Path, code: str, threads: int = 2) -> Any:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", FROZEN.format(root=str(ROOT), model=str(model)) + code],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=100,
        text=True,
    )
    return json.loads(done.stdout)


@pytest.mark.heavy
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_of_it_stays(demo_model: Make, threads: int) -> None:
    code = """
def status(*names):
    with open("/proc/self/status") as file:
        found = dict(line.split(":") for line in file)
    return [int(found[name].split()[0]) for name in names]
spec = replace(spec, dtype="BF16", layers=4, windows=spec.windows * 2, hidden_size=2048,
               intermediate_size=8192, heads=32, kv_heads=8, head_dim=64)
before = status("Threads", "VmRSS")
found = measure_apart(spec)
after = status("Threads", "VmRSS")
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print(json.dumps([found and found.to_wire(), before[0], after[0], after[1] - before[1]]))
"""
    found, before, after, kib = frozen(demo_model(), code, threads)
    assert found["tokens"] in SIZES
    assert found["threads"] == threads
    assert (before, after) == (1, 1)
    assert kib < 20_000  # a layer of it has 100 MB


def test_a_process_with_threads_is_not_copied(demo_model: Make) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert measure_apart(spec_of(demo_model())) is None
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("family", "dtype"), [("llama", "F32"), ("qwen2", "BF16")])
def test_every_kind_of_model_can_be_measured(demo_model: Make, family: str, dtype: str) -> None:
    spec = replace(spec_of(demo_model(family)), dtype=dtype)
    assert measure_saturation(spec).tokens in SIZES


def spec_of(model: Path) -> ModelSpec:
    return ModelSpec.from_config(json.loads((model / "config.json").read_text()))


@pytest.mark.heavy
def test_a_worker_that_starts_fresh_measures_when_nobody_asks(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model()
    with Replica(ReplicaOptions(str(model), run_dir=str(no_leaks), threads=1)) as replica:
        first = ask(replica, prompt_of(40), 12)
        finish(replica, first)
        wait_for(replica, lambda: "prefill_batch" in replica.facts)
        assert replica.facts["prefill_batch"]["tokens"] in SIZES
        assert replica.facts["prefill_batch"]["threads"] == 1
        again = ask(replica, prompt_of(41), 12)
        finish(replica, again)
    assert first.tokens == expected(model, tuple(prompt_of(40)), 12)
    assert again.tokens == expected(model, tuple(prompt_of(41)), 12)


def over(end: float, replica: Replica) -> bool:
    return time.monotonic() > end or "prefill_batch" in replica.facts


@pytest.mark.heavy
def test_who_asks_meanwhile_is_answered(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model()
    with Replica(ReplicaOptions(str(model), run_dir=str(no_leaks), realign=True)) as replica:
        finish(replica, ask(replica, prompt_of(40), 2))
        clients = []
        while "prefill_batch" not in replica.facts:
            # Each of them comes about when it begins to measure, or in the midst of it.
            replica.run_until(partial(over, time.monotonic() + 2.05, replica))
            clients.append(ask(replica, prompt_of(50 + len(clients)), 3))
            finish(replica, clients[-1])
    for number, client in enumerate(clients):
        assert client.tokens == expected(model, tuple(prompt_of(50 + number)), 3)
