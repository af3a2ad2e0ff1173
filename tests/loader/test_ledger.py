from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coldframe.loader.errors import ArenaError
from coldframe.loader.ledger import BlockLedger

BLOCKS = 8
LEASE = 10.0
WORKERS = st.sampled_from(["prefill", "decode", "third"])
REQUESTS = st.sampled_from(["a", "b", "c"])
GATEWAYS = st.sampled_from(["g", "h"])
ATTEMPTS = st.integers(0, 2)


@pytest.fixture
def ledger() -> BlockLedger:
    ledger = BlockLedger(4, lease_s=LEASE)
    ledger.open("r", "g")
    return ledger


def test_blocks_are_granted_all_or_none(ledger: BlockLedger) -> None:
    assert ledger.grant("w", 5) == []
    assert ledger.grant("w", 3) == [0, 1, 2]
    assert ledger.grant("w", 2) == []
    assert ledger.free == 1
    ledger.give_back("w", [1])
    assert sorted(ledger.grant("x", 2)) == [1, 3]


def test_blocks_are_handed_over_in_their_order(ledger: BlockLedger) -> None:
    assert ledger.claim("decode", "r", 0) is None  # nothing there yet
    ledger.grant("prefill", 4)
    assert ledger.assign("prefill", "r", 0, [2, 0])
    assert ledger.assign("prefill", "r", 0, [3])
    assert ledger.claim("decode", "r", 0) is None
    assert ledger.claim("prefill", "r", 0) == [2, 0, 3]
    ledger.drop("decode", "r", 0.0)  # not its to drop
    assert ledger.claim("decode", "r", 0) is None
    ledger.drop("prefill", "r", 0.0)
    assert ledger.claim("decode", "r", 0) == [2, 0, 3]
    assert not ledger.assign("prefill", "r", 0, [1])
    ledger.give_back("prefill", [1])  # still in its pocket


def test_what_was_claimed_is_not_the_ledgers_own_list(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, ledger.grant("w", 1))
    claimed = ledger.claim("w", "r", 0)
    assert claimed is not None
    claimed.append(99)
    assert ledger.claim("w", "r", 0) == [0]


def test_a_new_attempt_replaces_what_the_old_one_left(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, ledger.grant("w", 3))
    ledger.worker_gone("w", 0.0)
    assert ledger.free == 1
    assert ledger.assign("x", "r", 1, ledger.grant("x", 1))
    assert ledger.free == 3
    assert ledger.claim("x", "r", 1) == [3]


def test_an_old_attempt_comes_too_late(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 1, ledger.grant("w", 1))
    ledger.drop("w", "r", 0.0)
    assert ledger.claim("x", "r", 0) is None
    blocks = ledger.grant("x", 1)
    assert not ledger.assign("x", "r", 0, blocks)
    ledger.give_back("x", blocks)
    # A claim for a newer attempt takes what is there, and the older one is out.
    assert ledger.claim("x", "r", 2) == [0]
    ledger.drop("x", "r", 0.0)
    assert ledger.claim("w", "r", 1) is None


def test_a_lease_begins_when_the_holder_lets_go(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, ledger.grant("w", 2))
    assert ledger.expire(1e9) == []  # held
    ledger.drop("w", "r", 100.0)
    assert ledger.expire(100.0 + LEASE - 0.001) == []
    assert ledger.expire(100.0 + LEASE) == ["r"]
    assert ledger.free == 4
    assert ledger.expire(1e9) == []
    assert ledger.claim("x", "r", 0) is None
    assert ledger.requests == 1  # it lives on, without KV
    assert ledger.assign("x", "r", 0, ledger.grant("x", 1))


def test_a_claim_ends_the_lease(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, ledger.grant("w", 1))
    ledger.drop("w", "r", 0.0)
    assert ledger.claim("x", "r", 0) == [0]
    assert ledger.expire(1e9) == []
    assert ledger.claim("x", "r", 0) == [0]


def test_a_lease_is_renewed_while_it_runs(ledger: BlockLedger) -> None:
    ledger.renew("r", 0.0)  # never dropped: there is none
    ledger.renew("unknown", 0.0)
    ledger.assign("w", "r", 0, ledger.grant("w", 1))
    ledger.renew("r", 0.0)
    assert ledger.expire(1e9) == []
    ledger.drop("w", "r", 0.0)
    ledger.renew("r", 8.0)
    assert ledger.expire(17.9) == []
    assert ledger.expire(18.0) == ["r"]
    ledger.renew("r", 18.0)
    assert ledger.expire(1e9) == []


def test_a_release_while_held_waits_for_the_holder(ledger: BlockLedger) -> None:
    ledger.assign("w", "r", 0, ledger.grant("w", 2))
    ledger.release("r")
    assert ledger.free == 2
    assert ledger.claim("w", "r", 0) is None
    assert not ledger.assign("w", "r", 1, [])
    ledger.drop("w", "r", 0.0)
    assert (ledger.free, ledger.requests) == (4, 0)
    ledger.release("r")
    ledger.drop("w", "r", 0.0)
    assert (ledger.free, ledger.requests) == (4, 0)


def test_a_dead_workers_pocket_is_free_and_its_requests_wait(ledger: BlockLedger) -> None:
    ledger.grant("w", 3)
    ledger.assign("w", "r", 0, [1])
    ledger.worker_gone("w", 50.0)
    assert ledger.free == 3
    assert ledger.claim("x", "r", 0) == [1]
    ledger.worker_gone("x", 60.0)
    assert ledger.expire(69.9) == []
    assert ledger.expire(70.0) == ["r"]


