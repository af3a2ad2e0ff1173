"""What a start's log takes, and what it tells of who decodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from coldframe.loader.timeline import Recorder, Span, now
from coldframe.runtime.endpoint import startlog
from coldframe.runtime.endpoint.startlog import StartLog
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions


def replica(vllm: VllmOptions | None) -> Any:
    """What a log looks at of a replica that is loaded and has answered."""
    return SimpleNamespace(
        answered=True,
        loaded=True,
        awaits_engine=vllm is not None,
        bridge=SimpleNamespace(decodes=False, why=None),
        options=SimpleNamespace(vllm=vllm),
        facts={},
        spans=[],
    )


def told(engine: str, why: str | None = None) -> dict[str, str | None]:
    """Who decodes, before any engine has come up."""
    return {"engine": engine, "why": why, "tier": None, "no_clone": None}


def names(log: StartLog) -> list[str]:
    return [span.name for span in log.timeline().spans]


def test_while_an_engine_starts_requests_are_not_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder("front")
    log, there = StartLog(now(), recorder), replica(VllmOptions())
    there.spans.append(Span("prefill[0]", "prefill-0", 1, 2))
    assert not log.step(cast(Replica, there))
    assert names(log) == ["prefill[0]"]
    monkeypatch.setattr(startlog, "_SPANS_NS", -1)
    log.step(cast(Replica, there))
    assert log.open
    for _ in range(100):
        there.spans += [Span("prefill[1]", "prefill-0", 3, 4), Span("decode", "decode-1", 4, 5)]
        log.step(cast(Replica, there))
        assert there.spans == []
    recorder.add("process_spawn", 3, 4, note="vllm-2")
    recorder.add("process_spawn", 3, 4, note="decode-3")
    there.spans.append(Span("vllm_config", "vllm-2", 5, 6))
    log.step(cast(Replica, there))
    recorder.add("takeover", 7)
    there.bridge.decodes, there.awaits_engine = True, False
    assert log.step(cast(Replica, there))
    assert not log.open
    assert names(log) == ["prefill[0]", "process_spawn", "vllm_config", "takeover"]


def test_an_engine_that_has_failed_is_followed_until_one_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startlog, "_SPANS_NS", -1)
    recorder = Recorder("front")
    log, there = StartLog(now(), recorder), replica(VllmOptions())
    log.step(cast(Replica, there))
    for number in range(1, 51):
        recorder.add("process_spawn", number, number, note=f"vllm-{number}")
        recorder.add("vllm_failed", number, number, note=f"try {number}")
        log.step(cast(Replica, there))
        assert log.open
    # It may be tried for days: only the latest tries are told.
    assert names(log) == ["process_spawn", "vllm_failed"] * 3
    assert log.timeline().spans[-1].note == "try 50"
    there.spans.append(Span("vllm_config", "vllm-51", 60, 61))
    log.step(cast(Replica, there))
    recorder.add("takeover", 62)
    there.bridge.decodes, there.awaits_engine = True, False
    log.step(cast(Replica, there))
    assert not log.open
    assert names(log)[-2:] == ["vllm_config", "takeover"]
    told = log.document()["timeline"]["stages"]
    assert {"vllm_failed", "takeover"} <= {stage["name"] for stage in told}


def test_who_decodes_is_told_after_the_start_too() -> None:
    log, there = StartLog(now(), Recorder("front")), replica(VllmOptions())
    assert log.document()["decode"] is None
    log.step(cast(Replica, there))
    assert log.document()["decode"] == told("native")
    there.bridge.decodes = True
    assert log.step(cast(Replica, there))
    assert not log.step(cast(Replica, there))
    log.close()
    assert log.document()["decode"] == told("vllm")
    there.bridge.decodes, there.bridge.why = False, "it was killed"
    assert log.step(cast(Replica, there))
    assert log.document()["decode"] == told("native", "it was killed")


def test_without_an_engine_nothing_is_said_of_it() -> None:
    log, there = StartLog(now(), Recorder("front")), replica(None)
    assert not log.step(cast(Replica, there))
    assert log.document()["decode"] is None
    alone = StartLog(now(), Recorder("front"))
    assert not alone.step(cast(Replica, replica(VllmOptions(alone=True))))
    assert alone.document()["decode"] == told("vllm")


def test_of_requests_behind_the_start_the_latest_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    began = now()
    log, there = StartLog(began, Recorder("front")), replica(None)
    there.answered = False
    there.spans.append(Span("weight_read", "memory", began, began + 1))
    log.step(cast(Replica, there))
    assert log.document()["latest"] == {"began_ns": began, "stages": []}
    there.answered = True
    log.step(cast(Replica, there))
    # While the start's log is open, and when it is closed.
    for moment, open_ in ((1, True), (2, False)):
        there.spans.append(Span("prefill[head]", "prefill-0", began, began + moment * 10**9))
        log.step(cast(Replica, there))
        assert log.open is open_
        monkeypatch.setattr(startlog, "_SPANS_NS", -1)
        log.step(cast(Replica, there))
    told = log.document()
    assert [stage["end_s"] for stage in told["latest"]["stages"]] == [1.0, 2.0]
    assert len(told["timeline"]["stages"]) == 2
    for number in range(1000):
        there.spans.append(Span(f"prefill[{number}]", "prefill-0", began, began + number))
        log.step(cast(Replica, there))
        assert there.spans == []
    stages = log.document()["latest"]["stages"]
    assert len(stages) == 256
    assert stages[-1]["name"] == "prefill[999]"
