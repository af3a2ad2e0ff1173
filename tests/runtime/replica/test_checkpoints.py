"""A replica that rests with its workers' contexts off the GPU, too: real processes, emulated GPUs.

What a context takes is said by the emulator, and counted over all processes by its ledger.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.timeline import Recorder
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.sizing import context_bytes
from coldframe.runtime.scaling.policies import FixedKeepAlive
from tests.loader.devices import emulated_checkpoint as states
from tests.runtime.emulated import emulate
from tests.runtime.endpoint.test_supervisor import answers, supervised, until
from tests.runtime.helpers import Client, ask, expected, finish, wait_for
from tests.runtime.replica.test_resident import KV, PROMPT, all_up, answered, device_bytes, kill
from tests.snapshot.target import target

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]
MIB = 1 << 20
CONTEXT = 100 * MIB
ALL = 1024 * MIB


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
        self._patch, self.ledger = patch, ledger
        self._more = {"context_bytes": CONTEXT, "ledger": str(ledger), **more}

    def emulate(self, **memory: Any) -> None:
        """Has it found from now on; `memory` is for the memory service alone."""
        emulate(self._patch, memory=self._more | memory, worker=self._more)

    @property
    def contexts(self) -> int:
        """Bytes that contexts take of it."""
        return states.used_by_others(self.ledger)


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


@contextmanager
def taken(gpu: Gpu, nbytes: int) -> Iterator[None]:
    """Somebody else's process has that much of the GPU meanwhile."""
    with target(context_bytes=nbytes, ledger=str(gpu.ledger)):
        yield


def to_place(replica: Replica, name: str, place: str) -> Client | None:
    """Has it rest, or wake, until a worker's context is at a place; the request that woke it."""
    replica.park()
    if place in ("asked", "leaving"):
        wait_for(replica, lambda: replica.contexts.places[name] == place)
        return None
    wait_for(replica, lambda: replica.contexts.left)
    client = ask(replica, PROMPT, 8) if place == "coming" else None
    assert replica.contexts.places[name] == place
    return client


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
            if chance.random() < 0.5:  # and is told otherwise at once
                replica.wake()
                replica.park()
            if chance.random() < 0.5:
                wait_for(replica, lambda: replica.contexts.left)
                assert gpu.contexts == CONTEXT
                assert device_bytes(replica) == 0
            answered(replica, model)
        assert replica.pids == before


