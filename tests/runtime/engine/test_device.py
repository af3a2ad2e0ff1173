"""Numbers on their way to a device and back: on a CPU, and what a stand-in for a GPU is asked."""

from __future__ import annotations

import inspect
import time
from array import array
from collections.abc import Iterator

import pytest
import torch

from coldframe.runtime.engine.device import fetch, send, settle, start, stopwatch, upload
from tests.runtime.engine.fake_gpu import GPU, fake_gpu

CPU = torch.device("cpu")


def test_rows_of_any_lengths_go_together() -> None:
    rows = [[1, 2, 3], [], [1 << 62], [-4, 5]]
    found = upload(rows, CPU)
    assert [tensor.tolist() for tensor in found] == rows
    assert {tensor.dtype for tensor in found} == {torch.int64}
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert [tensor.tolist() for tensor in upload([[], []], "cpu")] == [[], []]


def test_what_is_here_is_fetched_without_a_copy() -> None:
    one, two = torch.ones(3), torch.zeros(2, 2)
    found = fetch(one, two)
    assert [tensor.data_ptr() for tensor in found] == [one.data_ptr(), two.data_ptr()]
    settle(CPU)


def test_the_time_is_that_of_the_work() -> None:
    elapsed = stopwatch(CPU)
    begun = time.process_time()
    while time.process_time() - begun < 0.01:
        pass
    assert elapsed() >= 0.01


# -- a GPU's ---------------------------------------------------------------------------------------


class Stream:
    """One that has done what it was given only when somebody waits."""

    def __init__(self) -> None:
        self.said: list[str] = []


class Event:
    """As `torch.cuda.Event`; the second one to be recorded comes 5 ms after the first."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        assert blocking  # a wait that spins takes a core
        self.timed = enable_timing
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        stream.said.append("recorded")
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.said.append("waited")

    def elapsed_time(self, end_event: Event) -> float:
        assert self.timed
        assert end_event.timed
        assert end_event.stream is self.stream is not None
        assert self.stream.said[-1] == "waited"
        return 5.0


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream of a GPU that is in use."""
    stream = Stream()

    def current_stream(device: torch.device) -> Stream:
        assert device == GPU
        return stream

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return stream


def test_the_stand_in_is_called_as_torchs_is() -> None:
    for ours, theirs in (
        (Event.__init__, torch.cuda.Event.__new__),
        (Event.record, torch.cuda.Event.record),
        (Event.synchronize, torch.cuda.Event.synchronize),
        (Event.elapsed_time, torch.cuda.Event.elapsed_time),
    ):
        known = inspect.signature(theirs).parameters
        assert set(inspect.signature(ours).parameters) - {"self"} <= set(known)


def test_a_wait_is_for_all_that_was_queued(stream: Stream) -> None:
    settle(GPU)
    assert stream.said == ["recorded", "waited"]
    settle(CPU)
    assert stream.said == ["recorded", "waited"]


@pytest.mark.usefixtures("stream")
def test_what_goes_up_goes_from_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    locked, tensor = list[bool](), torch.tensor

    def unlocked(data: list[int], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        locked.append(pin_memory)  # without a GPU there is none to be had
        return tensor(data, dtype=dtype)

    monkeypatch.setattr(torch, "tensor", unlocked)
    with fake_gpu() as traffic:
        assert [row.device for row in upload([[1, 2], [3]], GPU)] == [GPU, GPU]
        assert (traffic.up, traffic.waits) == (1, [])
    assert locked == [True]


@pytest.mark.usefixtures("stream")
def test_numbers_are_sent_from_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[list[int]] = []

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(list(tensor.shape))  # without a GPU there is none to be had
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    with fake_gpu() as traffic:
        send(array("q", [1, 2, 3]), torch.empty(3, dtype=torch.int64, device=GPU))
        assert (traffic.up, traffic.waits) == (1, [])
    assert locked == [[3]]


def test_numbers_get_where_they_are_looked_for() -> None:
    place = torch.zeros(5, dtype=torch.int64)
    send(array("q", [7, -1, 2**40]), place[1:4])
    assert place.tolist() == [0, 7, -1, 2**40, 0]


def test_all_is_fetched_with_one_wait(stream: Stream) -> None:
    with fake_gpu() as traffic:
        here = fetch(torch.ones(3, device=GPU), torch.ones(2, device=GPU))
        assert [tensor.device for tensor in here] == [CPU, CPU]
        assert (traffic.down, traffic.waits) == (2, [])
    assert stream.said == ["recorded", "waited"]


def test_the_time_is_taken_from_an_idle_gpu_on(stream: Stream) -> None:
    elapsed = stopwatch(GPU)
    assert stream.said == ["recorded", "waited", "recorded"]
    assert elapsed() == 0.005
    assert stream.said == ["recorded", "waited", "recorded", "recorded", "waited"]


@pytest.fixture
def precision() -> Iterator[None]:
    """Whatever is set, it is as before behind this."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    flags = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    kept = {name: getattr(matmul, name) for name in flags}
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.set_float32_matmul_precision(before)
    for name, value in kept.items():
        setattr(matmul, name, value)


@pytest.mark.usefixtures("precision")
def test_a_gpu_is_started_with_exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_cudnn_sdp(True)
    with fake_gpu() as traffic:
        start(GPU)
        assert traffic.calls > 0
    assert chosen == [0]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
