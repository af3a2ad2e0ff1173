"""A replica that rests with its workers up, its weights in host memory and its GPU free for others.

Real processes, and a GPU that is emulated: what is shown is that nothing is lost on the way there
and back, whoever dies, and not how long it takes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
from coldframe.runtime.replica.sizing import context_bytes
from coldframe.runtime.scaling.policies import FixedKeepAlive
from tests.loader.devices.emulator import MEMFD
from tests.runtime.emulated import emulate
from tests.runtime.endpoint.test_supervisor import answers, is_in, supervised, until
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]
PROMPT = prompt_of(40)
KV = 64 << 20


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def device_bytes(replica: Replica) -> int:
    """Memory of the GPU that is not free, since some process has it open or mapped."""
    sizes: dict[int, int] = {}
    for pid in replica.pids.values():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if f"/memfd:{MEMFD}" in os.readlink(fd):
                    status = fd.stat()
                    sizes[status.st_ino] = status.st_size
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if f"/memfd:{MEMFD}" in line:
                words = line.split()
                begin, end = (int(part, 16) for part in words[0].split("-"))
                sizes.setdefault(int(words[4]), end - begin)
    return sum(sizes.values())


@contextmanager
def on_gpu(model: Path, runs: Path) -> Iterator[Replica]:
    options = ReplicaOptions(model=str(model), run_dir=str(runs), device="cuda:0", kv_bytes=KV)
    with Replica(options) as replica:
        yield replica


def answered(replica: Replica, model: Path) -> None:
    client = ask(replica, PROMPT, 8)
    finish(replica, client)
    assert client.error is None
    assert client.tokens == expected(model, tuple(PROMPT), 8)


def parked(replica: Replica) -> None:
    """Has it rest, until all of the GPU is free."""
    wait_for(replica, lambda: replica.idle)
    replica.park()
    wait_for(replica, lambda: replica.resting.left and device_bytes(replica) == 0)


def kill(replica: Replica, role: str) -> None:
    os.kill(next(pid for name, pid in replica.pids.items() if role in name), signal.SIGKILL)


def all_up(replica: Replica) -> bool:
    workers = replica._workforce.workers.values()
    return len(workers) == 2 and all(worker.up for worker in workers)


def test_the_gpu_is_free_while_it_rests_and_the_next_answer_is_right(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, memory={"delay": 0.002})
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        before = replica.pids
        assert device_bytes(replica) > KV / 2
        for _ in range(3):
            parked(replica)
            assert "locked memory" in replica.resting.told["note"]
            answered(replica, model)
            assert not replica.resting.left
        assert replica.pids == before


def test_who_is_asked_while_it_goes_to_rest_answers(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, memory={"delay": 0.001})
    chance = random.Random(3)
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        for _ in range(12):
            wait_for(replica, lambda: replica.idle)
            replica.park()
            end = time.monotonic() + chance.uniform(0, 0.03)
            while time.monotonic() < end:
                replica.poll(0.001)
            answered(replica, model)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["parking", "parked", "waking"])
def test_a_worker_dies_at_rest(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch, role: str, moment: str
) -> None:
    emulate(monkeypatch, memory={"delay": 0.002})
    with on_gpu(model, no_leaks) as replica:
        answered(replica, model)
        first = replica.pids
        if moment == "parking":
            wait_for(replica, lambda: replica.idle)
            replica.park()
            kill(replica, role)
            wait_for(replica, lambda: replica.resting.left)
        else:
            parked(replica)
        client = ask(replica, PROMPT, 8) if moment == "waking" else None
        if moment != "parking":
            kill(replica, role)
        if moment == "parked":
            # Its successor comes up although there are no weights.
            wait_for(replica, lambda: bool(replica.pids.keys() - first.keys()))
            wait_for(replica, lambda: all_up(replica))
            assert device_bytes(replica) == 0
            # And has looked for its kernel all the same, for as long as it lives.
            (successor,) = replica.pids.keys() - first.keys()
            found = [span.name for span in replica.spans if span.process == successor]
            assert found.index("attention_trial") < found.index("ready")
        client = client or ask(replica, PROMPT, 8)
        finish(replica, client)
        assert client.error is None
        assert client.tokens == expected(model, tuple(PROMPT), 8)


def test_a_model_that_nobody_asks_leaves_the_gpu_and_comes_back(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    policy = FixedKeepAlive(idle_s=0.2, park_s=None)
    more = {"device": "cuda:0", "kv_bytes": KV}
    with supervised(model, no_leaks, policy, **more) as supervisor:
        for _ in range(2):
            answers(supervisor, model)
            until(supervisor, is_in(supervisor, "parked"))
            replica = supervisor.replica
            assert replica is not None
            until(supervisor, lambda r=replica: r.resting.left and device_bytes(r) == 0)
        supervisor.wake()
        until(supervisor, lambda: supervisor.state == "warm" and not replica.resting.left)
        assert device_bytes(replica) > 0
        assert supervisor.starts == 1


def test_two_that_do_not_fit_together_take_turns_without_a_start(
    demo_model: Make, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, memory={"memory": 8 << 30, "delay": 0.001})
    models = {name: demo_model(name, "float32") for name in ("llama", "qwen2")}
    told = {
        name: ReplicaOptions(str(path), run_dir=str(no_leaks), device="cuda:0", kv_bytes=KV)
        for name, path in models.items()
    }
    contexts = context_bytes(told["llama"], "cuda:0")
    weights = [
        sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in models.values()
    ]
    # Room for the contexts of both, and for weights and KV of one.
    loop, room, log = Loop(), Room(2 * contexts + max(weights) + KV), Log(process="front")
    policy = FixedKeepAlive(None, None)
    fleet = Fleet(
        {
            name: Supervisor(options, policy, Recorder("front"), log, loop, None, None, room)
            for name, options in told.items()
        },
        loop,
        room,
    )

    def asked(name: str) -> None:
        client = Client()
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        client.request = fleet[name].submit(params, client, prompt_ids=tuple(PROMPT))
        deadline = time.monotonic() + 120
        while not client.done:
            assert time.monotonic() < deadline, {each: model.state for each, model in fleet}
            fleet.poll(0.05)
            fleet.step()
        assert client.error is None
        assert client.tokens == expected(models[name], tuple(PROMPT), 8)

    try:
        for name in ("llama", "qwen2", "llama", "qwen2", "qwen2", "llama"):
            asked(name)
            (other,) = [model for each, model in fleet if each != name]
            if other.replica is not None:
                assert other.state == "parked"
                assert device_bytes(other.replica) == 0
        assert [model.starts for _, model in fleet] == [1, 1]
        assert [model.failures for _, model in fleet] == [0, 0]
    finally:
        fleet.close()
        loop.close()
