"""Captured steps kept and put together in one process, on an emulated GPU's own graphs.

Weights and KV are this process's memory, which stays where it is; what a start leaves behind goes
with its worker's own memory (`emulated_capture.py`). Whole replicas are in `test_kept_steps.py` of
the folder above.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from coldframe.loader.arena import SCRATCH_BASE
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import DeviceLost
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.graphs import StepGraphs
from coldframe.runtime.engine.model import Model
from coldframe.runtime.graphs.archive import KeptSteps
from coldframe.runtime.graphs.lookup import REGIONS, Shelved
from coldframe.snapshot.graph_file import decode
from coldframe.snapshot.graphs import GraphArchive, GraphFingerprint
from tests.loader.devices.emulator import Emulator
from tests.runtime.engine.conftest import Pair, make_pair, make_reference, small_config
from tests.runtime.engine.emulated_capture import EmulatedCapturer, launch
from tests.runtime.engine.test_graphs import Talk, talk

SIZES = tuple((region.name, region.size) for region in REGIONS)
HERE = GraphFingerprint("13000", "none", "Emulated GPU 0", "9.0", "2", "13", "none", "m", SIZES)


@pytest.fixture(scope="module")
def pair(references: dict[str, Any]) -> Pair:
    config = small_config("llama")
    key = "kept steps"
    if key not in references:
        references[key] = make_reference(config, torch.float32)
    return make_pair(references[key], config, torch.float32, "aligned")


class Start:
    """What one start of a worker has.

    Args:
        pair: The model.
        emulator: Its GPU.
        archive: What an earlier start has left.
    """

    def __init__(self, pair: Pair, emulator: Emulator, archive: GraphArchive | None = None) -> None:
        self.emulator = emulator
        self._gpu = CudaDevice(0, emulator)
        self.capturer = EmulatedCapturer(self._gpu)
        self.model = Model(pair.spec, pair.weights, pair.kv)
        self.pair = replace(pair, model=self.model)
        self.graphs = StepGraphs(self.model, self.capturer, most=2, limit=4)  # type: ignore[arg-type]
        self.recorder = Recorder("decode")
        self.sent: list[tuple[str, bytes]] = []
        context = self._gpu.context
        self.replayed = 0
        self.steps = KeptSteps(
            self.graphs,
            Shelved(HERE, archive, "" if archive else "there is none"),
            context,
            self._launch,
            lambda name, raw: self.sent.append((name, raw)),
            self.recorder,
        )

    def _launch(self, made: Any) -> None:
        self.replayed += 1
        launch(GraphCalls(self._gpu.context.driver), made)

    def talk(self) -> Talk:
        """Some tokens of two requests together, then of one; in between there is nothing to do."""
        talking = talk(self.pair, 5, 40)
        for rows in ([0, 1], [0]):
            for _ in range(4):
                talking.take(rows, self.graphs.forward(talking.chunks(rows)))
                self.steps.between_steps()
            while self.steps.while_idle():
                pass
        return talking

    def notes(self, name: str) -> list[str]:
        return [span.note or "" for span in self.recorder.drain() if span.name == name]

    def end(self) -> None:
        """As the process would."""
        if not self.emulator.is_lost:
            for graph in self.graphs.captured.values():
                graph.close()
            self.capturer._scratch.close()
            self._gpu.context.close()


Begin = Callable[..., Start]


@pytest.fixture
def begin(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Starts a worker in the place of the one before."""
    monkeypatch.setattr(DeviceReservation, "dlpack_device", property(lambda self: (1, 0)))
    emulator, running = Emulator(), list[Start]()

    def start(archive: GraphArchive | None = None) -> Start:
        while running:
            running.pop().end()
        running.append(Start(pair, emulator, archive))
        return running[0]

    yield start
    running[0].end()
    emulator.close()


@pytest.fixture
def archive(begin: Begin) -> GraphArchive:
    """What a first start leaves."""
    first = begin()
    first.talk().check()
    (span,) = (span for span in first.recorder.drain() if span.name == "graph_save")
    ((_, raw),) = first.sent
    assert span.note == f"{len(first.graphs.captured)} steps, {len(raw):,} bytes"
    assert not first.steps.while_idle()  # and not again
    return decode(raw, "what was sent", HERE)


def test_what_one_start_has_saved_answers_in_the_next(begin: Begin, archive: GraphArchive) -> None:
    second = begin(archive)
    second.talk().check()
    assert len(second.graphs.captured) == 1
    assert second.replayed > 3
    assert second.graphs.refused == {}
    assert second.sent == []
    (note,) = second.notes("graph_restore")
    assert note.startswith(f"{len(archive.graphs) - 1} steps in ")


