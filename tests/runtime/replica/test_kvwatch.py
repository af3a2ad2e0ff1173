"""Which prompts there is KV of, as events: each block behind the one that it continues."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.ropespec import RopeSpec
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.kvwatch import KvWatch, block_hash
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, kv_blocks
from coldframe.runtime.worker.prefix import PrefixKeys
from tests.runtime.helpers import Client, finish, prompt_of, wait_for

Make = Callable[..., Path]
KEYS = PrefixKeys("m", "f", 32, RopeSpec("default", 10000.0, 4096, 4096))
PROMPT = prompt_of(100)
CHAIN = KEYS.of(PROMPT, 100)
HASHES = [block_hash(key) for key in CHAIN]


@pytest.fixture
def watch() -> KvWatch:
    made = KvWatch()
    made.begin(lambda: KEYS)
    return made


def stored(start: int, end: int, ids: list[int] = PROMPT) -> list[Any]:
    """The event of some of the prompt's blocks."""
    parent = HASHES[start - 1] if start else None
    return ["stored", parent, HASHES[start:end], list(ids[32 * start : 32 * end])]


class Tree:
    """What a router makes of events; it refuses blocks that it has no place for."""

    def __init__(self) -> None:
        self.parents: dict[int, int | None] = {}

    def take(self, events: list[list[Any]]) -> None:
        for kind, *rest in events:
            if kind == "removed":
                for name in rest[0]:
                    del self.parents[name]
                continue
            parent, hashes, tokens = rest
            assert len(tokens) == 32 * len(hashes)
            for name in hashes:
                assert parent is None or parent in self.parents
                self.parents[name] = parent
                parent = name


def test_a_hash_is_the_first_64_bits_of_a_key() -> None:
    for key in CHAIN:
        assert struct.pack(">q", block_hash(key)) == bytes.fromhex(key)[:8]


@pytest.mark.parametrize("first", ["tokens", "keys"])
def test_a_block_is_told_when_both_its_tokens_and_its_kv_are_there(
    watch: KvWatch, first: str
) -> None:
    steps = [lambda: watch.learn(PROMPT, 100), lambda: watch.changed(CHAIN, [])]
    for step in steps if first == "tokens" else reversed(steps):
        assert watch.take() == []
        step()
    assert watch.take() == [stored(0, 3)]
    assert watch.take() == []


def test_nothing_is_told_twice(watch: KvWatch) -> None:
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN[:2], [])
    assert watch.take() == [stored(0, 2)]
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN[:2], [])
    assert watch.take() == []
    watch.changed(CHAIN[2:], [])
    assert watch.take() == [stored(2, 3)]


def test_a_block_waits_for_the_one_before_it(watch: KvWatch) -> None:
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN[1:], [])
    assert watch.take() == []
    watch.changed(CHAIN[:1], [])
    assert watch.take() == [stored(0, 1)]
    watch.learn(PROMPT, 100)
    assert watch.take() == [stored(1, 3)]


def test_what_is_forgotten_is_told_and_may_come_again(watch: KvWatch) -> None:
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN, [])
    watch.take()
    watch.changed([], CHAIN[1:])
    assert watch.take() == [["removed", HASHES[1:]]]
    watch.changed([], CHAIN[1:])
    assert watch.take() == []
    watch.changed(CHAIN[1:], [])
    watch.learn(PROMPT, 100)
    assert watch.take() == [stored(1, 3)]


def test_a_replica_that_goes_takes_all_with_it(watch: KvWatch) -> None:
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN, [])
    watch.take()
    watch.lost()
    assert watch.take() == [["removed", HASHES]]
    watch.learn(PROMPT, 100)  # the keys of the next one are not known yet
    watch.changed(CHAIN, [])
    assert watch.take() == []


def test_who_is_told_anew_hears_of_what_is_asked_for_again(watch: KvWatch) -> None:
    watch.learn(PROMPT, 100)
    watch.changed(CHAIN, [])
    watch.forget()
    assert watch.take() == []
    watch.learn(PROMPT[:64], 64)
    assert watch.take() == [stored(0, 2)]


def test_memory_is_bounded(watch: KvWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldframe.runtime.replica.kvwatch._MOST_PENDING", 5)
    for seed in range(9):
        watch.learn(prompt_of(100, seed), 100)
    watch.learn(PROMPT, 100)
    watch.changed(KEYS.of(prompt_of(100, 1), 100), [])
    assert watch.take() == []
    watch.changed(CHAIN, [])
    assert watch.take() == [stored(0, 3)]


def test_a_request_is_followed_to_its_end(watch: KvWatch) -> None:
    answer = prompt_of(40, 1)
    ids = [*PROMPT, *answer]
    chain = KEYS.of(ids, 100)
    watch.changed(chain, [])
    client = Client()
    listener = watch.follow(tuple(PROMPT), tuple(answer[:1]), client)
    for index, token in enumerate(answer[1:]):
        last = "length" if index == len(answer) - 2 else None
        listener.on_token(TokenEvent(index, token, "", last, None, ()))
        expected = 3 if index == 0 else 1 if last else 0
        assert [len(event[2]) for event in watch.take()] == [expected] * bool(expected)
    assert client.tokens == answer[1:]


def test_a_replica_finds_what_it_has_told_and_nothing_else(
    demo_model: Make, no_leaks: Path
) -> None:
    model, watch, tree = demo_model(), KvWatch(), Tree()
    room = 10 * kv_blocks(ModelFacts(str(model)).spec, None)[0]  # of three prompts
    options = ReplicaOptions(model=str(model), run_dir=str(no_leaks), kv_bytes=room)

    def asked(replica: Replica, seed: int) -> int:
        """How many of a prompt's tokens were found."""
        client, prompt = Client(), tuple(prompt_of(90, seed))
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        replica.submit(params, watch.follow(prompt, (), client), prompt_ids=prompt)
        finish(replica, client)
        settle(replica)
        return client.events[0].cached_tokens

    def told(replica: Replica, seed: int) -> int:
        """How many of them a router would expect there."""
        tree.take(watch.take())
        keys = replica._prefix_keys()
        assert keys is not None
        chain = keys.of(prompt_of(90, seed), 90)
        return 32 * sum(block_hash(key) in tree.parents for key in chain)

    with Replica(options, watch=watch) as replica:
        wait_for(replica, lambda: replica.known and replica.loaded)
        found = []
        for seed in (0, 1, 2, 2, 3, 4, 5, 0, 1, 5, 2, 5):
            expected = told(replica, seed)
            found.append(asked(replica, seed))
            assert found[-1] == expected
        assert found[3] == found[-1] == 64
        assert found[7] < 64  # others have come meanwhile
        replica.park()
        wait_for(replica, lambda: told(replica, 5) == 0)
        assert tree.parents == {}
        assert asked(replica, 6) == 0
        assert told(replica, 6) == 64
    tree.take(watch.take())
    assert tree.parents == {}


def settle(replica: Replica) -> None:
    """Waits until no request holds a block, and all that was said until then has come."""
    for _ in range(2):
        wait_for(replica, lambda: usage(replica)["kv_used"] == 0)


def usage(replica: Replica) -> dict[str, int]:
    before = replica.usage
    replica.ask_usage()
    wait_for(replica, lambda: replica.usage is not before)
    return replica.usage
