"""Holding KV blocks for vLLM's requests, with a real memory service."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
from coldframe.runtime.integrations.vllm.kv_holds import Holds
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from tests.runtime import helpers
from tests.runtime.integrations.vllm.prefills import Native


@pytest.fixture
def native(demo_model: Callable[..., Path], no_leaks: Path) -> Iterator[Native]:
    made = Native(demo_model(), no_leaks, blocks=16, lease_s=1.0)
    yield made
    made.close()


@pytest.fixture
def client(native: Native) -> Iterator[MemoryClient]:
    made = MemoryClient(Channel.connect(native.path), "vllm")
    made.wait_arenas()
    yield made
    made.close()


@pytest.fixture
def holds(client: MemoryClient) -> Iterator[Holds]:
    made = Holds(lambda: client, KvTally())
    yield made
    made.close()


def test_a_claim_outlives_the_lease(native: Native, holds: Holds) -> None:
    handoff = native.prefill("r", helpers.prompt_of(40))
    hold = holds.claim("r", 0, 40, "cpu")
    assert hold.wait(5)
    assert hold.blocks == list(handoff.blocks)
    time.sleep(2.5)  # the lease, and the tick by which it ends
    assert native.used() == len(handoff.blocks)
    holds.let_go(hold)
    holds.let_go(hold)
    native.wait_used(0)


def test_what_is_not_there_is_said(native: Native, holds: Holds) -> None:
    hold = holds.claim("nobody", 0, 40, "cpu")
    assert hold.wait(5)
    assert (hold.blocks, hold.why) == (None, "the KV is not there any more")
    holds.let_go(hold)


def test_letting_go_never_overtakes_the_claim(native: Native, holds: Holds) -> None:
    native.prefill("r", helpers.prompt_of(40))
    holds.let_go(holds.claim("r", 0, 40, "cpu"))
    native.wait_used(0)


def test_attempts_share_blocks_to_the_last(native: Native, holds: Holds) -> None:
    handoff = native.prefill("r", helpers.prompt_of(40))
    first, second = holds.claim("r", 0, 40, "cpu"), holds.claim("r", 1, 40, "cpu")
    assert second.wait(5)
    assert first.blocks == second.blocks == list(handoff.blocks)
    holds.let_go(first)
    third = holds.claim("r", 2, 40, "cpu")
    assert third.wait(5)
    assert third.blocks == list(handoff.blocks)
    holds.let_go(second)
    holds.let_go(third)
    native.wait_used(0)


def test_a_dead_service_is_a_reason_like_others(native: Native, holds: Holds) -> None:
    native.prefill("r", helpers.prompt_of(40))
    native.kill()
    hold = holds.claim("r", 0, 40, "cpu")
    assert hold.wait(5)
    assert hold.blocks is None
    assert "gone" in str(hold.why)
    holds.let_go(hold)
    assert not holds.hand_over(hold, 5)


def test_blocks_are_waited_for(native: Native, holds: Holds) -> None:
    native.prefill("large", helpers.prompt_of(400), most=1 + 32 * 3)  # 15 of 16
    late = holds.assign("late", 0, 64, opens=True)
    assert not late.wait(0.2)
    native.release("large")
    assert late.wait(5)
    assert late.blocks is not None
    assert holds.hand_over(late, 5)
    assert native.client.claim("late", 1) == late.blocks
    native.client.finish("late")
    native.wait_used(0)


def test_who_waits_may_give_up(native: Native, holds: Holds) -> None:
    native.prefill("large", helpers.prompt_of(400), most=1 + 32 * 3)
    late = holds.assign("late", 0, 64, opens=True)
    holds.let_go(late)
    assert late.wait(5)
    assert (late.blocks, late.why) == (None, "it is over")
    native.release("large")
    native.wait_used(0)


def test_what_nobody_comes_for_is_freed(native: Native, holds: Holds) -> None:
    hold = holds.assign("r", 0, 64, opens=True)
    assert hold.wait(5)
    assert holds.hand_over(hold, 5)
    assert native.used() == 2
    native.wait_used(0)  # by the lease


def test_what_nobody_has_thought_of_ends_nothing(
    native: Native, holds: Holds, client: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.prefill("r", helpers.prompt_of(40))

    def broken(*_: object) -> None:
        raise ValueError("an answer without sense")

    with monkeypatch.context() as patch:
        for name in ("claim", "open", "assign", "finish", "publish"):
            patch.setattr(client, name, broken)
        asked = [
            holds.claim("r", 0, 40, "cpu"),
            holds.assign("new", 0, 40, opens=True),
            holds.assign("newer", 0, 40, opens=False),
        ]
        for hold in asked:
            assert hold.wait(5)
            assert hold.blocks is None
            assert "an answer without sense" in str(hold.why)
    hold = holds.claim("r", 1, 40, "cpu")
    assert hold.wait(5)
    with monkeypatch.context() as patch:
        patch.setattr(client, "publish", broken)
        assert not holds.hand_over(hold, 5)
    assert holds.claim("nobody", 0, 40, "cpu").wait(5)  # the thread goes on


def test_the_thread_has_the_priority_of_who_asks(client: MemoryClient) -> None:
    made: list[Holds] = []

    def start() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        made.append(Holds(lambda: client, KvTally()))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (holds,) = made
    assert holds.claim("nobody", 0, 40, "cpu").wait(5)
    (found,) = [each for each in threading.enumerate() if each.name == "kv-holds"]
    assert found.native_id is not None
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, found.native_id) == mine
    holds.close()
