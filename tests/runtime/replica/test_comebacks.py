"""What becomes of vLLM engines that die or do not come up, as the workforce has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.timeline import now
from coldframe.runtime.replica.bridge import AGAIN_S
from coldframe.runtime.replica.comebacks import Comebacks
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.workforce import Workforce


def worker(role: str = "vllm", *, up: bool = False) -> WorkerProcess:
    found = WorkerProcess(f"{role}-0", role, cast(Any, None), cast(Any, None))
    found.up = up
    return found


class Hall:
    def __init__(self) -> None:
        self.now = 50.0
        self.started: list[str] = []
        self.error: ColdframeError | None = None
        self.comebacks = Comebacks(self.start, wanted=True, clock=lambda: self.now)

    def start(self, role: str) -> None:
        if self.error is not None:
            raise self.error
        self.started.append(role)

    def seconds(self, count: float) -> None:
        self.now += count
        assert self.comebacks.tick() is self.error


def test_alone_it_is_tried_ever_later_and_not_for_ever() -> None:
    hall = Hall()
    for wait in (AGAIN_S, 2 * AGAIN_S):
        assert hall.comebacks.died(worker(), "no kernel")
        before = len(hall.started)
        hall.seconds(wait - 1)
        assert len(hall.started) == before
        hall.seconds(1)
        hall.seconds(100)
        assert len(hall.started) == before + 1
    with pytest.raises(ReplicaError, match="no kernel"):
        hall.comebacks.died(worker(), "no kernel")


def test_one_that_was_up_is_replaced_like_any_worker() -> None:
    hall = Hall()
    for _ in range(5):
        assert hall.comebacks.died(worker(), "once")
        assert not hall.comebacks.died(worker(up=True), "it came up")
    assert not hall.comebacks.died(worker("prefill"), "another role")
    assert not Comebacks(hall.start, wanted=False).died(worker(), "beside native workers")


def test_that_it_cannot_be_started_is_told() -> None:
    hall = Hall()
    hall.comebacks.died(worker(), "once")
    hall.error = PlatformError("no process is left")
    hall.seconds(AGAIN_S)


class House:
    """What a workforce does for its engines, told by what it calls."""

    def __init__(self, *, bridged: bool = False, error: ColdframeError | None = None) -> None:
        self.failed: list[ColdframeError] = []
        self.gone: list[str] = []
        self.error = error
        self.bridged = bridged

    def died(self, worker: WorkerProcess, why: str) -> bool:
        if self.error is not None:
            raise self.error
        return self.bridged

    def worker_gone(self, name: str, why: str) -> None:
        self.gone.append(name)

    def bury(self, dead: WorkerProcess) -> bool:
        force = SimpleNamespace(
            bridge=self,
            _comebacks=Comebacks(cast(Any, None), wanted=not self.bridged),
            _owner=SimpleNamespace(fail=self.failed.append),
            _router=self,
        )
        return Workforce._bury_engine(cast(Workforce, force), dead, "killed")


def test_a_dead_engines_requests_are_the_routers_in_any_case() -> None:
    for house in (House(bridged=True), House()):
        assert house.bury(worker())
        assert (house.gone, house.failed) == (["vllm-0"], [])
    nobody = House(bridged=True, error=PlatformError("no process is left"))
    assert nobody.bury(worker())
    assert (nobody.gone, nobody.failed) == (["vllm-0"], [nobody.error])
    assert not House().bury(worker(up=True))


def test_native_workers_go_where_vllm_serves_all() -> None:
    removed: list[str] = []
    left_to: list[str] = []
    forgotten: list[str] = []
    workers = {role: worker(role) for role in ("prefill", "decode", "vllm")}
    force = cast(
        Any,
        SimpleNamespace(
            workers=workers,
            _launch=SimpleNamespace(later=["decode", "vllm"]),
            _staffing=SimpleNamespace(forget=forgotten.append),
            _router=SimpleNamespace(leave_all_to=left_to.append),
            _remove=lambda worker, why: removed.append(worker.role),
        ),
    )
    force._end_native = lambda found: Workforce._end_native(force, found)
    Workforce.leave_all_to_vllm(force)
    assert removed == ["prefill", "decode"]
    assert force._launch.later == ["vllm"]
    assert (left_to, forgotten) == (["vllm"], ["prefill"])


def test_vllm_may_take_longer_to_start_than_others() -> None:
    buried: list[str] = []

    def quiet(*_: object, **__: object) -> None: ...

    workers = {role: worker(role) for role in ("decode", "vllm")}
    begun = now() - 400 * 10**9
    for found in workers.values():
        found.child = cast(Any, SimpleNamespace(spawned_ns=begun, poll=quiet))
    force = cast(
        Any,
        SimpleNamespace(
            workers=workers,
            _all_clones=list,
            _thaws=SimpleNamespace(tick=quiet),
            _launch=SimpleNamespace(later=[]),
            _staffing=SimpleNamespace(tick=quiet),
            _comebacks=SimpleNamespace(tick=quiet),
            bridge=SimpleNamespace(tick=quiet),
            connect_remotes=quiet,
            _owner=SimpleNamespace(calm=True),
            _bury=lambda worker, why: buried.append(worker.role),
        ),
    )
    Workforce.tick(force, begun)
    assert buried == ["decode"]
    for found in workers.values():
        found.child = cast(Any, SimpleNamespace(spawned_ns=begun - 600 * 10**9, poll=quiet))
    Workforce.tick(force, begun - 600 * 10**9)
    assert buried == ["decode", "decode", "vllm"]
