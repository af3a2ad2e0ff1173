"""Requests that wait for KV to be brought in, in every order in which that can end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coldframe.loader.kv import prepare as kvprepare
from coldframe.loader.kv.ledger import BlockLedger, Blocks, KvUsage, Named
from coldframe.loader.kv.prepare import KvPreparer
from coldframe.loader.kv.store import KvStore

BLOCKS = 8


def keys(text: str) -> list[str]:
    return [text[: end + 1] for end in range(len(text))]


class Slow(KvStore):
    """A store whose disk takes as long as a test wants, and may hang."""

    def __init__(self) -> None:
        self.there = 99
        self.full = False
        self.asked: list[tuple[Named, list[str], list[int]]] = []
        self.told: Named = []
        self._ends: list[Callable[[], None]] = []

    def fetch(
        self,
        forgotten: Named,
        keys: Sequence[str],
        blocks: Sequence[int],
        done: Callable[[int], None],
    ) -> None:
        self.asked.append((forgotten, list(keys), list(blocks)))
        self._ends.append(lambda: done(min(self.there, len(keys))))

    def end(self) -> None:
        """The one that was begun first is over."""
        self._ends.pop(0)()

    def saves(self) -> bool:
        return self.full

    def published(self, blocks: Named, *, fetched: bool = False) -> None:
        assert fetched
        self.told += blocks


class Desk:
    """As the memory service has it, without sockets."""

    def __init__(self, lease_s: float = 10.0) -> None:
        self.ledger = BlockLedger(BLOCKS, lease_s)
        self.store = Slow()
        self.rung = 0
        self.preparer = KvPreparer(self.ledger, self.store, lambda do: do(), self.ring, lease_s)

    def ring(self) -> None:
        self.rung += 1

    def ask(self, request: str, text: str, count: int, worker: str = "w") -> Blocks | None:
        self.ledger.open(request, "g")
        if not self.preparer.may_assign(worker, request, 0, count, keys(text)):
            return None
        return self.ledger.assign(worker, request, 0, count, keys(text))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_who_asks_again_has_it(desk: Desk) -> None:
    assert desk.ask("r", "abc", 4) is None
    assert desk.store.asked == [([], ["a", "ab", "abc"], [0, 1, 2])]
    assert desk.ask("r", "abc", 4) is None  # not yet, and not twice
    desk.store.there = 2
    desk.store.end()
    assert desk.rung == 1
    assert desk.store.told == [("a", 0), ("ab", 1)]
    got = desk.ask("r", "abc", 4)
    assert got is not None
    assert (got.blocks[:2], got.reused, got.forgotten) == ([0, 1], 2, [])
    assert desk.ledger.usage == KvUsage(used=4, cached=0, total=BLOCKS, reused=2)
    assert len(desk.store.asked) == 1


def test_what_is_in_the_arena_is_not_asked_for(desk: Desk) -> None:
    desk.ask("r", "ab", 3)
    desk.store.end()
    assert desk.ask("r", "ab", 3) is not None
    desk.ledger.publish("w", "r", keys("abc"))
    desk.ledger.finish("w", "r")
    got = desk.ask("s", "abc", 4)
    assert got is not None
    assert got.reused == 3
    assert desk.ask("t", "abcd", 5) is None
    assert desk.store.asked[-1] == ([], ["abcd"], [desk.ledger.pool.blocks - 4])


def test_prompts_without_a_full_block_wait_for_nothing(desk: Desk) -> None:
    assert desk.ask("r", "", 2) is not None
    assert desk.store.asked == []


def test_what_would_be_lost_is_saved_first(desk: Desk) -> None:
    desk.ask("r", "abc", 3)
    desk.store.end()
    desk.ask("r", "abc", 3)
    desk.ledger.finish("w", "r")
    desk.store.full = True
    assert desk.ask("s", "", 6) is None
    assert desk.store.asked[-1] == ([("abc", 2)], [], [])
    desk.store.end()
    got = desk.ask("s", "", 6)
    assert got is not None
    assert got.forgotten == []
    assert desk.ledger.usage.cached == 2


@pytest.mark.parametrize("ends", ["before", "after"])
@pytest.mark.parametrize("how", ["released", "worker", "gateway"])
def test_who_goes_leaves_no_block_behind(desk: Desk, ends: str, how: str) -> None:
    assert desk.ask("r", "abc", 6) is None
    if ends == "before":
        desk.store.end()
    if how == "released":
        desk.ledger.release("r")
    elif how == "gateway":
        desk.ledger.gateway_gone("g")
    else:
        desk.preparer.worker_gone("w")
    desk.preparer.tidy()
    if ends == "after":
        assert desk.ledger.usage.used == 6  # somebody still writes to them
        desk.store.end()
    assert desk.ledger.usage == KvUsage(used=0, cached=3, total=BLOCKS, reused=0)
    assert desk.ledger.pool.free == BLOCKS


def test_another_worker_takes_up_what_a_dead_one_has_left(desk: Desk) -> None:
    assert desk.ask("r", "abc", 4) is None
    desk.preparer.worker_gone("w")
    assert desk.ask("r", "abc", 4, worker="x") is None
    desk.store.end()
    desk.store.end()
    got = desk.ask("r", "abc", 4, worker="x")
    assert got is not None
    assert got.reused == 3
    assert desk.ledger.usage.used == 4


def test_a_disk_that_hangs_is_not_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.ask("r", "abc", 4) is None
    monkeypatch.setattr(kvprepare, "_PATIENCE_S", 0.0)
    got = desk.ask("r", "abc", 4)
    assert got is not None
    assert got.reused == 0
    assert len(set(got.blocks) | {0, 1, 2, 3}) == 8, "a block that is still being read into"
    desk.ledger.finish("w", "r")
    # Nor by others, until it is over.
    assert desk.ask("s", "xyz", 4) is not None
    desk.ledger.finish("w", "s")
    desk.store.end()
    assert desk.ledger.usage == KvUsage(used=0, cached=3, total=BLOCKS, reused=0)
    assert desk.ask("t", "xyz", 4) is None


def test_blocks_that_nobody_asks_for_again_go_back() -> None:
    for lease_s, used in ((10.0, 4), (-1.0, 0)):
        desk = Desk(lease_s)
        assert desk.ask("r", "abc", 4) is None
        desk.preparer.tidy()  # not while it is read into
        assert desk.ledger.usage.used == 4
        desk.store.end()
        desk.preparer.tidy()
        assert desk.ledger.usage.used == used


def test_what_is_ready_gives_way_to_who_cannot_have_its_own(desk: Desk) -> None:
    assert desk.ask("r", "abc", 6) is None
    assert not desk.preparer.give_way()  # it is being read into
    desk.store.end()
    assert desk.ask("s", "xyz", 6, worker="x") is None
    assert desk.preparer.give_way()
    assert desk.ask("s", "xyz", 6, worker="x") is None  # now it is its turn to be prepared
    desk.store.end()
    got = desk.ask("s", "xyz", 6, worker="x")
    assert got is not None
    assert got.reused == 3
    assert desk.ask("r", "abc", 6) is None


def test_who_may_have_none_causes_nothing(desk: Desk) -> None:
    assert desk.ask("r", "", 2) is not None
    assert desk.ask("r", "abc", 4) is None  # it has what it asks for
    assert desk.preparer.may_assign("w", "unknown", 0, 4, keys("abc"))
    assert desk.store.asked == []


# -- any order of events --------------------------------------------------------------------------

REQUESTS = st.sampled_from("rstu")
WORKERS = st.sampled_from(["w", "x"])
TEXTS = st.text("ab", max_size=4)


class Memory(Slow):
    """What lies in each block, written to by threads that are as slow as chance wants."""

    def __init__(self, blocks: list[str], kept: set[str]) -> None:
        super().__init__()
        self.blocks = blocks
        self.kept = kept
        self.running: list[Callable[[], None]] = []

    def fetch(
        self,
        forgotten: Named,
        keys: Sequence[str],
        blocks: Sequence[int],
        done: Callable[[int], None],
    ) -> None:
        for key, block in forgotten:
            assert self.blocks[block] == key, "it was written to before it was saved"

        def end() -> None:
            there = 0
            for place, block in enumerate(blocks):
                self.blocks[block] = "half read"
                if there == place and keys[place] in self.kept:
                    self.blocks[block] = keys[place]
                    there += 1
            done(there)

        self.running.append(end)


class PreparerMachine(RuleBasedStateMachine):
    """Workers that write to what they are given find it as they left it, whatever comes between."""

    def __init__(self) -> None:
        super().__init__()
        self.patience_s = kvprepare._PATIENCE_S
        self.memory = ["" for _ in range(BLOCKS)]
        self.desk = Desk()
        self.store = Memory(self.memory, {"a", "ab", "aba", "abb", "b"})
        self.desk.preparer._store = self.store
        self.held: dict[str, tuple[str, str, Blocks]] = {}
        """By request: who holds its blocks, its text, and what it got."""
        self.attempts = dict.fromkeys("rstu", 0)

    @rule(request=REQUESTS, worker=WORKERS, text=TEXTS, more=st.integers(0, 3), hangs=st.booleans())
    def ask(self, request: str, worker: str, text: str, more: int, hangs: bool) -> None:
        if request in self.held:
            return
        ledger, count, attempt = self.desk.ledger, len(text) + more, self.attempts[request]
        ledger.open(request, "g")
        kvprepare._PATIENCE_S = -1.0 if hangs else self.patience_s
        if not self.desk.preparer.may_assign(worker, request, attempt, count, keys(text)):
            return
        got = ledger.assign(worker, request, attempt, count, keys(text))
        if got is None and self.desk.preparer.give_way():
            got = ledger.assign(worker, request, attempt, count, keys(text))
        if got is None:
            return
        for key, block in got.forgotten:
            assert self.memory[block] == key
        for place, block in enumerate(got.blocks):
            if place < got.reused:
                assert self.memory[block] == text[: place + 1]
            else:
                self.memory[block] = f"{request} {place}"
        self.held[request] = (worker, text, got)

    @rule(which=st.integers(0, 3))
    def read(self, which: int) -> None:
        if which < len(self.store.running):
            self.store.running.pop(which)()

    @rule(request=REQUESTS)
    def finish(self, request: str) -> None:
        if request in self.held:
            worker, text, got = self.held.pop(request)
            for place, block in enumerate(got.blocks[: len(text)]):
                self.memory[block] = text[: place + 1]
            self.desk.ledger.publish(worker, request, keys(text))
            self.desk.ledger.finish(worker, request)
            self.release(request)

    @rule(request=REQUESTS)
    def release(self, request: str) -> None:
        if request not in self.held:  # else its worker has not heard of it yet
            self.desk.ledger.release(request)
            self.desk.preparer.tidy()
            self.attempts[request] = 0

    @rule(worker=WORKERS)
    def worker_gone(self, worker: str) -> None:
        self.desk.preparer.worker_gone(worker)
        self.desk.ledger.worker_gone(worker, 0.0)
        for request in [request for request, held in self.held.items() if held[0] == worker]:
            del self.held[request]
            self.attempts[request] += 1

    @invariant()
    def nobody_writes_to_what_is_not_his(self) -> None:
        for request, (_, text, got) in self.held.items():
            for place, block in enumerate(got.blocks):
                mine = text[: place + 1] if place < got.reused else f"{request} {place}"
                assert self.memory[block] == mine

    def teardown(self) -> None:
        kvprepare._PATIENCE_S = self.patience_s
        while self.store.running:
            self.read(0)
        for worker in ("w", "x"):
            self.worker_gone(worker)
        for request in "rstu":
            self.release(request)
        assert self.desk.ledger.pool.free == BLOCKS
        for key, block in self.desk.ledger.pool.kept:
            assert self.memory[block] == key


PreparerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPreparerMachine = PreparerMachine.TestCase
