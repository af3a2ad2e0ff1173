"""The parts that measure, over an emulated GPU and a model of a megabyte: each figure is there.

That proves that they copy, count and compare what they say. How fast anything is it cannot tell.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from coldframe.benchmarks.gpu import copies, loads
from coldframe.benchmarks.gpu.bare import bare, host_buffer
from coldframe.benchmarks.gpu.cold import rows, same_answers, worker_ready_s
from coldframe.benchmarks.gpu.feeding import ConnectedRing, Feed, MemorySource, load, pieces
from coldframe.benchmarks.gpu.machine import notes, torch_cuda
from coldframe.benchmarks.gpu.model import choose, shape_of, write_shape
from coldframe.benchmarks.gpu.report import Found, LeftOut, Report, Setting
from coldframe.benchmarks.gpu.sanitizer import errors_in
from coldframe.benchmarks.harness import Row
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceError, DeviceLost, PlatformError
from coldframe.loader.sources.file import FileSource
from tests.loader.devices.emulator import GRANULARITY, Emulator

SIZE = 4 * GRANULARITY


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    found = Emulator()
    yield found
    left = found.left()
    found.close()
    assert found.is_lost or left == []


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cuda:0", str(tmp_path), 60.0, nbytes=SIZE, runs=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    assert write_shape(path, shape_of("tiny")) > 0
    return path


def test_the_rates_of_the_path(emulator: Emulator, setting: Setting, tmp_path: Path) -> None:
    report = Report(tmp_path / "f")
    copies.rates_of(report, setting, emulator)
    report.close()
    found = Found.read(tmp_path / "f")
    names = {row.name for row in found.rows}
    assert {copies.BARE, copies.HOST_COPY, "  on two streams"} <= names
    assert "locking a buffer of 8 MiB that is full" in names
    assert all(len(row.runs) == 2 and min(row.runs) > 0 for row in found.rows)
    one, two = found.median("  on one stream"), found.median("  on two streams")
    assert found.median(copies.BARE) == max(one, two)
    # Once to warm up, twice on one stream, twice with two copies each.
    assert emulator.calls["cuMemcpyHtoDAsync"] == 1 + 2 + 4 + 2


def test_memory_that_cannot_be_locked_is_left_out(
    emulator: Emulator, setting: Setting, tmp_path: Path
) -> None:
    emulator.fail("cuMemHostRegister", code="CUDA_ERROR_OPERATING_SYSTEM")
    report = Report(tmp_path / "f")
    copies.rates_of(report, setting, emulator)
    report.close()
    found = Found.read(tmp_path / "f")
    assert "OPERATING_SYSTEM" in found.left_out["locking host memory"]
    assert found.median(copies.BARE) > 0


def test_the_bare_copy_brings_the_bytes(emulator: Emulator) -> None:
    context = Context(Driver.open(emulator), 0)
    with bare(context, SIZE - 100) as link:  # as much as a plan's bytes may be
        link.rate()
        link.check()
    with bare(context, SIZE) as link:
        link.rate(2)
        link.check()
        there = ctypes.string_at(link.arena.address, SIZE)
        assert there == bytes(link.buffer.view[:SIZE])
        assert len(set(there[:4096])) > 100
        ctypes.memset(link.arena.address + SIZE - 1, there[-1] ^ 1, 1)
        with pytest.raises(DeviceError, match="not what has arrived"):
            link.check()
    context.close()


def test_a_plan_is_cut_into_chunks_up_to_a_limit(model: Path) -> None:
    plan = Plan.build(Checkpoint.open(str(model)), layout=Layout.ALIGNED)
    for most in (plan.read_bytes, 100_000):
        cut = list(pieces(plan, 65_536, most))
        assert sum(stop - start for _, start, stop in cut) == most
        assert max(stop - start for _, start, stop in cut) <= 65_536
    whole = list(pieces(plan, 1 << 30, plan.read_bytes))
    assert [extent for extent, _, _ in whole] == [e for s in plan.stages for e in s.extents]


def test_the_loader_brings_a_whole_plan(emulator: Emulator, model: Path) -> None:
    checkpoint = Checkpoint.open(str(model))
    plan = Plan.build(checkpoint, layout=Layout.ALIGNED)
    context, source = Context(Driver.open(emulator), 0), FileSource(checkpoint.shards)
    arena = DeviceArena(context, plan.arena_bytes, writable=False)
    arena.grow(arena.size)
    feed = Feed(65_536, 3, 2)
    with ConnectedRing(feed, context) as ring:
        assert load(ring, source, plan, arena.address, feed, plan.read_bytes) > 0
    for shard in checkpoint.shards:
        for name, tensor in load_file(shard.uri).items():
            place = plan.placements[name]
            there = ctypes.string_at(arena.address + place.arena_offset, place.nbytes)
            assert there == ctypes.string_at(tensor.data_ptr(), place.nbytes), name
    with ConnectedRing(feed, context) as ring:
        emulator.fail_copy()
        with pytest.raises(DeviceLost):
            load(ring, source, plan, arena.address, feed, plan.read_bytes)
    arena.close()
    source.close()


def test_host_memory_in_the_place_of_files() -> None:
    buffer = host_buffer(8192)
    buffer.view[:] = bytes(range(256)) * 32
    parts = [memoryview(bytearray(100)), memoryview(bytearray(9000))]
    MemorySource(buffer).read_into(0, 8192 + 5, parts)
    assert bytes(parts[0]) == bytes(buffer.view[5:105])
    assert bytes(parts[1]) == (bytes(buffer.view) * 2)[105:9105]


def test_the_loader_beside_the_link(
    emulator: Emulator, setting: Setting, tmp_path: Path, model: Path
) -> None:
    earlier = Found(rows=[Row(copies.HOST_COPY, [10.0], "GB/s")])
    report = Report(tmp_path / "f", earlier)
    loads.rates_of(report, setting, emulator, model)
    report.close()
    found = Found.read(tmp_path / "f")
    for what in ("host RAM", "page cache"):
        assert "best" in found.answers[f"{what}: the fastest feed"]
        assert found.answers[f"{what}: how it was copied"] == "from locked memory"
        ratio = found.median(f"{what} to the device / bare pinned copy")
        assert ratio > 0
    (aim,) = [row for row in found.rows if row.target is not None and "page cache" in row.name]
    assert (aim.target, aim.at_least, len(aim.runs)) == (1.0, True, 2)
    # On a tmpfs files cannot be evicted; elsewhere they are read from disk.
    assert ("disk to the device" in found.left_out) != any(
        row.name == "disk to the device" for row in found.rows
    )


def test_without_an_earlier_figure_there_is_no_comparison() -> None:
    with pytest.raises(LeftOut, match="no figure 'bare pinned copy to the device'"):
        Found().median(copies.BARE)


# -- the model ------------------------------------------------------------------------------------


def test_the_model_is_a_checkpoint_of_its_shape(model: Path) -> None:
    checkpoint = Checkpoint.open(str(model))
    shape = shape_of("tiny")
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == shape.nbytes()
    file = Path(checkpoint.shards[0].uri)
    data = file.read_bytes()
    # No number is infinite, none is no number: an exponent of all ones has both.
    ends = [data[at] << 8 & 0x7F80 | data[at - 1] & 0x80 for at in range(len(data) - 1, 4096, -2)]
    assert 0x7F80 not in ends
    assert len({tensor.nbytes for tensor in checkpoint.tensors.values()}) > 1


def test_8_b_is_16_gb() -> None:
    assert shape_of("8B").parameters() == 8_030_261_248
    assert shape_of("8B").nbytes() == 2 * 8_030_261_248
    assert shape_of("8B").config()["num_hidden_layers"] == 32


def test_the_largest_model_that_there_is_room_for_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {"disk": 20 << 30, "shm": 64 << 30}
    rate = 2e9
    disk, shm = tmp_path / "disk", tmp_path / "shm"
    disk.mkdir()
    shm.mkdir()
    from coldframe.benchmarks.gpu import model as module

    class Usage:
        def __init__(self, place: Path) -> None:
            self.free = usage[place.name]

    monkeypatch.setattr(module.shutil, "disk_usage", Usage)
    monkeypatch.setattr(module, "_write_rate", lambda place: rate)
    both = ["8B", "1B"]
    large = 80 << 30
    assert choose(both, disk, 128 << 30, large, shm)[:2] == ("8B", disk)
    name, place, notes = choose(both, disk, 128 << 30, 16 << 30, shm)
    assert (name, place) == ("1B", disk)
    assert notes == {"8B": "17.2 GB of the GPU's memory are free"}
    rate = 0.3e9
    name, place, notes = choose(both, disk, 128 << 30, large, shm)
    assert (name, place) == ("8B", shm)
    assert notes == {f"8B on {disk}": "it takes 0.30 GB/s only"}
    assert choose(both, disk, 16 << 30, large, shm)[:2] == ("1B", shm)
    usage["disk"] = 0
    with pytest.raises(LeftOut, match="room for no model"):
        choose(both, disk, 1 << 30, large, shm)


# -- starts ---------------------------------------------------------------------------------------


def start(ttft: float, load_s: float, ready: float) -> dict[str, Any]:
    stages = [
        {"name": "ready", "process": "decode-1", "end_s": 9.0},
        {"name": "ready", "process": "prefill-0", "end_s": ready},
    ]
    told = {"ttft_s": ttft, "load_s": load_s, "first_byte_s": 0.1, "weights_bytes": 16e9}
    return {**told, "stages": stages}


def test_a_cold_start_is_held_against_the_later_of_load_and_worker() -> None:
    found = {
        row.name: row for row in rows("warm", [start(2.0, 1.8, 1.0), start(2.5, 1.0, 2.1)], 50e9)
    }
    beyond = found["warm: TTFT - the later of these two"]
    assert beyond.runs == [pytest.approx(0.2), pytest.approx(0.4)]
    assert (beyond.target, beyond.at_least) == (0.3, False)
    ratio = found["warm: TTFT / (bytes / bare rate)"]
    assert ratio.runs == [pytest.approx(6.25), pytest.approx(7.8125)]
    read = found["  warm: weights read and copied, from the first byte on"]
    assert read.runs == [pytest.approx(16 / 1.7), pytest.approx(16 / 0.9)]
    assert len(rows("warm", [start(2.0, 1.8, 1.0)], None)) == len(found) - 2
    with pytest.raises(PlatformError, match="does not say when its worker was ready"):
        worker_ready_s({"stages": []})


def test_starts_that_answer_differently_fail() -> None:
    same = {"token_ids": [1, 2]}
    assert same_answers([same, same, same]).outcome == "passed"
    failed = same_answers([same, same, {"token_ids": [1, 3]}])
    assert (failed.outcome, failed.reason) == ("failed", "[1, 2] first, then [1, 3]")


def test_what_compute_sanitizer_says() -> None:
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    bad = (
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4 bytes\n"
        "=========     at k\n========= ERROR SUMMARY: 2 errors\n"
    )
    assert errors_in("") == (0, None)
    assert errors_in(clean * 3) == (3, None)
    assert errors_in(clean + bad) == (2, "2 errors: Invalid __global__ write of size 4 bytes")


def test_what_torch_is_built_for_is_told_without_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise MemoryError('gigabytes')\n")
    version = tmp_path / "torch" / "version.py"
    version.write_text("from typing import Optional\ncuda: Optional[str] = '13.9'\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_cuda() == "13.9"


@pytest.mark.parametrize(
    ("bindings", "holds"),
    [
        *(("12.8.0", True), ("12.9.0", True), ("12.9.1", False), ("12.9.4.post1", False)),
        *(("13.0.0", False), ("13.5", False), ("11.8.7", True), ("14.0.0rc1", False)),
    ],
)
def test_bindings_that_stop_all_threads_are_noted(bindings: str, holds: bool) -> None:
    assert [bindings in note for note in notes(bindings, None)] == [True] * holds


def test_what_cold_means_on_a_virtual_machine_is_noted() -> None:
    (note,) = notes("13.0.0", "some vendor")
    assert "some vendor" in note
    assert "guest's page cache only" in note
    (unknown,) = notes(None, None)
    assert "nobody says" in unknown


@pytest.mark.heavy
def test_the_tests_for_a_gpu_are_checks_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    setting = json.dumps({"device": "cuda:0", "scratch": str(tmp_path), "seconds": 60.0})
    command = [sys.executable, "-m", "coldframe.benchmarks.gpu.part"]
    module = "coldframe.benchmarks.gpu.correctness"
    done = subprocess.run(
        [*command, module, str(tmp_path / "f"), "[]", setting],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = Found.read(tmp_path / "f").checks
    assert len(checks) > 10
    assert {check.outcome for check in checks} == {"skipped"}
    assert all((check.reason or "").startswith("no GPU: ") for check in checks)
