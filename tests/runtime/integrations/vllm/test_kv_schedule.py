"""The connector's two sides beside a real memory service, without vLLM between them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
from coldframe.runtime.integrations.vllm import fingerprint
from coldframe.runtime.integrations.vllm.kv_copier import Layer
from coldframe.runtime.integrations.vllm.kv_pages import KvPages
from coldframe.runtime.integrations.vllm.kv_schedule import KvSchedule
from coldframe.runtime.integrations.vllm.kv_step import Load, Report, Save, Step
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.kv_worker import KvWorker
from coldframe.runtime.integrations.vllm.transfer import consume, produce, prompt_of, read_handed
from tests.runtime import helpers
from tests.runtime.integrations.vllm.prefills import Native

BLOCK = 16


@pytest.fixture
def native(demo_model: Callable[..., Path], no_leaks: Path) -> Iterator[Native]:
    made = Native(demo_model(), no_leaks, blocks=32)
    yield made
    made.close()


@pytest.fixture
def schedule(native: Native) -> Iterator[KvSchedule]:
    client = MemoryClient(Channel.connect(native.path), "vllm")
    client.wait_arenas()
    mine = fingerprint.native(native.spec, native.plan.fingerprint, native.config)
    made = KvSchedule(
        *(lambda: client, KvTally(), lambda: mine),
        unfit=None,
        ranks=1,
        layered=True,
        recompute=True,
        block_tokens=BLOCK,
    )
    yield made
    made.close()
    client.close()


def request(name: str, prompt: list[int], params: dict) -> SimpleNamespace:
    """What of vLLM's request is looked at."""
    return SimpleNamespace(
        request_id=name,
        prompt_token_ids=prompt,
        num_prompt_tokens=len(prompt),
        num_tokens=len(prompt),
        num_computed_tokens=0,
        output_token_ids=[],
        kv_transfer_params=params,
    )


def taken_over(native: Native, name: str) -> SimpleNamespace:
    handoff = native.prefill(name, helpers.prompt_of(40))
    return request(name, prompt_of(handoff, "fast"), consume(handoff, "fast"))


def test_claims_without_an_answer_hold_nobody_up(native: Native, schedule: KvSchedule) -> None:
    asked = [taken_over(native, f"r{index}") for index in range(8)]
    memory = native.launch.memories[0].child.pid
    os.kill(memory, signal.SIGSTOP)
    try:
        for each in asked:
            schedule.came(each)
        schedule.plan({"who decodes": 1})
        began = time.monotonic()
        for _ in range(10):
            assert [schedule.matched(each, 0) for each in asked] == [(None, False)] * 8
            schedule.plan({"who decodes": 1})
        assert time.monotonic() - began < 0.5
        # With nothing else to do they are waited for, once for all.
        schedule.plan({})
        began = time.monotonic()
        assert [schedule.matched(each, 0) for each in asked] == [(None, False)] * 8
        assert 0.04 < time.monotonic() - began < 0.3
    finally:
        os.kill(memory, signal.SIGCONT)
    deadline = time.monotonic() + 10
    while None in [schedule.matched(each, 0)[0] for each in asked]:
        assert time.monotonic() < deadline
        schedule.plan({"who decodes": 1})
    assert [schedule.matched(each, 0) for each in asked] == [(40, False)] * 8


def test_kv_of_other_tokens_is_left_to_whom_it_is_of(native: Native, schedule: KvSchedule) -> None:
    theirs = native.prefill("theirs", helpers.prompt_of(40))
    params = consume(theirs, "fast")
    schedule.came(request("mine", helpers.prompt_of(41, seed=9), params))
    schedule.came(request("none", [], params))
    params["coldframe"]["kv_tokens"] = -1
    schedule.came(request("less", helpers.prompt_of(41, seed=9), params))
    params["coldframe"] |= {"kv_tokens": 3, "model": "another"}  # a mismatch of both kinds
    schedule.came(request("both", helpers.prompt_of(41, seed=9), params))
    # Behind all that its thread was to do:
    last = schedule._holds.claim("nobody", 0, 40, "cpu")
    assert last.wait(5)
    assert native.used() == len(theirs.blocks)
    assert native.client.claim("theirs", 1) == list(theirs.blocks)
    native.client.finish("theirs")


def test_tokens_that_vllm_has_no_kv_of_are_not_handed_on(
    native: Native, schedule: KvSchedule
) -> None:
    prompt = helpers.prompt_of(64)
    asked = request("r", prompt, produce(native.job("r", prompt), opens=True))
    schedule.came(asked)
    table = [-1, -1, 5, 6]
    schedule.bind(lambda _: table, lambda _: None)
    asked.num_computed_tokens = 32  # found in the prefix cache, but for the window's
    assert schedule.plan({"r": 32}).saves == []
    outcome = read_handed(schedule.over(asked, whole=True))
    assert outcome is not None
    assert (outcome.handoff, outcome.why) == (None, "vLLM keeps no KV of some of its tokens")
    native.wait_used(0)
    # What is behind is no matter.
    asked = request("s", prompt, produce(native.job("s", prompt), opens=True))
    schedule.came(asked)
    table[:] = [3, 4, 5, 6, -1]
    (save,) = schedule.plan({"s": 64}).saves
    assert (save.start, save.end) == (0, 64)
    schedule.reported(Report(unsaved={"s": "the copy broke"}, saved=schedule_count("s")))
    outcome = read_handed(schedule.over(asked, whole=True))
    assert outcome is not None
    assert outcome.why == "the copy broke"
    native.wait_used(0)


def schedule_count(name: str):
    report = Report()
    report.saved[name] += 1
    return report.saved


def worker_of(pages: Callable[[], KvPages]) -> KvWorker:
    def write(k, v, cache, slots) -> None:
        cache[slots // BLOCK, :, slots % BLOCK, :8] = k
        cache[slots // BLOCK, :, slots % BLOCK, 8:] = v

    layer = Layer("layer", 0, torch.zeros((4, 2, BLOCK, 16)), write)
    return KvWorker(pages, [layer], slice(0, 2), 8, torch.float32, BLOCK, KvTally())


def broken() -> KvPages:
    raise RuntimeError("nobody has thought of this")


def test_a_copy_that_cannot_be_made_is_a_requests_own_affair() -> None:
    worker = worker_of(broken)
    try:
        worker.end_step(Step(saves=[Save("r", "r", (0,), 0, 20, (0, 1), BLOCK)]))
        report = worker.report()
        assert report.saved == {"r": 1}
        assert "nobody has thought of this" in report.unsaved["r"]
    finally:
        worker.close()


def test_copies_have_the_priority_of_who_asks_for_them() -> None:
    """And not that of the thread that has made the engine."""
    made: list[KvWorker] = []

    def start() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        made.append(worker_of(broken))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (worker,) = made
    try:
        assert "kv-copier" not in {each.name for each in threading.enumerate()}
        worker.start(Step(loads=[Load("r", "r", (0,), 0, 20, (0, 1), BLOCK)]))
        (copier,) = [each for each in threading.enumerate() if each.name == "kv-copier"]
        assert copier.native_id is not None
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert os.getpriority(os.PRIO_PROCESS, copier.native_id) == mine
    finally:
        worker.close()
