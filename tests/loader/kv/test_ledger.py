from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coldframe.loader.errors import ArenaError
from coldframe.loader.kv.ledger import BlockLedger, Blocks, KvUsage, Reserved

BLOCKS = 8
LEASE = 10.0
WORKERS = st.sampled_from(["prefill", "decode", "third"])
REQUESTS = st.sampled_from(["a", "b", "c", "d"])
GATEWAYS = st.sampled_from(["g", "h"])
ATTEMPTS = st.integers(0, 2)
TEXTS = st.text("xy", max_size=5)
"""A letter stands for the tokens of a block, and the text up to it for its key."""


def keys(text: str) -> list[str]:
    return [text[: end + 1] for end in range(len(text))]


@pytest.fixture
def ledger() -> BlockLedger:
    ledger = BlockLedger(4, lease_s=LEASE)
    ledger.open("r", "g")
    return ledger


def serve(ledger: BlockLedger, request: str, count: int, text: str) -> Blocks:
    """A request from its start to its end."""
    ledger.open(request, "g")
    got = ledger.assign("w", request, 0, count, keys(text))
    assert got is not None
    ledger.publish("w", request, keys(text))
    ledger.finish("w", request)
    ledger.release(request)
    return got


# -- requests and their holders -------------------------------------------------------------------


def test_a_request_gets_all_its_blocks_or_none(ledger: BlockLedger) -> None:
    ledger.open("s", "g")
    assert ledger.assign("w", "r", 0, 5) is None
    assert ledger.assign("w", "r", 0, 3) == Blocks([0, 1, 2], 0)
    assert ledger.assign("w", "s", 0, 2) is None
    assert ledger.assign("w", "s", 0, 1) == Blocks([3], 0)
    assert ledger.usage == KvUsage(used=4, cached=0, total=4, reused=0)


def test_blocks_are_handed_over_in_their_order(ledger: BlockLedger) -> None:
    assert ledger.claim("decode", "r", 0) is None  # nothing there yet
    got = ledger.assign("prefill", "r", 0, 3)
    assert got is not None
    assert ledger.claim("decode", "r", 0) is None
    ledger.publish("prefill", "r", [])
    assert ledger.claim("decode", "r", 0) is None  # still held
    ledger.drop("decode", "r", 0.0)  # not its to drop
    assert ledger.claim("decode", "r", 0) is None
    ledger.drop("prefill", "r", 0.0)
    assert ledger.claim("decode", "r", 0) == got.blocks
    assert ledger.assign("prefill", "r", 0, 1) is None


def test_what_was_given_is_not_the_ledgers_own_list(ledger: BlockLedger) -> None:
    got = ledger.assign("w", "r", 0, 1)
    assert got is not None
    got.blocks.append(98)
    ledger.publish("w", "r", [])
    claimed = ledger.claim("w", "r", 0)
    assert claimed is not None
    claimed.append(99)
    assert ledger.claim("w", "r", 0) == [0]


def test_a_holder_cannot_lose_what_it_has_by_asking_twice(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 2)
    assert ledger.assign("w", "r", 0, 2) is None
    assert ledger.usage.used == 2


def test_what_was_never_written_cannot_be_claimed(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 3)
    ledger.worker_gone("w", 0.0)
    assert ledger.claim("x", "r", 1) is None
    assert ledger.assign("x", "r", 1, 4) is not None  # they are free for it at once


def test_what_was_written_outlives_its_worker(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 3)
    ledger.publish("w", "r", [])
    ledger.worker_gone("w", 0.0)
    assert ledger.claim("x", "r", 1) == [0, 1, 2]
    ledger.worker_gone("x", 60.0)
    assert ledger.claim("y", "r", 2) == [0, 1, 2]


def test_a_new_attempt_replaces_what_the_old_one_left(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 3)
    ledger.worker_gone("w", 0.0)
    assert ledger.pool.free == 1
    assert ledger.assign("x", "r", 1, 1) == Blocks([0], 0)
    assert ledger.pool.free == 3


