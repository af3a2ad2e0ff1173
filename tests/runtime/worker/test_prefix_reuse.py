"""Prompts that begin alike, in replicas of real processes: the same answers, from less work."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, kv_blocks
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]
SHARED = (0, 1, 31, 32, 33, 64, 100)
"""How many tokens a prompt has in common with an earlier one of 100."""


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), **more)  # type: ignore[arg-type]


def variant(shared: int, length: int = 100) -> list[int]:
    """A prompt that has so many first tokens in common with the first one, and no more."""
    prompt = prompt_of(length)
    other = [5 + (token - 4) % 495 for token in prompt]  # differs everywhere
    return prompt[:shared] + other[shared:]


def usage(replica: Replica) -> dict[str, int]:
    """What is in use, as of now."""
    before = replica.usage
    replica.ask_usage()
    wait_for(replica, lambda: replica.usage is not before)
    return replica.usage


def settled(replica: Replica) -> dict[str, int]:
    """What is in use once no request holds anything; a worker lets go between two steps."""
    wait_for(replica, lambda: usage(replica)["kv_used"] == 0)
    return replica.usage


def cached(client: Client) -> int:
    assert {event.cached_tokens for event in client.events[1:]} <= {0}
    return client.events[0].cached_tokens


def check(model: Path, prompt: Sequence[int], client: Client, count: int) -> None:
    assert client.error is None
    assert client.tokens == expected(model, tuple(prompt), count)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.heavy)])
def test_answers_are_those_of_transformers(demo_model: Make, no_leaks: Path, family: str) -> None:
    model = demo_model(family)
    with Replica(options(model, no_leaks)) as replica:
        first = ask(replica, prompt_of(100), 9)
        finish(replica, first)
        assert cached(first) == 0
        check(model, prompt_of(100), first, 9)
        before = settled(replica)["kv_reused"]
        for shared in SHARED:
            client = ask(replica, variant(shared), 9)
            finish(replica, client)
            check(model, variant(shared), client, 9)
            # All of a prompt: its last full block is there, its end is not.
            assert cached(client) == shared // 32 * 32
        assert settled(replica)["kv_reused"] - before == sum(shared // 32 for shared in SHARED)


@pytest.mark.heavy
def test_sampled_answers_are_those_without_reuse(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    sampling = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}
    answers = []
    for reuse in (True, False):
        with Replica(options(model, no_leaks, prefix_cache=reuse)) as replica:
            finish(replica, ask(replica, prompt_of(100), 2))
            clients = [
                ask(replica, variant(shared), 30, seed=shared, **sampling) for shared in SHARED
            ]
            finish(replica, *clients)
            assert any(cached(client) for client in clients) == reuse
            assert (settled(replica)["kv_cached"] > 0) == reuse
        answers.append([client.tokens for client in clients])
    assert answers[0] == answers[1]


@pytest.mark.heavy
def test_a_chats_next_turn_finds_the_answer_before_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        prompt, found = prompt_of(50), []
        for turn in range(3):
            client = ask(replica, prompt, 40)
            finish(replica, client)
            check(model, prompt, client, 40)
            found.append(cached(client))
            prompt = [*prompt, *client.tokens, *prompt_of(9, seed=turn)]
    # The last token generated was never computed.
    assert found == [0, (50 + 39) // 32 * 32, (50 + 40 + 9 + 39) // 32 * 32]


@pytest.mark.heavy
def test_many_at_once_with_the_same_beginning(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, decode=2)) as replica:
        prompts = [[*prompt_of(70), *prompt_of(k, seed=k)] for k in range(8)]
        # One computes what they share; the rest find it, while those before them still run.
        early = [ask(replica, prompt, 60) for prompt in prompts[:4]]
        wait_for(replica, lambda: all(client.events for client in early))
        late = [ask(replica, prompt, 60) for prompt in prompts[4:]]
        finish(replica, *early, *late)
        for prompt, client in zip(prompts, early + late, strict=True):
            check(model, prompt, client, 60)
        assert [cached(client) for client in early + late] == [0] + [64] * 7
        settled(replica)


@pytest.mark.heavy
def test_prompts_that_begin_alike_while_the_weights_come(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with Replica(options(model, no_leaks, throttle=size / 1.5)) as replica:
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        prompts = [variant(shared) for shared in (100, 64, 0)]
        clients = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        check(model, prompt, client, 12)


@pytest.mark.heavy
def test_little_memory_is_shared_and_made_room_in(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    block, _ = kv_blocks(ModelFacts(str(model)).spec, None)
    with Replica(options(model, no_leaks, kv_bytes=12 * block)) as replica:
        asked = []
        for seed in (0, 1, 2, 0, 3, 0, 1, 2, 0):
            prompts = [[*prompt_of(100, seed=seed), *prompt_of(k, seed=9)] for k in (0, 3, 40)]
            clients = [ask(replica, prompt, 30) for prompt in prompts]
            finish(replica, *clients)
            asked += list(zip(prompts, clients, strict=True))
        for prompt, client in asked:
            check(model, prompt, client, 30)
        told = settled(replica)
        assert told["kv_reused"] > 0
        assert told["kv_cached"] <= told["kv_total"] == 12
        # All of it is still there for one that needs it.
        large = prompt_of(12 * 32 - 8, seed=11)
        client = ask(replica, large, 9)
        finish(replica, client)
        check(model, large, client, 9)


@pytest.mark.heavy
def test_a_crowd_behind_one_that_goes(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompt = prompt_of(900)
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        first = ask(replica, prompt, 8)
        clients = [ask(replica, prompt, 8) for _ in range(6)]
        replica.cancel(first.request)
        replica.cancel(clients.pop(2).request)
        finish(replica, *clients)
        for client in clients:
            check(model, prompt, client, 8)
        assert sum(cached(client) == 896 for client in clients) >= len(clients) - 1
        settled(replica)


# -- deaths -----------------------------------------------------------------------------------


def kill(replica: Replica, role: str) -> None:
    for name, pid in replica.pids.items():
        if name.startswith(role):
            os.kill(pid, signal.SIGKILL)
            wait_for(replica, lambda pid=pid: pid not in replica.pids.values())  # type: ignore[misc]


@pytest.mark.heavy
def test_workers_killed_over_a_reused_prefix(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, prompt_of(100), 2))
        clients = [ask(replica, variant(shared), 120) for shared in SHARED]
        wait_for(replica, lambda: all(len(client.events) > 5 for client in clients))
        kill(replica, "decode")
        wait_for(replica, lambda: all(len(client.events) > 20 or client.done for client in clients))
        kill(replica, "prefill")
        late = ask(replica, variant(100), 5)
        finish(replica, late, *clients)
        for shared, client in zip(SHARED, clients, strict=True):
            check(model, variant(shared), client, 120)
        assert cached(late) == 96  # what is shared outlives who made it
        check(model, variant(100), late, 5)
        settled(replica)


@pytest.mark.heavy
def test_a_prefill_worker_killed_at_a_reused_prefix(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    long = prompt_of(900, seed=4)
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, long[:600], 2))
        client = ask(replica, long, 8)
        (pid,) = [pid for name, pid in replica.pids.items() if name.startswith("prefill")]
        wait_for(replica, lambda: usage(replica)["kv_used"] > 0 or bool(client.events))
        os.kill(pid, signal.SIGKILL)
        finish(replica, client)
        check(model, long, client, 8)
        again = ask(replica, long, 8)
        finish(replica, again)
        check(model, long, again, 8)
        assert cached(again) == 896
        settled(replica)


@pytest.mark.heavy
def test_lost_kv_is_computed_again_from_what_is_still_there(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, lease_s=0.01)) as replica:
        client = ask(replica, prompt_of(100), 120)
        wait_for(replica, lambda: len(client.events) > 40)
        before = usage(replica)["kv_reused"]
        kill(replica, "decode")
        wait_for(replica, lambda: any(name.startswith("decode") for name in replica.pids))
        (successor,) = [pid for name, pid in replica.pids.items() if name.startswith("decode")]
        os.kill(successor, signal.SIGSTOP)
        settled(replica)  # the lease has run out; what was published stays
        os.kill(successor, signal.SIGCONT)
        finish(replica, client)
        assert usage(replica)["kv_reused"] == before + 3
        check(model, prompt_of(100), client, 120)
        # And what it made then is right for others.
        longer = [*prompt_of(100), *client.tokens]
        other = ask(replica, longer, 5)
        finish(replica, other)
        assert cached(other) == (100 + 119) // 32 * 32
        check(model, longer, other, 5)


def test_a_cancelled_request_leaves_what_it_computed(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        gone = ask(replica, prompt_of(100), 400)
        wait_for(replica, lambda: len(gone.events) > 40)
        replica.cancel(gone.request)
        assert settled(replica)["kv_cached"] >= (100 + 39) // 32
        longer = [*prompt_of(100), *gone.tokens]
        client = ask(replica, longer, 10)
        finish(replica, client)
        assert cached(client) >= (100 + 39) // 32 * 32
        check(model, longer, client, 10)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_dies_whoever_goes(demo_model: Make, no_leaks: Path, seed: int) -> None:
    """Little memory, short leases, a few beginnings and many ends; a worker dies now and then."""
    model, chance = demo_model("llama"), random.Random(seed)
    block, _ = kv_blocks(ModelFacts(str(model)).spec, None)
    prompts = [
        [*prompt_of(shared, seed=start), *prompt_of(end, seed=100 + end)]
        for start in range(3)
        for shared in (31, 64, 100, 150)
        for end in (1, 20, 33)
    ]
    asked: list[tuple[list[int], Client]] = []
    gone: list[Client] = []
    more = {"kv_bytes": 40 * block, "lease_s": 0.05, "prefill": 2, "decode": 2}
    with Replica(options(model, no_leaks, **more)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        end = time.monotonic() + 20
        kill_at = time.monotonic() + 2
        while time.monotonic() < end:
            replica.poll(0.01)
            assert replica.error is None
            open_ones = [client for _, client in asked if not client.done and client not in gone]
            if len(open_ones) < 8:
                prompt = chance.choice(prompts)
                asked.append((prompt, ask(replica, prompt, 25)))
            elif chance.random() < 0.01:
                gone.append(chance.choice(open_ones))
                replica.cancel(gone[-1].request)
            if time.monotonic() > kill_at and replica.pids:
                # Rarer than what ends a replica for good.
                kill_at = time.monotonic() + chance.uniform(9, 12)
                workers = [pid for name, pid in replica.pids.items() if name != "memory"]
                if workers:
                    os.kill(chance.choice(workers), signal.SIGKILL)
        finish(replica, *[client for _, client in asked if client not in gone])
        assert settled(replica)["kv_reused"] > 0
    for prompt, client in asked:
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), 25)[: len(client.tokens)]
        assert client in gone or len(client.tokens) == 25
