"""A memory service that freezes another process's context when its owner says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, DeviceFull, NoCheckpoint
from coldframe.loader.timeline import Span
from coldframe.loader.wire import Channel
from coldframe.snapshot import cuda
from coldframe.snapshot.contexts import open_contexts
from tests.loader.devices import emulated_checkpoint as states
from tests.loader.devices.emulator import Emulator
from tests.loader.devices.test_service_cuda import Served, in_threads, until
from tests.loader.weights import layered
from tests.snapshot.target import Target, target

CONTEXT = 64 << 20


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return str(tmp_path / "ledger")


@pytest.fixture
def other(ledger: str) -> Iterator[Target]:
    # First: whoever forks has one thread.
    with target(context_bytes=CONTEXT, ledger=ledger) as other:
        yield other


@pytest.fixture
def emulator(other: Target, ledger: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setattr(cuda, "CONTEXT_BYTES", CONTEXT)  # which is known here
    emulator = Emulator(context_bytes=CONTEXT, ledger=ledger)
    yield emulator
    emulator.close()


@pytest.fixture
def served(
    emulator: Emulator,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    in_threads(monkeypatch, emulator)
    base, model = tmp_path_factory.mktemp("r"), layered(tmp_path / "m")
    made = Served(emulator, base, model, open_contexts=open_contexts)
    yield made
    made.close()


def order(served: Served, what: str, pid: int, **more: Any) -> None:
    if what == "checkpoint":
        more.setdefault("own_bytes", 0)
    served.owner.send({"type": what, "name": "w", "pid": pid, **more})


def answer(served: Served, what: str) -> dict[str, Any]:
    body = dict(served.expect(what).body)
    assert body["name"] == "w"
    return body


def frozen(served: Served, pid: int) -> dict[str, Any]:
    order(served, "checkpoint", pid)
    told = answer(served, "checkpointed")
    assert told["error"] is None
    return {"bytes": told["bytes"], "uuids": told["uuids"]}


def error_of(told: dict[str, Any]) -> ColdframeError:
    return ColdframeError.from_wire(told["error"])


def test_a_context_leaves_and_comes_back(served: Served, other: Target) -> None:
    for _ in range(2):
        order(served, "checkpoint", other.pid)
        told = answer(served, "checkpointed")
        assert told["error"] is None
        assert told["bytes"] == CONTEXT
        assert list(told["uuids"].values()) == ["Emulated GPU 0"]
        assert told["seconds"] > 0
        spans = [Span.from_wire(data) for data in told["spans"]]
        (span,) = [span for span in spans if span.name == "cuda_checkpoint"]
        assert (span.process, span.note) == ("memory", f"w: {CONTEXT:,} bytes")
        order(served, "restore", other.pid, bytes=told["bytes"], uuids=told["uuids"])
        told = answer(served, "restored")
        assert (told["error"], told["bytes"]) == (None, CONTEXT)
        assert "cuda_restore" in [data[0] for data in told["spans"]]
        assert other.ask("call") == "call"


def test_an_order_that_fails_is_answered_with_the_reason(
    served: Served, other: Target, emulator: Emulator
) -> None:
    emulator.fail("cuCheckpointProcessLock", code="CUDA_ERROR_NOT_SUPPORTED")
    order(served, "checkpoint", other.pid)
    told = answer(served, "checkpointed")
    assert isinstance(error_of(told), NoCheckpoint)
    assert (told["bytes"], told["uuids"]) == (0, {})
    assert "NOT_SUPPORTED" in next(d[4] for d in told["spans"] if d[0] == "cuda_checkpoint")
    assert other.ask("call") == "call"
    was = frozen(served, other.pid)
    order(served, "restore", other.pid, **was | {"bytes": 1 << 40})
    assert isinstance(error_of(answer(served, "restored")), DeviceFull)
    order(served, "restore", other.pid, **was)
    assert answer(served, "restored")["error"] is None


def test_a_mistake_is_answered_too(served: Served, other: Target) -> None:
    order(served, "restore", other.pid, bytes="many", uuids={"GPU-x": "Emulated GPU 0"})
    error = error_of(answer(served, "restored"))
    assert type(error) is DeviceError
    assert "broke" in error.what


def test_the_loop_goes_on_meanwhile(served: Served, other: Target) -> None:
    other.ask("busy")  # so that the lock waits
    order(served, "checkpoint", other.pid)
    served.owner.send({"type": "usage"})
    assert served.expect("usage", "checkpointed").kind == "usage"
    other.ask("rest")
    assert answer(served, "checkpointed")["error"] is None


def test_only_the_owner_orders_that(served: Served, other: Target) -> None:
    stranger = Channel.connect(served.path)
    stranger.send({"type": "checkpoint", "name": "w", "pid": other.pid, "own_bytes": 0})
    assert stranger.recv(timeout=20) is None
    stranger.close()
    record = states.peek(other.pid)
    assert record is not None
    assert record.state == states.RUNNING


def test_a_service_that_ends_meanwhile_ends(
    served: Served, other: Target, emulator: Emulator
) -> None:
    emulator.slow_s = 0.2
    order(served, "checkpoint", other.pid)
    until(lambda: emulator.calls["cuCheckpointProcessLock"] > 0)
    served.close()
    until(lambda: "contexts" not in [thread.name for thread in threading.enumerate()])
    record = states.peek(other.pid)
    assert record is not None
    assert record.state == states.CHECKPOINTED


def test_nobody_freezes_where_nobody_has_handed_that_in(
    emulator: Emulator,
    other: Target,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_threads(monkeypatch, emulator)
    made = Served(emulator, tmp_path_factory.mktemp("r"), layered(tmp_path / "m"))
    try:
        order(made, "checkpoint", other.pid)
        assert isinstance(error_of(answer(made, "checkpointed")), NoCheckpoint)
    finally:
        made.close()


def test_a_cpu_has_no_contexts(
    emulator: Emulator,
    other: Target,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_threads(monkeypatch, emulator)
    base, model = tmp_path_factory.mktemp("r"), layered(tmp_path / "m")
    made = Served(emulator, base, model, open_contexts=open_contexts, device="cpu")
    try:
        order(made, "checkpoint", other.pid)
        assert "only a GPU" in str(error_of(answer(made, "checkpointed")))
    finally:
        made.close()