def test_an_old_attempt_comes_too_late(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 1, 1)
    ledger.publish("w", "r", [])
    ledger.drop("w", "r", 0.0)
    assert ledger.claim("x", "r", 0) is None
    assert ledger.assign("x", "r", 0, 1) is None
    # A claim for a newer attempt takes what is there, and the older one is out.
    assert ledger.claim("x", "r", 2) == [0]
    ledger.drop("x", "r", 0.0)
    assert ledger.claim("w", "r", 1) is None


def test_a_lease_begins_when_the_holder_lets_go(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 2)
    ledger.publish("w", "r", [])
    assert ledger.expire(1e9) == []  # held
    ledger.drop("w", "r", 100.0)
    assert ledger.expire(100.0 + LEASE - 0.001) == []
    assert ledger.expire(100.0 + LEASE) == ["r"]
    assert ledger.pool.free == 4
    assert ledger.expire(1e9) == []
    assert ledger.claim("x", "r", 0) is None
    assert ledger.requests == 1  # it lives on, without KV
    assert ledger.assign("x", "r", 0, 1) is not None


def test_a_claim_ends_the_lease(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 1)
    ledger.publish("w", "r", [])
    ledger.drop("w", "r", 0.0)
    assert ledger.claim("x", "r", 0) == [0]
    assert ledger.expire(1e9) == []
    assert ledger.claim("x", "r", 0) == [0]


def test_a_lease_is_renewed_while_it_runs(ledger: BlockLedger) -> None:
    ledger.renew("r", 0.0)  # never dropped: there is none
    ledger.renew("unknown", 0.0)
    ledger.assign("w", "r", 0, 1)
    ledger.renew("r", 0.0)
    assert ledger.expire(1e9) == []
    ledger.drop("w", "r", 0.0)
    ledger.renew("r", 8.0)
    assert ledger.expire(17.9) == []
    assert ledger.expire(18.0) == ["r"]
    ledger.renew("r", 18.0)
    assert ledger.expire(1e9) == []


def test_a_release_while_held_waits_for_the_holder(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 2)
    ledger.release("r")
    assert ledger.pool.free == 2
    assert ledger.claim("w", "r", 0) is None
    assert ledger.assign("w", "r", 1, 1) is None
    ledger.drop("w", "r", 0.0)
    assert (ledger.pool.free, ledger.requests) == (4, 0)
    ledger.release("r")
    ledger.drop("w", "r", 0.0)
    assert (ledger.pool.free, ledger.requests) == (4, 0)


def test_requests_die_with_their_gateway_alone(ledger: BlockLedger) -> None:
    ledger.open("s", "h")
    ledger.open("r", "h")  # it is g's already
    ledger.assign("w", "r", 0, 2)
    ledger.publish("w", "r", [])
    ledger.drop("w", "r", 0.0)
    ledger.gateway_gone("h")
    assert ledger.requests == 1
    assert ledger.claim("w", "r", 0) == [0, 1]
    ledger.drop("w", "r", 0.0)
    ledger.gateway_gone("g")
    assert (ledger.pool.free, ledger.requests) == (4, 0)


# -- blocks that outlive their request ------------------------------------------------------------


def test_published_blocks_are_found_by_who_begins_alike() -> None:
    ledger = BlockLedger(8)
    assert serve(ledger, "a", 3, "xy") == Blocks([0, 1, 2], 0)
    assert ledger.usage == KvUsage(used=0, cached=2, total=8, reused=0)
    assert serve(ledger, "b", 3, "xyy") == Blocks([0, 1, 2], 2)
    assert serve(ledger, "c", 2, "y").reused == 0
    assert serve(ledger, "d", 2, "xx").reused == 1
    assert ledger.usage.reused == 3


