"""A replica that rests with its workers' contexts off the GPU, too: real processes, emulated GPUs.

What a context takes is said by the emulator, and counted over all processes by its ledger.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica
from tests.loader.devices import emulated_checkpoint as states
from tests.runtime.emulated import emulate
from tests.runtime.helpers import wait_for
from tests.runtime.test_resident import KV, all_up, answered, device_bytes

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]
CONTEXT = 100 << 20


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


class Gpu:
    """An emulated GPU on which contexts take something.

    Args:
        patch: Undoes it.
        ledger: A folder for the emulators' ledger.
        more: See `install`, for all processes.
    """

    def __init__(self, patch: pytest.MonkeyPatch, ledger: Path, **more: Any) -> None:
        self._patch, self._ledger = patch, ledger
        self._more = {"context_bytes": CONTEXT, "ledger": str(ledger), **more}

    def emulate(self, **memory: Any) -> None:
        """Has it found from now on; `memory` is for the memory service alone."""
        emulate(self._patch, memory=self._more | memory, worker=self._more)

    @property
    def contexts(self) -> int:
        """Bytes that contexts take of it."""
        return states.used_by_others(self._ledger)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    return Gpu(monkeypatch, tmp_path / "ledger")


@contextmanager
def on_gpu(model: Path, runs: Path, **more: Any) -> Iterator[Replica]:
    options = {"device": "cuda:0", "kv_bytes": KV, **more}
    with Replica(ReplicaOptions(model=str(model), run_dir=str(runs), **options)) as replica:
        yield replica


def rests(replica: Replica) -> None:
    """Has it rest, until nothing of the workers is on the GPU."""
    wait_for(replica, lambda: replica.idle)
    replica.park()
    wait_for(replica, lambda: replica.contexts.left)
    assert device_bytes(replica) == 0


def spans(replica: Replica, name: str) -> list[str]:
    return [span.note or "" for span in replica.spans if span.name == name]


def test_nothing_of_the_workers_is_on_the_gpu_while_it_rests(
    model: Path, no_leaks: Path, gpu: Gpu
) -> None:
    gpu.emulate(delay=0.001)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        before = replica.pids
        assert gpu.contexts == 3 * CONTEXT
        for _ in range(10):
            rests(replica)
            assert gpu.contexts == CONTEXT  # the memory service's
            assert replica.contexts.told["bytes"] == 2 * CONTEXT
            answered(replica, model)
            wait_for(replica, lambda: gpu.contexts == 3 * CONTEXT)
        assert replica.pids == before
        assert len(spans(replica, "cuda_checkpoint")) == 20
        assert len(spans(replica, "cuda_restore")) == 20
        assert {note.split(":")[0] for note in spans(replica, "cuda_restore")} == before.keys() - {
            "memory"
        }
        assert {note.split(": ")[1] for note in spans(replica, "cuda_restore")} == {
            f"{CONTEXT:,} bytes"
        }


def test_who_is_asked_at_any_moment_of_that_answers(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate(delay=0.001)
    chance = random.Random(5)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        for _ in range(20):
            wait_for(replica, lambda: replica.idle)
            replica.park()
            end = time.monotonic() + chance.uniform(0, 0.1)
            while time.monotonic() < end:
                replica.poll(0.001)
            if chance.random() < 0.3:  # and is told otherwise at once
                replica.wake()
                replica.park()
            answered(replica, model)
        assert replica.pids == before
