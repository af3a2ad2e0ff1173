"""A worker's blocks, from a real memory service."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import RequestError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.ropespec import RopeSpec
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.worker.kvpool import KvPool
from coldframe.runtime.worker.prefix import PrefixKeys
from tests.runtime.helpers import prompt_of

Make = Callable[..., Path]
BLOCKS = 16
TOKENS = 32
ROPE = RopeSpec("default", 10000.0, 4096, 4096)


class Silent:
    """A text stream for requests whose text nobody reads."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> tuple[str, bool]:
        return "", False

    def spell(self, token: int) -> bytes:
        return b""


@pytest.fixture
def launch(demo_model: Make, no_leaks: Path) -> Iterator[Launch]:
    """A memory service with 16 blocks, and nobody else."""
    options = ReplicaOptions(str(demo_model("llama")), run_dir=str(no_leaks))
    launch = Launch(options, Recorder("front"))
    memory = launch.memories[0].channel
    memory.send({"type": "kv", "block_bytes": 4096, "blocks": BLOCKS, "lease_s": 30.0})
    while (message := memory.recv(timeout=10)) is not None:
        if message.kind == "listening":
            break
    yield launch
    launch.close()


@pytest.fixture
def client(launch: Launch) -> Iterator[MemoryClient]:
    client = connect(launch)
    yield client
    client.close()


def connect(launch: Launch) -> MemoryClient:
    client = MemoryClient(Channel.connect(os.path.join(launch.run_dir, "memory.sock")), "worker")
    client.wait_arenas()
    return client


def pool_of(client: MemoryClient, *, reuse: bool = True) -> KvPool:
    keys = PrefixKeys("m", "f", TOKENS, ROPE) if reuse else None
    return KvPool(client, BLOCKS, TOKENS, "cpu", keys)


def request(
    launch: Launch, name: str, prompt: list[int], answer: int = 1, attempt: int = 0
) -> Sequence:
    """A request that the front has opened."""
    launch.memories[0].channel.send({"type": "open", "request": name})
    params = SamplingParams(max_tokens=answer)
    return Sequence(name, attempt, tuple(prompt), (), params, Silent(), ())