def test_requests_share_a_block_while_both_run() -> None:
    ledger = BlockLedger(4)
    for request in ("a", "b"):
        ledger.open(request, "g")
    assert ledger.assign("w", "a", 0, 2, keys("x")) == Blocks([0, 1], 0)
    ledger.publish("w", "a", keys("x"))
    assert ledger.assign("w", "b", 0, 2, keys("x")) == Blocks([0, 2], 1)
    assert ledger.usage == KvUsage(used=3, cached=0, total=4, reused=1)  # each once
    ledger.finish("w", "a")
    assert ledger.usage.used == 2  # the other one still reads it
    ledger.finish("w", "b")
    assert ledger.usage == KvUsage(used=0, cached=1, total=4, reused=1)


def test_two_that_compute_the_same_keep_their_own_blocks() -> None:
    ledger = BlockLedger(8)
    for request in ("a", "b"):
        ledger.open(request, "g")
        assert ledger.assign("w", request, 0, 2, keys("xy")) is not None
    ledger.publish("w", "a", keys("x"))
    ledger.publish("w", "b", keys("xy"))
    # What b wrote for "x" is its own; "y" behind it is for all, with a's "x" before it.
    ledger.finish("w", "a")
    assert ledger.usage.used == 3
    ledger.finish("w", "b")
    assert ledger.usage == KvUsage(used=0, cached=2, total=8, reused=0)
    ledger.open("c", "g")
    assert ledger.assign("w", "c", 0, 2, keys("xy")) == Blocks([0, 3], 2)


def test_what_was_used_longest_ago_makes_room_first() -> None:
    ledger = BlockLedger(4)
    serve(ledger, "a", 2, "xx")
    serve(ledger, "b", 2, "yy")
    serve(ledger, "a", 2, "xx")  # used again
    ledger.open("c", "g")
    assert ledger.assign("w", "c", 0, 1) is not None
    ledger.open("d", "g")
    # The end of b's prompt went before its beginning, and both before a's.
    got = ledger.assign("w", "d", 0, 2, keys("yy"))
    assert got is not None
    assert got.reused == 1
    assert ledger.usage.cached == 1


def test_a_prefix_is_not_forgotten_to_make_room_behind_it() -> None:
    ledger = BlockLedger(4)
    serve(ledger, "a", 3, "xxx")
    ledger.open("b", "g")
    assert ledger.assign("w", "b", 0, 4, keys("xxx")) == Blocks([0, 1, 2, 3], 3)


def test_who_cannot_have_the_rest_holds_no_prefix() -> None:
    ledger = BlockLedger(4)
    serve(ledger, "a", 2, "xx")
    for request in ("b", "c"):
        ledger.open(request, "g")
    assert ledger.assign("w", "b", 0, 2) is not None
    assert ledger.assign("w", "c", 0, 5, keys("xx")) is None
    assert ledger.usage == KvUsage(used=2, cached=2, total=4, reused=0)
    ledger.drop("w", "c", 0.0)  # it holds nothing
    assert ledger.assign("w", "c", 0, 2, keys("xx")) == Blocks([0, 1], 2)


def test_what_a_dead_worker_had_published_is_there_for_the_next(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 3, keys("xy"))
    ledger.publish("w", "r", keys("xy"))
    ledger.worker_gone("w", 0.0)
    assert ledger.expire(LEASE) == ["r"]
    assert ledger.assign("x", "r", 1, 4, keys("xyx")) == Blocks([0, 1, 2, 3], 2)


def test_a_finished_request_leaves_nothing_that_could_be_written_to(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 2, keys("x"))
    ledger.publish("w", "r", keys("xy"))
    ledger.finish("w", "r")
    # Its worker died before the last token was out. Whoever takes it up knows "x" alone, and may
    # not go on writing where "y" is.
    assert ledger.claim("x", "r", 1) is None
    assert ledger.assign("x", "r", 1, 2, keys("x")) == Blocks([0, 2], 1)


def test_nothing_is_found_after_a_reset() -> None:
    ledger = BlockLedger(4)
    serve(ledger, "a", 3, "xy")
    ledger.open("b", "g")
    assert ledger.assign("w", "b", 0, 1) is not None
    assert not ledger.pool.reset()
    ledger.finish("w", "b")
    assert ledger.pool.reset()
    assert ledger.usage == KvUsage(total=4)
    assert ledger.assign("w", "b", 0, 4, keys("xy")) == Blocks([0, 1, 2, 3], 0)


