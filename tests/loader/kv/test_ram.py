from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coldframe.loader.errors import DeviceError
from coldframe.loader.kv.ram import KvMemory

BLOCK = 16
KEYS = st.sampled_from("abcdefgh")


def block(key: str) -> memoryview:
    return memoryview(bytearray(key.encode() * BLOCK))


def read(memory: KvMemory, key: str) -> memoryview | None:
    into = memoryview(bytearray(BLOCK))
    return into if memory.read(key, into) else None


def test_the_one_used_longest_ago_makes_room() -> None:
    memory = KvMemory(BLOCK, 2, 0)
    for key in "ab":
        assert memory.put(key, block(key), must=False)
    assert read(memory, "a") == block("a")
    memory.touch("a")
    memory.touch("x")
    assert memory.put("c", block("c"), must=False)
    assert [key in memory for key in "abc"] == [True, False, True]
    assert memory.nbytes == 2 * BLOCK


def test_what_must_stay_does_and_goes_once_it_need_not() -> None:
    memory = KvMemory(BLOCK, 0, 2)
    assert not memory.put("a", block("a"), must=False)
    assert memory.put("b", block("b"), must=True)
    assert memory.put("c", block("c"), must=True)
    assert not memory.put("d", block("d"), must=True)
    memory.release("b")
    assert [key in memory for key in "bcd"] == [False, True, False]
    assert memory.put("d", block("d"), must=True)
    assert read(memory, "c") == block("c")
    assert read(memory, "d") == block("d")


def test_what_is_kept_makes_room_for_what_must_stay() -> None:
    memory = KvMemory(BLOCK, 1, 1)
    assert memory.put("a", block("a"), must=False)
    assert memory.put("b", block("b"), must=True)
    assert memory.put("c", block("c"), must=True)
    assert [key in memory for key in "abc"] == [False, True, True]
    assert not memory.put("a", block("a"), must=False)
    memory.release("b")
    memory.release("c")
    assert len(memory) == 1


def test_more_than_there_are_addresses_for_is_refused() -> None:
    with pytest.raises(DeviceError, match="--kv-store-memory"):
        KvMemory(1 << 40, 1 << 20, 0)


class Machine(RuleBasedStateMachine):
    """Any order of calls: blocks are whole, and no more than there may be."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.passing = 2, 2
        self.memory = KvMemory(BLOCK, self.kept, self.passing)
        self.must: set[str] = set()

    @rule(key=KEYS, must=st.booleans())
    def put(self, key: str, must: bool) -> None:
        before = key in self.memory
        there = self.memory.put(key, block(key), must=must)
        assert there == (key in self.memory)
        if not there:
            assert not before
            room = self.kept + self.passing if must else self.kept
            assert len(self.must) >= room, "there was room, or something to drop"
        elif must:
            self.must.add(key)

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        self.memory.release(key)
        self.must.discard(key)

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        there = key in self.memory
        assert read(self.memory, key) == (block(key) if there else None)

    @invariant()
    def as_many_as_may_be(self) -> None:
        assert all(key in self.memory for key in self.must)
        assert len(self.memory) <= self.kept + self.passing
        assert len(self.memory) <= max(self.kept, len(self.must) + self.kept)


Machine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