def eventually(take: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not take():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def served(launch: Launch, pool: KvPool, sequence: Sequence) -> Sequence:
    """A request from its start to its end, as if it had been computed."""
    eventually(lambda: pool.take(sequence))
    sequence.kv_tokens = sequence.tokens
    pool.finish(sequence)
    launch.memories[0].channel.send({"type": "release", "request": sequence.request})
    return sequence


def test_requests_get_all_their_blocks_at_once(launch: Launch, client: MemoryClient) -> None:
    pool = pool_of(client)
    taken: list[int] = []
    for number, tokens in enumerate((1, 32, 33, 200)):
        sequence = request(launch, f"r{number}", prompt_of(tokens, seed=number))
        eventually(lambda s=sequence: pool.take(s))  # type: ignore[misc]
        assert len(sequence.blocks) == -(-tokens // TOKENS)
        assert sequence.kv_tokens == 0
        taken += sequence.blocks
    assert len(set(taken)) == len(taken)


def test_more_than_there_is_can_never_be_had(launch: Launch, client: MemoryClient) -> None:
    sequence = request(launch, "r", prompt_of(BLOCKS * TOKENS + 1))
    with pytest.raises(RequestError, match="at most 512 tokens"):
        pool_of(client).take(sequence)


@pytest.mark.parametrize(
    ("shared", "more", "reused"),
    [(0, 40, 0), (31, 40, 0), (32, 40, 32), (33, 40, 32), (64, 0, 32), (64, 1, 64), (70, 9, 64)],
)
def test_what_begins_alike_is_found(
    launch: Launch, client: MemoryClient, shared: int, more: int, reused: int
) -> None:
    pool = pool_of(client)
    first = served(launch, pool, request(launch, "first", prompt_of(90)))
    prompt = prompt_of(90)[:shared] + prompt_of(more, seed=5)
    second = request(launch, "second", prompt, answer=8)
    eventually(lambda: pool.take(second))
    assert (second.kv_tokens, second.cached_tokens) == (reused, reused)
    assert second.blocks[: reused // TOKENS] == first.blocks[: reused // TOKENS]
    # The token that is computed first lies in a block of its own.
    assert not set(second.blocks[reused // TOKENS :]) & set(first.blocks[:2])


def test_nothing_is_found_where_nothing_is_to_be_reused(
    launch: Launch, client: MemoryClient
) -> None:
    pool = pool_of(client, reuse=False)
    served(launch, pool, request(launch, "first", prompt_of(90)))
    second = served(launch, pool_of(client), request(launch, "second", prompt_of(90)))
    assert second.cached_tokens == 0
    third = request(launch, "third", prompt_of(90))
    eventually(lambda: pool.take(third))
    assert third.kv_tokens == 0


def test_what_was_generated_belongs_to_what_is_found(launch: Launch, client: MemoryClient) -> None:
    pool = pool_of(client)
    first = request(launch, "first", prompt_of(30), answer=40)
    first.generated_ids = prompt_of(36, seed=3)
    served(launch, pool, first)
    turn = request(launch, "turn", [*prompt_of(30), *first.generated_ids, 7, 8, 9])
    eventually(lambda: pool.take(turn))
    assert turn.cached_tokens == 64


def test_a_request_is_claimed_with_what_it_has(launch: Launch, client: MemoryClient) -> None:
    other = connect(launch)
    pool, next_pool = pool_of(client), pool_of(other)
    first = request(launch, "r", prompt_of(40), answer=8)
    eventually(lambda: pool.take(first))
    again = request(launch, "r", prompt_of(40), answer=8)
    again.generated_ids = [7]
    assert not next_pool.claim(again, 40, "cpu")
    first.kv_tokens = 40
    pool.hand_over(first)
    assert next_pool.claim(again, 40, "cpu")
    assert (again.blocks, again.kv_tokens) == (first.blocks, 40)
    other.close()


@pytest.mark.parametrize("way", ["publish", "hand_over", "finish"])
def test_what_was_begun_is_done_before_anybody_hears(
    launch: Launch, client: MemoryClient, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    said: list[str] = []
    for name in ("publish", "drop", "finish"):
        real = getattr(client, name)

        def tell(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            said.append(name)
            return real(*arguments)

        monkeypatch.setattr(client, name, tell)
    pool = KvPool(client, BLOCKS, TOKENS, "cpu", settle=lambda: said.append("settled"))
    sequence = request(launch, "r", prompt_of(40), answer=8)
    eventually(lambda: pool.take(sequence))
    assert said == []  # who only takes waits for nothing
    getattr(pool, way)(sequence)
    then = {"publish": [], "hand_over": ["drop"], "finish": ["finish"]}[way]
    assert said == ["settled", "publish", *then]


def test_a_dead_workers_request_finds_its_own_prefix(launch: Launch, client: MemoryClient) -> None:
    other = connect(launch)
    first = request(launch, "r", prompt_of(80), answer=8)
    eventually(lambda: pool_of(other).take(first))
    first.kv_tokens = 80
    pool_of(other).publish(first)
    again = request(launch, "r", prompt_of(80), answer=8, attempt=1)
    pool = pool_of(client)
    assert not pool.take(again)  # it is not known to be dead yet
    assert not pool.may_take
    other.close()
    eventually(lambda: pool.may_take)
    assert pool.take(again)
    assert again.cached_tokens == 64
    assert again.blocks[:2] == first.blocks[:2]


def test_who_is_too_big_for_the_rest_waits(launch: Launch, client: MemoryClient) -> None:
    pool = pool_of(client)
    small = request(launch, "small", prompt_of(TOKENS))
    eventually(lambda: pool.take(small))
    large = request(launch, "large", prompt_of(BLOCKS * TOKENS))
    eventually(lambda: not pool.take(large) and not pool.may_take)
    pool.finish(small)
    eventually(lambda: pool.may_take)
    eventually(lambda: pool.take(large))