def test_only_the_holder_publishes(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, 1, keys("x"))
    ledger.publish("x", "r", keys("x"))
    ledger.publish("w", "unknown", keys("x"))
    ledger.finish("x", "r")
    ledger.finish("w", "unknown")
    assert ledger.usage.used == 1
    ledger.finish("w", "r")
    assert ledger.usage.cached == 0


@pytest.mark.parametrize("text", ["y", "yx", "xxxx"])
def test_keys_that_are_not_those_of_the_blocks_are_refused(text: str, ledger: BlockLedger) -> None:
    serve(ledger, "before", 2, "x")
    assert ledger.assign("w", "r", 0, 2, keys("x")) is not None
    with pytest.raises(ArenaError, match="not those of its KV blocks"):
        ledger.publish("w", "r", keys(text))
    ledger.open("s", "g")
    with pytest.raises(ArenaError, match="not those of its KV blocks"):
        ledger.assign("w", "s", 0, 0, keys("x"))


# -- blocks that are got ready -------------------------------------------------------------------


def test_what_was_brought_in_is_found_by_who_asks_then() -> None:
    ledger = BlockLedger(4)
    found = ledger.pool.reserve(3, keys("ab"))
    assert found is not None
    reserved, got = found
    assert got == Blocks([0, 1, 2], 0)
    assert ledger.usage == KvUsage(used=3, cached=0, total=4, reused=0)
    assert ledger.pool.fill(reserved, keys("ab")) == [("a", 0), ("ab", 1)]
    ledger.pool.give_back(reserved)
    ledger.pool.give_back(reserved)
    assert ledger.usage == KvUsage(used=0, cached=2, total=4, reused=0)
    ledger.open("r", "g")
    assert ledger.assign("w", "r", 0, 3, keys("abc")) == Blocks([0, 1, 2], 2)
    assert ledger.claim("x", "r", 1) is None  # what was brought in is not all of a request's KV


def test_what_is_forgotten_is_told() -> None:
    ledger = BlockLedger(3)
    serve(ledger, "r", 3, "ab")
    assert ledger.pool.kept == [("ab", 1), ("a", 0)]
    assert not ledger.pool.forgets(1)
    assert ledger.pool.forgets(2)
    found = ledger.pool.reserve(2, keys("x"))
    assert found is not None
    assert found[1] == Blocks([2, 1], 0, [("ab", 1)])
    ledger.open("s", "g")
    assert ledger.assign("w", "s", 0, 1) == Blocks([0], 0, [("a", 0)])


def test_nothing_is_reserved_where_not_all_of_it_is_free() -> None:
    ledger = BlockLedger(3)
    serve(ledger, "r", 2, "ab")
    ledger.open("s", "g")
    ledger.assign("w", "s", 0, 1)
    assert ledger.pool.reserve(3, keys("ab")) is None
    assert ledger.pool.kept == [("ab", 1), ("a", 0)]
    assert ledger.pool.reserve(2, keys("ab")) is not None


def test_two_that_bring_in_the_same_keep_one_of_it() -> None:
    ledger = BlockLedger(4)
    both = [ledger.pool.reserve(2, keys("ab")) for _ in range(2)]
    for found in both:
        assert found is not None
        ledger.pool.fill(found[0], keys("ab"))
        ledger.pool.give_back(found[0])
    assert ledger.usage == KvUsage(used=0, cached=2, total=4, reused=0)
    assert ledger.pool.free == 4


# -- any order of events --------------------------------------------------------------------------


@dataclass
class Known:
    """What can be known of a request from the answers alone."""

    gateway: str
    text: str = ""
    blocks: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    attempt: int = -1
    holder: str | None = None
    written: bool = False
    dropped: float | None = None
    released: bool = False

    def forget_kv(self) -> None:
        self.blocks, self.keys, self.written, self.dropped = [], [], False, None


