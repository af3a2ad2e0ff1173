"""What a GPU is asked with replicas on it, asked of an emulated one: protocol, and no figure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from coldframe.benchmarks.gpu import decode, resident
from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.report import Found, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.cuda import CudaDevice
from tests.benchmarks.emulated_machine import HERE, environment
from tests.loader.devices.emulator import Emulator
from tests.runtime.emulated import emulate

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def measured(
    demo_model: Callable[..., Path],
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Found]:
    """Runs a part on the tiny model."""
    emulate(monkeypatch)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))

    def measure(part: Callable[[Report, Setting], None]) -> Found:
        model = str(demo_model("llama", "bfloat16"))
        earlier = Found(rows=[Row(BARE, [1.0], "GB/s")], kept={MODEL: model})
        report = Report(tmp_path / "f", earlier)
        part(report, Setting("cuda:0", str(tmp_path), 60.0, runs=2))
        report.close()
        return Found.read(tmp_path / "f")

    return measure


@pytest.mark.heavy
def test_a_resident_replica(
    measured: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = Emulator()
    monkeypatch.setattr(resident, "CudaDevice", partial(CudaDevice, api=emulator))
    found = measured(resident.measure)
    assert emulator.left() == []
    emulator.close()
    outcomes = {check.name: check.outcome for check in found.checks}
    assert outcomes["the same tokens before and after it was parked"] == "passed"
    # The emulator counts the memory of its own process alone.
    assert outcomes["a parked replica's weights are not in the GPU's memory"] == "failed"
    assert "locked" in found.answers["how the weights are kept"]
    (ratio,) = [row for row in found.rows if row.target is not None]
    assert (ratio.target, ratio.at_least, len(ratio.runs)) == (1.10, False, 2)
    least = found.median("  resident: bytes / bare rate")
    times = next(row.runs for row in found.rows if row.name == "resident: TTFT")
    assert ratio.runs == [pytest.approx(value / least) for value in times]


@pytest.mark.heavy
def test_decode(measured: Callable[..., Found], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_bandwidth", lambda setting: [1e9, 3e9, 2e9])
    found = measured(decode.measure)
    assert found.median("device memory, a copy counted twice") == 2.0
    rates = next(row.runs for row in found.rows if row.name == "decode, batch 1")
    limit = found.median("  bandwidth / bytes of weights")
    (share,) = [row for row in found.rows if row.target is not None]
    assert (share.target, share.at_least) == (0.3, True)
    assert share.runs == [pytest.approx(rate / limit) for rate in rates]


def tests_for_a_gpu(tmp_path: Path, *chosen: str) -> str:
    """Runs them, as far as they are chosen, where every process has an emulated GPU."""
    arguments = ["-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        [sys.executable, "-c", HERE, *arguments],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_the_tests_for_a_gpu_pass_on_an_emulated_one(tmp_path: Path) -> None:
    """All but those that take long."""
    chosen = "qwen3 and float32 or weights_are or zeroed or addresses or parked or two_processes"
    said = tests_for_a_gpu(tmp_path, str(ROOT / "tests" / "gpu"), "-k", chosen)
    assert "skipped" not in said
    assert "6 passed" in said, said