def test_who_is_to_rest_on_its_way_back_turns_round(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate(delay=0.002)
    chance = random.Random(7)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        for _ in range(8):
            rests(replica)
            replica.wake()
            end = time.monotonic() + chance.uniform(0, 0.02)
            while time.monotonic() < end:
                replica.poll(0.001)
            replica.park()
            wait_for(replica, lambda: replica.contexts.left)
            assert (gpu.contexts, device_bytes(replica)) == (CONTEXT, 0)
        answered(replica, model)
        assert replica.pids == before


def test_a_wake_between_the_order_and_the_lock_costs_nothing(
    model: Path, no_leaks: Path, gpu: Gpu
) -> None:
    """Weights that come back are not mapped while a context leaves, which would be refused."""
    gpu.emulate(slow=("cuCheckpointProcessLock", 0.3))
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        before = replica.pids
        for role in ("decode", "prefill"):
            wait_for(replica, lambda: replica.idle)
            (name,) = [name for name in replica.pids if name.startswith(role)]
            to_place(replica, name, "leaving")
            answered(replica, model)
            wait_for(replica, lambda: set(replica.contexts.places.values()) == {"here"})
        assert replica.pids == before
        told = spans(replica, "cuda_checkpoint")
        assert len(told) >= 2
        assert all(note.endswith(f"{CONTEXT:,} bytes") for note in told), told


def test_a_worker_that_comes_while_it_rests_leaves_too(
    model: Path, no_leaks: Path, gpu: Gpu
) -> None:
    gpu.emulate()
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        rests(replica)
        kill(replica, "decode")
        wait_for(replica, lambda: not replica.contexts.left)
        wait_for(replica, lambda: replica.contexts.left)
        assert all_up(replica)
        assert gpu.contexts == CONTEXT
        answered(replica, model)


STAYS = {
    "no such call": {"missing": ["cuCheckpointProcessRestore"]},
    "not supported": {"fail": ("cuCheckpointProcessLock", 1, "CUDA_ERROR_NOT_SUPPORTED")},
    "not permitted": {"fail": ("cuCheckpointProcessLock", 1, "CUDA_ERROR_NOT_PERMITTED")},
}


@pytest.mark.parametrize("how", STAYS)
def test_where_contexts_cannot_leave_it_rests_without_that(
    model: Path, no_leaks: Path, gpu: Gpu, how: str
) -> None:
    gpu.emulate(**STAYS[how])
    warned: list[str] = []
    options = ReplicaOptions(str(model), run_dir=str(no_leaks), device="cuda:0", kv_bytes=KV)
    with Replica(options, warn=warned.append) as replica:
        answered(replica, model)
        before = replica.pids
        for _ in range(2):
            wait_for(replica, lambda: replica.idle)
            replica.park()
            wait_for(replica, lambda: replica.resting.left and replica.contexts.why is not None)
            wait_for(replica, lambda: not replica.contexts.leaving)
            assert device_bytes(replica) == 0
            assert gpu.contexts == 3 * CONTEXT
            answered(replica, model)
        assert replica.pids == before
        assert [why for why in warned if "a context stays" in why] == [
            f"a context stays on its device: {replica.contexts.why}"
        ]
        word = how.upper().replace(" ", "_") if how.startswith("not") else "Restore"
        assert word in str(replica.contexts.why)


def test_nobody_is_asked_where_contexts_are_to_stay(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate()
    with on_gpu(model, no_leaks, checkpoint="off") as replica:
        answered(replica, model)
        wait_for(replica, lambda: replica.idle)
        replica.park()
        wait_for(replica, lambda: replica.resting.left and device_bytes(replica) == 0)
        assert not replica.contexts.leaving
        assert gpu.contexts == 3 * CONTEXT
        answered(replica, model)
        assert not spans(replica, "cuda_checkpoint")


def test_one_that_could_not_leave_stays_and_leaves_the_next_time(
    model: Path, no_leaks: Path, gpu: Gpu
) -> None:
    gpu.emulate(fail=("cuCheckpointProcessCheckpoint", 1, "CUDA_ERROR_OPERATING_SYSTEM"))
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        wait_for(replica, lambda: replica.idle)
        replica.park()
        wait_for(replica, lambda: gpu.contexts == 2 * CONTEXT)
        assert not replica.contexts.left
        answered(replica, model)
        rests(replica)
        answered(replica, model)
        assert replica.pids == before
        assert "OPERATING_SYSTEM" in spans(replica, "cuda_checkpoint")[0]


LOST = {
    "the lock cannot be undone": {
        "fail": ("cuCheckpointProcessCheckpoint", 1, "CUDA_ERROR_UNKNOWN"),
        "fail_too": ("cuCheckpointProcessUnlock", 1, "CUDA_ERROR_UNKNOWN"),
    },
    "no memory": {"fail": ("cuCheckpointProcessRestore", 1, "CUDA_ERROR_OUT_OF_MEMORY")},
    "the second cannot be restored": {
        "fail": ("cuCheckpointProcessRestore", 2, "CUDA_ERROR_UNKNOWN")
    },
    "it cannot go on": {"fail": ("cuCheckpointProcessUnlock", 1, "CUDA_ERROR_ILLEGAL_STATE")},
    "it is not known": {"fail": ("cuCheckpointProcessGetState", 1, "CUDA_ERROR_INVALID_VALUE")},
}


@pytest.mark.parametrize("how", LOST)
def test_a_worker_whose_context_is_lost_is_replaced_and_the_answer_right(
    model: Path, no_leaks: Path, gpu: Gpu, how: str
) -> None:
    gpu.emulate(**LOST[how])
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        before = replica.pids
        wait_for(replica, lambda: replica.idle)
        replica.park()
        wait_for(replica, lambda: replica.contexts.left or replica.contexts.why is not None)
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        assert len(before.items() - replica.pids.items()) == 1
        wait_for(replica, lambda: gpu.contexts == 3 * CONTEXT)
        answered(replica, model)


def test_a_gpu_that_is_full_is_waited_for(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate()
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        rests(replica)
        with taken(gpu, ALL - CONTEXT - 50 * MIB):
            client = ask(replica, PROMPT, 8)
            wait_for(replica, lambda: len(spans(replica, "cuda_restore")) > 3)
            assert not client.events
        finish(replica, client)
        assert client.tokens == expected(model, tuple(PROMPT), 8)
        assert replica.pids == before
        assert "no room for a context" in spans(replica, "cuda_restore")[0]


def test_a_gpu_that_stays_full_costs_the_worker(
    model: Path, no_leaks: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldframe.runtime.replica.contexts._PATIENCE_S", 0.3)
    gpu.emulate()
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        rests(replica)
        with taken(gpu, ALL - CONTEXT - 50 * MIB):
            client = ask(replica, PROMPT, 8)
            wait_for(replica, lambda: before.items() - replica.pids.items() != set())
        finish(replica, client)
        assert client.tokens == expected(model, tuple(PROMPT), 8)


PLACES = ("asked", "leaving", "away", "coming")
DEATHS = [*((place, signal.SIGKILL) for place in PLACES), ("away", signal.SIGTERM)]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("place", "sign"), DEATHS)
def test_a_worker_dies_on_its_way(
    model: Path, no_leaks: Path, gpu: Gpu, role: str, place: str, sign: signal.Signals
) -> None:
    gpu.emulate(slow_s=0.1)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        wait_for(replica, lambda: replica.idle)
        (name,) = [name for name in replica.pids if name.startswith(role)]
        pid = replica.pids[name]
        client = to_place(replica, name, place)
        os.kill(pid, sign)
        client = client or ask(replica, PROMPT, 8)
        finish(replica, client)
        assert client.error is None
        assert client.tokens == expected(model, tuple(PROMPT), 8)
        wait_for(replica, lambda: all_up(replica))
        assert name not in replica.pids
        rests(replica)
        assert gpu.contexts == CONTEXT


@pytest.mark.parametrize("place", PLACES)
def test_it_ends_wherever_its_contexts_are(
    model: Path, no_leaks: Path, gpu: Gpu, place: str
) -> None:
    gpu.emulate(slow_s=0.1)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        wait_for(replica, lambda: all_up(replica))
        wait_for(replica, lambda: replica.idle)
        (name,) = [name for name in replica.pids if name.startswith("decode")]
        to_place(replica, name, place)
    assert gpu.contexts == 0


HALF_WAY = {
    "between lock and checkpoint": {"dies_at": ("cuCheckpointProcessCheckpoint", 1)},
    "between checkpoint and restore": {"dies_at": ("cuCheckpointProcessRestore", 1)},
    "between restore and unlock": {"dies_at": ("cuCheckpointProcessUnlock", 1)},
}


@pytest.mark.parametrize("when", HALF_WAY)
def test_a_memory_service_that_dies_half_way_takes_all_with_it(
    model: Path, no_leaks: Path, gpu: Gpu, when: str
) -> None:
    gpu.emulate(**HALF_WAY[when])
    policy = FixedKeepAlive(idle_s=0.2, park_s=None)
    with supervised(model, no_leaks, policy, device="cuda:0", kv_bytes=KV) as supervisor:
        answers(supervisor, model)
        first = supervisor.replica
        assert first is not None
        workers = [pid for name, pid in first.pids.items() if name != "memory"]
        if when == "between lock and checkpoint":
            until(supervisor, lambda: supervisor.replica is not first)
        else:
            until(supervisor, lambda: first.contexts.left)
        answers(supervisor, model)
        assert supervisor.replica is not first
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert supervisor.failures <= 1


def test_it_says_where_its_contexts_are(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate()
    policy = FixedKeepAlive(idle_s=0.2, park_s=None)
    with supervised(model, no_leaks, policy, device="cuda:0", kv_bytes=KV) as supervisor:
        answers(supervisor, model)
        assert supervisor.load_state().contexts is None
        replica = supervisor.replica
        assert replica is not None
        until(supervisor, lambda: replica.contexts.left)
        told = supervisor.load_state().contexts
        assert told is not None
        assert (told["away"], told["of"], told["bytes"]) == (2, 2, 2 * CONTEXT)
        assert (told["seconds"] > 0, told["why"]) == (True, None)
        assert supervisor.count.stats(None, {}).contexts_away_bytes == 2 * CONTEXT
        answers(supervisor, model)
        assert supervisor.load_state().contexts is None
        assert supervisor.count.stats(None, {}).contexts_away_bytes == 0
        assert supervisor.starts == 1


def test_a_wake_is_told_in_its_parts(model: Path, no_leaks: Path, gpu: Gpu) -> None:
    gpu.emulate()
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        rests(replica)
        replica.spans.clear()
        answered(replica, model)
        wait_for(replica, lambda: not replica.resting.left)
        answered(replica, model)  # behind it workers have told theirs
        found = {(span.process.partition("-")[0], span.name) for span in replica.spans}
        assert {("memory", "cuda_restore"), ("memory", "weights_return")} <= found
        assert {("prefill", "attach"), ("prefill", "prefill[head]")} <= found


def test_two_gpus_have_a_memory_service_each_that_does_it(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu(monkeypatch, tmp_path / "ledger", devices=2)
    gpu.emulate(delay=0.001)
    scales = {"prefill": Scale(1, 1, "cuda:0"), "decode": Scale(1, 1, "cuda:1")}
    with on_gpu(model, no_leaks, **scales) as replica:
        answered(replica, model)
        before = replica.pids
        for _ in range(3):
            rests(replica)
            assert [states.used_by_others(gpu.ledger, n) for n in (0, 1)] == [CONTEXT, CONTEXT]
            answered(replica, model)
        assert replica.pids == before
        told = [span for span in replica.spans if span.name == "cuda_restore"]
        assert {(span.process, (span.note or "").split(":")[0]) for span in told} == {
            ("memory", "prefill-0"),
            ("memory-2", "decode-1"),
        }


def test_two_of_which_one_fits_take_turns_without_a_start(
    demo_model: Make, no_leaks: Path, gpu: Gpu
) -> None:
    gpu.emulate(memory=8 << 30)
    models = {name: demo_model(name, "float32") for name in ("llama", "qwen2")}
    told = {
        name: ReplicaOptions(str(path), run_dir=str(no_leaks), device="cuda:0", kv_bytes=KV)
        for name, path in models.items()
    }
    weights = max(
        sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in models.values()
    )
    # All that one of them has, and nothing of the other.
    loop, log = Loop(), Log(process="front")
    room = Room(context_bytes(told["llama"], "cuda:0") + weights + KV)
    policy = FixedKeepAlive(None, None)
    fleet = Fleet(
        {
            name: Supervisor(options, policy, Recorder("front"), log, loop, None, None, room)
            for name, options in told.items()
        },
        loop,
        room,
    )
    try:
        for name in ("llama", "qwen2", "llama", "qwen2", "qwen2", "llama"):
            client = Client()
            params = SamplingParams(max_tokens=8, ignore_eos=True)
            client.request = fleet[name].submit(params, client, prompt_ids=tuple(PROMPT))
            deadline = time.monotonic() + 120
            while not client.done:
                assert time.monotonic() < deadline, {each: m.state for each, m in fleet}
                fleet.poll(0.05)
                fleet.step()
            assert client.tokens == expected(models[name], tuple(PROMPT), 8)
            (other,) = [each for each_name, each in fleet if each_name != name]
            if other.replica is not None:
                assert (other.state, other.replica.contexts.left) == ("parked", True)
        assert [each.starts for _, each in fleet] == [1, 1]
        assert [each.failures for _, each in fleet] == [0, 0]
    finally:
        fleet.close()
        loop.close()