def test_between_steps_one_is_put_together_now_and_then(
    begin: Begin, archive: GraphArchive
) -> None:
    second = begin(archive)
    talking, made = talk(second.pair, 5, 40), list[int]()
    for step in range(2 + 3 * 8):
        rows = [0, 1] if step >= 10 else [0]
        talking.take(rows, second.graphs.forward(talking.chunks(rows)))
        before = len(second.graphs._held.rebuilt)
        second.steps.between_steps()
        made.append(len(second.graphs._held.rebuilt) - before)
    assert set(made) == {0, 1}
    places = [step for step, count in enumerate(made) if count]
    assert places == [9, 17, 25]
    talking.check()


def test_what_was_put_together_is_given_up_with_the_others(
    begin: Begin, archive: GraphArchive
) -> None:
    second = begin(archive)
    second.capturer.drop = lambda: None  # type: ignore[method-assign]
    second.talk()
    left = second.emulator.graphs_left()
    rebuilt, captured = second.graphs._held.rebuilt, second.graphs.captured
    assert len([name for name in left if "executable" in name]) == len(rebuilt) + len(captured)
    second.graphs.drop()
    assert second.emulator.graphs_left() == []


def test_a_start_without_an_archive_says_why(begin: Begin) -> None:
    assert begin().notes("graph_restore") == ["none: there is none"]


FAILING = ("cuGraphGetNodes", "cuFuncGetModule", "cuGraphUpload")


@pytest.mark.heavy
@pytest.mark.parametrize("call", FAILING)
def test_what_fails_on_the_way_is_captured(
    begin: Begin, archive: GraphArchive, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = begin(archive)
    at_the_first = KeptSteps._begin

    def begun(steps: KeptSteps) -> None:
        second.emulator.fail(call, code="CUDA_ERROR_NOT_SUPPORTED")
        at_the_first(steps)

    monkeypatch.setattr(KeptSteps, "_begin", begun)
    second.talk().check()
    assert any("CUDA_ERROR_NOT_SUPPORTED" in note for note in second.notes("graph_restore"))
    captured, rebuilt = second.graphs.captured, second.graphs._held.rebuilt
    assert len(captured) + len(rebuilt) == len(archive.graphs)
    assert len(captured) > 1


@pytest.mark.heavy
def test_a_device_that_is_lost_on_the_way_is_no_reason_to_go_on(
    begin: Begin, archive: GraphArchive
) -> None:
    second = begin(archive)
    second.emulator.fail("cuGraphAddDependencies", 10_000)
    talking = talk(second.pair, 5)
    while not second.graphs.captured:
        talking.take([0], second.graphs.forward(talking.chunks([0])))
        second.steps.between_steps()
    second.emulator.lose()
    with pytest.raises(DeviceLost):
        second.steps.while_idle()


@pytest.mark.heavy
def test_memory_that_lies_elsewhere_has_nothing_kept(
    begin: Begin, archive: GraphArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedCapturer, "scratch", None)
    for given in (archive, None):
        start = begin(given)
        start.talk().check()
        assert len(start.graphs.captured) == len(archive.graphs)
        span = "graph_save" if given is None else "graph_restore"
        assert "not where it is in other processes" in start.notes(span)[-1]
        assert start.sent == []


@pytest.mark.heavy
def test_steps_that_compute_something_else_are_found_out(
    begin: Begin, archive: GraphArchive
) -> None:
    """Their logits go elsewhere in the worker's own memory."""
    logits = archive.notes["logits"] - SCRATCH_BASE
    odd = {}
    for key, graph in archive.graphs.items():
        words = array("Q", graph.words)
        for number, kind in enumerate(graph.kinds):
            if (kind, words[number]) == (3, logits):
                words[number] += 4 << 20
        assert words.tobytes() != graph.words
        odd[key] = replace(graph, words=words.tobytes())
    notes = {**archive.notes, "scratch_bytes": 16 << 20}
    second = begin(replace(archive, graphs=odd, notes=notes))
    second.talk().check()
    refused = second.graphs.refused.values()
    assert {error.what for error in refused} == {"a replayed step computes something else"}


def test_steps_over_another_place_are_not_even_tried(begin: Begin, archive: GraphArchive) -> None:
    second = begin(replace(archive, notes={**archive.notes, "numbers": SCRATCH_BASE}))
    second.talk().check()
    assert "captured over another place, in numbers" in second.notes("graph_restore")[0]
    assert len(second.graphs.captured) == len(archive.graphs)
    assert len(second.sent) == 1


@pytest.mark.heavy
def test_an_archive_without_what_it_should_say_is_as_none(
    begin: Begin, archive: GraphArchive
) -> None:
    second = begin(replace(archive, notes={}))
    second.talk().check()
    assert len(second.graphs.captured) == len(archive.graphs)
    assert second.notes("graph_restore")[0].startswith("failed: ")
    assert len(second.sent) == 1  # another takes its place