def test_requests_die_with_their_gateway_alone(ledger: BlockLedger) -> None:
    ledger.open("s", "h")
    ledger.open("r", "h")  # it is g's already
    ledger.assign("w", "r", 0, ledger.grant("w", 2))
    ledger.drop("w", "r", 0.0)
    ledger.gateway_gone("h")
    assert ledger.requests == 1
    assert ledger.claim("w", "r", 0) == [0, 1]
    ledger.drop("w", "r", 0.0)
    ledger.gateway_gone("g")
    assert (ledger.free, ledger.requests) == (4, 0)


@pytest.mark.parametrize("blocks", [[0, 0], [2], [7], [-1], [0, 3]])
def test_nobody_disposes_of_what_is_not_in_the_pocket(
    blocks: list[int], ledger: BlockLedger
) -> None:
    ledger.grant("w", 2)
    ledger.grant("x", 1)
    with pytest.raises(ArenaError, match="not granted"):
        ledger.give_back("w", blocks)
    with pytest.raises(ArenaError, match="not granted"):
        ledger.assign("w", "r", 0, blocks)
    assert ledger.free == 1
    assert ledger.claim("w", "r", 0) is None
    ledger.give_back("w", [0, 1])


@dataclass
class Known:
    """What can be known of a request from the answers alone."""

    gateway: str
    blocks: list[int] = field(default_factory=list)
    attempt: int = -1
    holder: str | None = None
    dropped: float | None = None
    released: bool = False


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events; a naive model follows the answers and says what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(BLOCKS, LEASE)
        self.pockets: dict[str, list[int]] = {}
        self.known: dict[str, Known] = {}
        self.now = 0.0

    def taken(self) -> list[int]:
        """Blocks in a pocket or of a request, with repetitions if there were any."""
        pockets = [block for pocket in self.pockets.values() for block in pocket]
        return pockets + [block for known in self.known.values() for block in known.blocks]

    def forget_if_over(self, request: str) -> None:
        known = self.known[request]
        if known.released and known.holder is None:
            del self.known[request]

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

    @rule(worker=WORKERS, count=st.integers(0, BLOCKS))
    def grant(self, worker: str, count: int) -> None:
        free = BLOCKS - len(self.taken())
        blocks = self.ledger.grant(worker, count)
        assert len(blocks) == (count if count <= free else 0)
        assert not set(blocks) & set(self.taken())
        self.pockets.setdefault(worker, []).extend(blocks)

    @rule(worker=WORKERS, data=st.data())
    def give_back(self, worker: str, data: st.DataObject) -> None:
        pocket = self.pockets.get(worker, [])
        some = data.draw(st.sets(st.sampled_from(pocket))) if pocket else set()
        self.ledger.give_back(worker, sorted(some))
        self.pockets[worker] = [block for block in pocket if block not in some]

    @rule(worker=WORKERS, request=REQUESTS, attempt=ATTEMPTS, data=st.data())
    def assign(self, worker: str, request: str, attempt: int, data: st.DataObject) -> None:
        pocket = self.pockets.get(worker, [])
        some = data.draw(st.lists(st.sampled_from(pocket), unique=True)) if pocket else []
        taken = self.ledger.assign(worker, request, attempt, some)
        known = self.known.get(request)
        assert taken == (
            known is not None
            and not known.released
            and known.holder in (None, worker)
            and attempt >= known.attempt
        )
        if taken:
            assert known is not None
            self.pockets[worker] = [block for block in pocket if block not in some]
            kept = known.blocks if attempt == known.attempt else []
            known.blocks = kept + some
            known.attempt, known.holder, known.dropped = attempt, worker, None

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
                or not known.blocks
            )
            return
        assert known is not None
        assert not known.released
        assert known.holder in (None, worker)
        assert blocks == known.blocks != []
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

    @rule(request=REQUESTS)
    def renew(self, request: str) -> None:
        self.ledger.renew(request, self.now)
        known = self.known.get(request)
        if known is not None and known.dropped is not None:
            known.dropped = self.now

    @rule(worker=WORKERS)
    def worker_gone(self, worker: str) -> None:
        self.ledger.worker_gone(worker, self.now)
        self.pockets.pop(worker, None)
        for request in list(self.known):
            self.let_go(worker, request)

    @rule(gateway=GATEWAYS)
    def gateway_gone(self, gateway: str) -> None:
        self.ledger.gateway_gone(gateway)
        for request, known in list(self.known.items()):
            if known.gateway == gateway:
                known.released = True
                self.forget_if_over(request)

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE / 2, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        expired = self.ledger.expire(self.now)
        due = [
            request
            for request, known in self.known.items()
            if known.dropped is not None and self.now - known.dropped >= LEASE
        ]
        assert sorted(expired) == sorted(due)
        for request in due:
            assert self.known[request].holder is None
            self.known[request].blocks, self.known[request].dropped = [], None

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        taken = self.taken()
        assert len(taken) == len(set(taken))
        assert self.ledger.free == BLOCKS - len(taken)
        assert self.ledger.requests == len(self.known)

    def teardown(self) -> None:
        for worker in ("prefill", "decode", "third"):
            self.ledger.worker_gone(worker, self.now)
        for gateway in ("g", "h"):
            self.ledger.gateway_gone(gateway)
        assert sorted(self.ledger.grant("heir", BLOCKS)) == list(range(BLOCKS))


LedgerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLedgerMachine = LedgerMachine.TestCase
