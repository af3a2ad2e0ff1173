"""Replicas that prefill on one GPU and decode on another, both emulated; see `emulated`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import memories
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.scaling.policies import FixedKeepAlive
from tests.runtime.emulated import emulate
from tests.runtime.endpoint.test_supervisor import answers, is_in, kill, supervised, until
from tests.runtime.endpoint.test_supervisor import ask as ask_supervisor
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.replica.test_hangs import LIMIT_S, short
from tests.runtime.replica.test_resident import device_bytes

Make = Callable[..., Path]
FIRST, SECOND = "cuda:0", "cuda:1"
KV = 16 << 20
LATE = {"devices": 2, "delay": 0.001}


def asked(**more: object) -> dict[str, object]:
    """What a replica on two GPUs is to be, beside its model."""
    scales = {"prefill": Scale(1, 1, FIRST), "decode": Scale(1, 1, SECOND)}
    return {**scales, "device": FIRST, "kv_bytes": KV, **more}


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(str(model), run_dir=str(runs), **asked(**more))  # type: ignore[arg-type]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, memory=LATE, worker={"devices": 2})


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def pid_of(replica: Replica, name: str) -> int:
    """A process by the beginning of its name."""
    (found,) = [pid for full, pid in replica.pids.items() if full.rpartition("-")[0] == name]
    return found


def nothing_is_held(replica: Replica) -> None:
    """No request has a block on either device any more; workers let go between two steps."""
    wait_for(replica, lambda: replica.idle)
    deadline = time.monotonic() + 30
    while True:
        before = replica.usage
        replica.ask_usage()
        wait_for(replica, lambda before=before: replica.usage is not before)  # type: ignore[misc]
        if not replica.usage["kv_used"]:
            return
        assert time.monotonic() < deadline, replica.usage


def computed_again(replica: Replica) -> list[str]:
    """Who has computed KV that another worker had computed before."""
    return [s.process for s in replica.spans if s.note == "between decode steps"]


def right(model: Path, prompt: list[int], client: Client) -> None:
    assert client.error is None
    assert client.tokens == expected(model, tuple(prompt), len(client.tokens))


def test_answers_are_those_of_transformers(model: Path, no_leaks: Path, two_gpus: None) -> None:
    prompts = [prompt_of(length, seed=length) for length in (1, 100)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 6) for prompt in prompts]
        finish(replica, *clients)
        assert replica.facts["device"] == "cuda:0, cuda:1"
        assert replica.facts["gpu"]["name"].startswith("Emulated GPU")
        assert list(replica.pids)[:2] == ["memory", "memory-2"]
        assert replica.loaded
        assert computed_again(replica) == []
        nothing_is_held(replica)
        assert replica.kv_bytes is not None
        assert replica.usage["bytes_done"] == replica.facts["weights_bytes"]
        spans = {(s.process, s.name) for s in replica.spans}
        assert {("memory", "weight_read"), ("memory-2", "weight_read")} <= spans
    for prompt, client in zip(prompts, clients, strict=True):
        right(model, prompt, client)


@pytest.mark.heavy
def test_prompts_that_begin_alike_are_kept_on_both(
    model: Path, no_leaks: Path, two_gpus: None
) -> None:
    head = prompt_of(128)
    # How much KV there is, each memory service finds out for its own device.
    with Replica(options(model, no_leaks, kv_bytes=None)) as replica:
        for seed in range(4):
            prompt = [*head, *prompt_of(20, seed=seed)]
            client = ask(replica, prompt, 6)
            finish(replica, client)
            right(model, prompt, client)
            assert client.events[0].cached_tokens == (128 if seed else 0)
        # All of this one's KV is there already, so that nothing is brought.
        client = ask(replica, head, 6)
        finish(replica, client)
        right(model, head, client)
        nothing_is_held(replica)
        assert computed_again(replica) == []
        assert replica.kv_bytes is not None
        assert replica.usage["kv_total"] % 2 == 0
        # Four blocks there and four here, of each but the first; of the last one's three there,
        # since its last token is computed in any case.
        assert replica.usage["kv_reused"] == 2 * 3 * 4 + 3 + 4


@pytest.mark.heavy
def test_many_at_once_share_what_room_there_is(model: Path, no_leaks: Path, two_gpus: None) -> None:
    prompts = [prompt_of(60 + 40 * (n % 3), seed=n) for n in range(12)]
    with Replica(options(model, no_leaks, kv_bytes=1 << 20, decode=Scale(2, 2, SECOND))) as replica:
        clients = [ask(replica, prompt, 24) for prompt in prompts]
        finish(replica, *clients, seconds=120)
        nothing_is_held(replica)
    for prompt, client in zip(prompts, clients, strict=True):
        right(model, prompt, client)


@pytest.mark.heavy
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_worker_dies(model: Path, no_leaks: Path, two_gpus: None, role: str, tokens: int) -> None:
    prompt = prompt_of(100)
    with Replica(options(model, no_leaks)) as replica:
        wait_for(replica, lambda: replica.loaded)
        clients = [ask(replica, prompt, 40), ask(replica, prompt[:50], 40)]
        wait_for(replica, lambda: len(clients[0].events) >= tokens)
        os.kill(pid_of(replica, role), signal.SIGKILL)
        finish(replica, *clients)
        right(model, prompt, clients[0])
        right(model, prompt[:50], clients[1])
        nothing_is_held(replica)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_whoever_dies_or_goes_away_no_block_is_lost(
    model: Path, no_leaks: Path, two_gpus: None, seed: int
) -> None:
    chance = random.Random(seed)
    more = {"kv_bytes": 2 << 20, "lease_s": 2.0, "prefill": Scale(2, 2, FIRST)}
    with Replica(options(model, no_leaks, **more)) as replica:
        wait_for(replica, lambda: replica.loaded)
        prompts = [prompt_of(chance.randrange(1, 200), seed=n) for n in range(30)]
        clients = [ask(replica, prompt, chance.randrange(1, 40)) for prompt in prompts]
        gone = set()
        for _ in range(3):  # one more, and a request may be given up for it
            tokens = sum(len(client.events) for client in clients) + chance.randrange(1, 60)
            wait_for(
                replica,
                lambda n=tokens: (
                    sum(len(c.events) for c in clients) >= n  # type: ignore[misc]
                    or all(c.done for c in clients if c.request not in gone)
                ),
            )
            for client in chance.sample(clients, 2):
                replica.cancel(client.request)
                gone.add(client.request)
            victim = chance.choice([n for n in replica.pids if not n.startswith("memory")])
            os.kill(replica.pids[victim], signal.SIGKILL)
        finish(replica, *(c for c in clients if c.request not in gone), seconds=120)
        for prompt, client in zip(prompts, clients, strict=True):
            if client.request not in gone or client.done:
                right(model, prompt, client)
        nothing_is_held(replica)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["memory", "memory-2"])
@pytest.mark.parametrize("moment", ["loading", "warm", "asked"])
def test_a_memory_service_dies(
    model: Path, no_leaks: Path, two_gpus: None, name: str, moment: str
) -> None:
    more = {"throttle": 4e6} if moment == "loading" else {}
    with supervised(model, no_leaks, **asked(**more)) as supervisor:
        if moment == "loading":
            until(supervisor, lambda: supervisor.replica is not None and supervisor.replica.board)
        else:
            answers(supervisor, model)
        client = ask_supervisor(supervisor, 200) if moment == "asked" else None
        if client is not None:
            until(supervisor, lambda: len(client.events) > 3)
        kill(supervisor, name)
        until(supervisor, lambda: supervisor.starts == 2)
        answers(supervisor, model)
        if client is not None:  # it had tokens, and is told
            assert client.error is not None
            assert "the memory service died" in str(client.error)
        replica = supervisor.replica
        assert replica is not None
        nothing_is_held(replica)


@pytest.mark.heavy
def test_a_memory_service_that_hangs_is_one_that_has_died(
    model: Path, no_leaks: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(model, no_leaks, **asked()) as supervisor:
        answers(supervisor, model)
        assert supervisor.replica is not None
        os.kill(supervisor.replica.pids["memory-2"], signal.SIGSTOP)
        with short(monkeypatch, memories, _SILENCE_S=LIMIT_S):
            until(supervisor, lambda: supervisor.starts == 2)
        answers(supervisor, model)


@pytest.mark.heavy
def test_who_goes_away_leaves_nothing(model: Path, no_leaks: Path, two_gpus: None) -> None:
    prompts = [prompt_of(150, seed=seed) for seed in range(10)]
    with Replica(options(model, no_leaks)) as replica:
        wait_for(replica, lambda: replica.loaded)
        for wanted in range(6):
            clients = [ask(replica, prompt, 30) for prompt in prompts]
            some = clients[0]
            wait_for(replica, lambda some=some, n=wanted: len(some.events) >= n)  # type: ignore[misc]
            for client in clients[:-1]:
                replica.cancel(client.request)
            finish(replica, clients[-1])
            right(model, prompts[-1], clients[-1])
            nothing_is_held(replica)


@pytest.mark.heavy
def test_both_are_free_while_it_rests(model: Path, no_leaks: Path, two_gpus: None) -> None:
    prompt = prompt_of(40)
    with Replica(options(model, no_leaks)) as replica:
        before: dict[str, int] = {}
        for _ in range(3):
            client = ask(replica, prompt, 8)
            finish(replica, client)
            right(model, prompt, client)
            before = before or replica.pids
            assert not replica.resting.left
            nothing_is_held(replica)
            wait_for(replica, lambda: replica.loaded)
            replica.park()
            wait_for(replica, lambda: replica.resting.left and device_bytes(replica) == 0)
            assert "locked memory" in replica.resting.told["note"]
        # Nobody was started anew.
        assert replica.pids == before


@pytest.mark.heavy
def test_who_rests_and_dies_comes_back(model: Path, no_leaks: Path, two_gpus: None) -> None:
    policy = FixedKeepAlive(idle_s=0.2, park_s=None)
    with supervised(model, no_leaks, policy, **asked()) as supervisor:
        for role in ("prefill", "decode"):
            answers(supervisor, model)
            until(supervisor, is_in(supervisor, "parked"))
            replica = supervisor.replica
            assert replica is not None
            until(supervisor, lambda r=replica: r.resting.left and device_bytes(r) == 0)
            os.kill(pid_of(replica, role), signal.SIGKILL)
        answers(supervisor, model)
        assert supervisor.starts == 1


@pytest.mark.heavy
def test_a_gpu_that_is_lost_starts_both_anew(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with monkeypatch.context() as patch:
        emulate(patch, memory={"devices": 2, "lose_at_copy": 2}, worker={"devices": 2})
        replica = Replica(options(model, no_leaks), warn=told.append)
    with replica:
        emulate(monkeypatch, memory=LATE, worker={"devices": 2})
        client = ask(replica, prompt_of(40), 8)
        finish(replica, client)
        right(model, prompt_of(40), client)
        assert told[0].startswith("cuda:0 or cuda:1 was lost: ")


@pytest.mark.heavy
def test_without_a_second_gpu_it_says_so_or_takes_the_cpu(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    with Replica(options(model, no_leaks)) as replica:
        wait_for(replica, lambda: replica.error is not None)
        assert type(replica.error).__name__ == "NoDevice"
    with Replica(options(model, no_leaks, fall_back=True)) as replica:
        client = ask(replica, prompt_of(40), 8)
        finish(replica, client)
        right(model, prompt_of(40), client)
        assert replica.facts["device"] == "cpu"
        assert set(replica.pids) & {"memory", "memory-2"} == {"memory"}