@dataclass
class Kept:
    """A published block."""

    block: int
    used: int
    """When a request referred to it last, counted in events."""


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events; a naive model follows the answers and says what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(BLOCKS, LEASE)
        self.known: dict[str, Known] = {}
        self.reserved: list[tuple[Reserved, Known]] = []
        self.kept: dict[str, Kept] = {}
        self.now = 0.0
        self.events = 0
        self.reused = 0

    @property
    def owners(self) -> list[Known]:
        """Requests, and those that get blocks ready for one."""
        return [*self.known.values(), *(known for _, known in self.reserved)]

    def referring(self, key: str) -> int:
        return sum(key in known.keys for known in self.owners)

    def taken(self) -> set[int]:
        """Blocks that belong to a request, or can be read for one to come."""
        owned = {block for known in self.owners for block in known.blocks}
        return owned | {kept.block for kept in self.kept.values()}

    def touch(self, known: Known) -> None:
        self.events += 1
        for key in known.keys:
            self.kept[key].used = self.events

    def let_go_of_kv(self, known: Known) -> None:
        self.touch(known)
        known.forget_kv()

    def forget_if_over(self, request: str) -> None:
        known = self.known[request]
        if known.released and known.holder is None:
            self.let_go_of_kv(known)
            del self.known[request]

    def make_room(self, count: int) -> None:
        """Forgets what the rules say is forgotten, for so many fresh blocks."""
        while BLOCKS - len(self.taken()) < count:
            unused = [key for key in self.kept if not self.referring(key)]
            ends = [k for k in unused if not any(o != k and o.startswith(k) for o in self.kept)]
            # A key that is no other's beginning: the one used longest ago. Where two were used by
            # the same event they were of one request, so that only the longer is an end.
            del self.kept[min(ends, key=lambda key: self.kept[key].used)]

    @rule(request=REQUESTS, gateway=GATEWAYS)
    def open(self, request: str, gateway: str) -> None:
        self.ledger.open(request, gateway)
        self.known.setdefault(request, Known(gateway))

    @rule(request=REQUESTS)
    def release(self, request: str) -> None:
        self.ledger.release(request)
        if request in self.known:
            self.known[request].released = True
            self.forget_if_over(request)

    @rule(worker=WORKERS, request=REQUESTS, attempt=ATTEMPTS, text=TEXTS, more=st.integers(0, 3))
    def assign(self, worker: str, request: str, attempt: int, text: str, more: int) -> None:
        count = len(text) + more
        got = self.ledger.assign(worker, request, attempt, count, keys(text))
        known = self.known.get(request)
        if (
            known is None
            or known.released
            or known.holder not in (None, worker)
            or attempt < known.attempt
            or (known.holder == worker and attempt == known.attempt)
        ):
            assert got is None
            return
        self.let_go_of_kv(known)
        known.holder = None
        if self.gets(known, got, text, count):
            assert got is not None
            self.reused += got.reused
            known.attempt, known.holder = attempt, worker

    def gets(self, known: Known, got: Blocks | None, text: str, count: int) -> bool:
        """Holds what somebody who has no blocks was given against what is right."""
        found = [key for key in keys(text) if key in self.kept]
        assert found == keys(text)[: len(found)], "a block was forgotten before what continues it"
        known.keys = found
        self.touch(known)
        in_use = {block for other in self.owners for block in other.blocks}
        in_use |= {kept.block for key, kept in self.kept.items() if self.referring(key)}
        if count - len(found) > BLOCKS - len(in_use):
            assert got is None
            self.let_go_of_kv(known)
            return False
        assert got is not None
        before = dict(self.kept)
        self.make_room(count - len(found))
        gone = {(key, kept.block) for key, kept in before.items() if key not in self.kept}
        assert set(got.forgotten) == gone
        assert len(got.forgotten) == len(gone)
        assert got.reused == len(found)
        assert got.blocks[: got.reused] == [self.kept[key].block for key in found]
        fresh = got.blocks[got.reused :]
        assert len(got.blocks) == count
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & self.taken(), "memory that somebody reads or writes"
        known.text, known.blocks = text, list(got.blocks)
        return True

    @rule(text=TEXTS, more=st.integers(0, 3))
    def reserve(self, text: str, more: int) -> None:
        count, known = len(text) + more, Known("")
        forgets = self.ledger.pool.forgets(count - self.ledger.pool.found(keys(text)))
        found = self.ledger.pool.reserve(count, keys(text))
        reserved, got = (Reserved(), None) if found is None else found
        self.reserved.append((reserved, known))
        if self.gets(known, got, text, count):
            assert got is not None
            assert bool(got.forgotten) == forgets
        else:
            self.reserved.pop()

    @rule(which=st.integers(0, 3), read=st.integers(0, 5))
    def brought_in(self, which: int, read: int) -> None:
        """As much as there was has been read into what was reserved."""
        if which >= len(self.reserved):
            return
        reserved, known = self.reserved[which]
        wanted = keys(known.text)[: len(known.keys) + read]
        new = self.ledger.pool.fill(reserved, wanted)
        expected = []
        for place, key in list(enumerate(wanted))[len(known.keys) :]:
            if key not in self.kept:
                self.kept[key] = Kept(known.blocks[place], 0)
                expected.append((key, known.blocks[place]))
            known.keys.append(key)
        assert new == expected

    @rule(which=st.integers(0, 3))
    def give_back(self, which: int) -> None:
        if which < len(self.reserved):
            reserved, known = self.reserved.pop(which)
            self.events += 1
            for key in known.keys:
                self.kept[key].used = self.events
            self.ledger.pool.give_back(reserved)

    @rule(worker=WORKERS, request=REQUESTS, text=TEXTS, more=st.integers(0, 3), end=TEXTS)
    def serve(self, worker: str, request: str, text: str, more: int, end: str) -> None:
        """What mostly happens, which chance alone would seldom find: a request from end to end."""
        self.open(request, "g")
        self.assign(worker, request, self.known[request].attempt + 1, text, more)
        if self.known[request].holder == worker:
            self.publish(worker, request, end, 5)
            self.finish(worker, request)
        self.release(request)

    @rule(worker=WORKERS, request=REQUESTS, more=TEXTS, most=st.integers(0, 5))
    def publish(self, worker: str, request: str, more: str, most: int) -> None:
        known = self.known.get(request)
        text = ""
        if known is not None:
            text = (known.text + more)[: len(known.blocks)]
            if known.keys:  # what was published stays what it is
                text = known.keys[-1] + text[len(known.keys) :]
            text = text[:most]
        self.ledger.publish(worker, request, keys(text))
        if known is None or known.holder != worker:
            return
        known.written = True
        for place, key in enumerate(keys(text)):
            if place < len(known.keys):
                continue
            self.kept.setdefault(key, Kept(known.blocks[place], 0))
            known.keys.append(key)

    @rule(worker=WORKERS, request=REQUESTS, attempt=ATTEMPTS)
    def claim(self, worker: str, request: str, attempt: int) -> None:
        blocks = self.ledger.claim(worker, request, attempt)
        known = self.known.get(request)
        if blocks is None:
            assert (
                known is None
                or known.released
                or known.holder not in (None, worker)
                or attempt < known.attempt
                or not known.written
            )
            return
        assert known is not None
        assert not known.released
        assert known.holder in (None, worker)
        assert known.written
        assert blocks == known.blocks
        known.attempt, known.holder, known.dropped = attempt, worker, None

    def let_go(self, worker: str, request: str) -> None:
        known = self.known.get(request)
        if known is not None and known.holder == worker:
            known.holder, known.dropped = None, self.now
            self.forget_if_over(request)

    @rule(worker=WORKERS, request=REQUESTS)
    def drop(self, worker: str, request: str) -> None:
        self.ledger.drop(worker, request, self.now)
        self.let_go(worker, request)

    @rule(request=REQUESTS, more=TEXTS)
    def hand_over(self, request: str, more: str) -> None:
        known = self.known.get(request)
        if known is not None and known.holder is not None:
            worker = known.holder
            self.publish(worker, request, more, 5)
            self.drop(worker, request)

    @rule(worker=WORKERS, request=REQUESTS)
    def finish(self, worker: str, request: str) -> None:
        self.ledger.finish(worker, request)
        known = self.known.get(request)
        if known is not None and known.holder == worker:
            known.holder = None
            self.let_go_of_kv(known)
            self.forget_if_over(request)

    @rule(request=REQUESTS)
    def renew(self, request: str) -> None:
        self.ledger.renew(request, self.now)
        known = self.known.get(request)
        if known is not None and known.dropped is not None:
            known.dropped = self.now

    @rule(worker=WORKERS)
    def worker_gone(self, worker: str) -> None:
        self.ledger.worker_gone(worker, self.now)
        for request in list(self.known):
            self.let_go(worker, request)

    @rule(gateway=GATEWAYS)
    def gateway_gone(self, gateway: str) -> None:
        self.ledger.gateway_gone(gateway)
        for request, known in list(self.known.items()):
            if known.gateway == gateway:
                known.released = True
                self.forget_if_over(request)

    @rule()
    def reset(self) -> None:
        used = self.ledger.usage.used
        assert self.ledger.pool.reset() == (used == 0)
        if not used:
            self.kept.clear()

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE / 2, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        expired = self.ledger.expire(self.now)
        due = [
            request
            for request, known in self.known.items()
            if known.dropped is not None and self.now - known.dropped >= LEASE
        ]
        assert expired == due
        for request in due:
            assert self.known[request].holder is None
            self.let_go_of_kv(self.known[request])

    @invariant()
    def every_block_is_counted_once(self) -> None:
        unused = [key for key in self.kept if not self.referring(key)]
        used = len(self.taken()) - len(unused)
        assert self.ledger.usage == KvUsage(used, len(unused), BLOCKS, self.reused)
        assert self.ledger.pool.free == BLOCKS - used
        assert self.ledger.requests == len(self.known)

    @invariant()
    def nobody_writes_what_others_read(self) -> None:
        readable = {kept.block for kept in self.kept.values()}
        assert len(readable) == len(self.kept)
        for known in self.owners:
            own = known.blocks[len(known.keys) :]
            assert not set(own) & readable
            others = [other for other in self.owners if other is not known]
            assert not set(own) & {block for other in others for block in other.blocks}

    def teardown(self) -> None:
        for worker in ("prefill", "decode", "third"):
            self.ledger.worker_gone(worker, self.now)
        for gateway in ("g", "h"):
            self.ledger.gateway_gone(gateway)
        for reserved, _ in self.reserved:
            self.ledger.pool.give_back(reserved)
        assert self.ledger.pool.free == BLOCKS
        self.ledger.open("heir", "g")
        got = self.ledger.assign("heir", "heir", 0, BLOCKS)
        assert got is not None
        assert sorted(got.blocks) == list(range(BLOCKS))


LedgerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLedgerMachine = LedgerMachine.TestCase


# -- who watches -----------------------------------------------------------------------------------


def test_nobody_watches_and_nothing_is_kept(ledger: BlockLedger) -> None:
    serve(ledger, "s", 2, "xy")
    assert ledger.pool.take_changes() == {}


def test_changes_are_what_is_published_now_and_was_not() -> None:
    ledger = BlockLedger(4, lease_s=LEASE)
    serve(ledger, "a", 2, "xx")
    ledger.pool.watch()
    assert ledger.pool.take_changes() == {"x": True, "xx": True}
    serve(ledger, "b", 2, "xx")
    assert ledger.pool.take_changes() == {}
    serve(ledger, "c", 3, "yyy")
    changes = ledger.pool.take_changes()
    assert changes == {"xx": False, "y": True, "yy": True, "yyy": True}
    assert ledger.pool.found(keys("xx")) == 1
    assert ledger.pool.found(keys("yyy")) == 3
    serve(ledger, "d", 4, "xyxy")
    assert {key for key, there in ledger.pool.take_changes().items() if there} == {
        "xy",
        "xyx",
        "xyxy",
    }
    assert ledger.pool.reset()
    assert set(ledger.pool.take_changes().values()) == {False}
