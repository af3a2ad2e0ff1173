"""What a GPU is asked with replicas on it, asked of an emulated one: protocol, and no figure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.gpu import archived, decode, resident, restored
from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.correctness import RETURNING
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.probes import PROBES, ask_all
from coldframe.benchmarks.gpu.report import Found, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.driver import Driver
from coldframe.snapshot.criu import Criu
from tests.benchmarks.emulated_machine import HERE, environment
from tests.loader.devices.emulator import Emulator
from tests.runtime.emulated import emulate

ROOT = Path(__file__).parent.parent.parent
CONTEXT = 64 << 20


Measured = Callable[..., Found]


@pytest.fixture
def measured(
    demo_model: Callable[..., Path],
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Measured:
    """Runs a part on the tiny model, on a machine whose GPU is emulated in every process."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))

    def measure(
        part: Callable[[Report, Setting], None],
        earlier: Found | None = None,
        **faults: dict[str, Any],
    ) -> Found:
        context = {"ledger": str(tmp_path / "ledger"), "context_bytes": CONTEXT}
        worker = {**context, "drivers": str(tmp_path / "graphs"), **faults.get("worker", {})}
        model = str(demo_model("llama", "bfloat16"))
        before = Found(rows=[Row(BARE, [1.0], "GB/s")], kept={MODEL: model})
        if earlier is not None:
            before.add(earlier)
        file = tmp_path / part.__module__
        report = Report(file, before)
        # Undone behind it: processes that are told so twice have two GPUs.
        with pytest.MonkeyPatch.context() as patch, closing(report):
            emulate(patch, memory={**context, **faults.get("memory", {})}, worker=worker)
            part(report, Setting("cuda:0", str(tmp_path), 60.0, runs=2))
        return Found.read(file)

    return measure


def figures(found: Found) -> dict[str, Row]:
    return {row.name.strip(): row for row in found.rows}


@pytest.mark.heavy
def test_a_resident_replica(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = Emulator(ledger=str(tmp_path / "ledger"), context_bytes=CONTEXT)
    monkeypatch.setattr(resident, "CudaDevice", partial(CudaDevice, api=emulator))
    found = measured(resident.measure)
    assert emulator.left() == []
    emulator.close()
    outcomes = {check.name: check.outcome for check in found.checks}
    rows = figures(found)
    for name in ("resident", "resident, contexts up"):
        assert outcomes[f"{name}: the same tokens before and after it was parked"] == "passed"
        assert "locked" in found.answers[f"{name}: how the weights are kept"]
        assert len(rows[f"{name}: TTFT"].runs) == 2
    # The emulator knows of others' contexts, and not of what else they have.
    free = "what was parked is not in the GPU's memory"
    assert outcomes[f"resident: {free}"] == "passed"
    assert outcomes[f"resident, contexts up: {free}"] == "failed"
    assert rows["resident: left on the GPU at rest"].runs == [CONTEXT / 1e6]
    assert rows["resident, contexts up: left on the GPU at rest"].median >= 3 * CONTEXT / 1e6
    aims = {name: (row.target, row.at_least) for name, row in rows.items() if row.target}
    assert aims == {
        "resident: TTFT - the weights' way back": (0.3, False),
        "resident, contexts up: TTFT / (bytes / bare rate)": (1.10, False),
    }
    waking = found.answers["resident: the last wake, by its stages"]
    assert "memory cuda_restore" in waking


@pytest.mark.heavy
def test_a_replica_whose_contexts_stay(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator()
    monkeypatch.setattr(resident, "CudaDevice", partial(CudaDevice, api=emulator))
    found = measured(resident.measure, memory={"missing": ("cuCheckpointProcessLock",)})
    emulator.close()
    assert "has no cuCheckpointProcessLock" in found.left_out["resident"]
    rows = figures(found)
    assert "resident: TTFT" not in rows
    assert len(rows["resident, contexts up: TTFT"].runs) == 2


@pytest.mark.heavy
def test_decode_and_then_a_start_that_finds_the_steps(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "open", partial(Driver.open, Emulator()))
    monkeypatch.setattr(decode, "bandwidth", lambda context, nbytes: [1e9, 3e9, 2e9])
    monkeypatch.setattr(decode, "_BATCHES", (1, 3))
    rows = figures(found := measured(decode.measure))
    assert rows["device memory, a copy counted twice"].median == 2.0
    limit = rows["bandwidth / bytes of weights"].median
    for how, aim in (("with captured steps", 0.65), ("eager", 0.3)):
        alone = rows[f"decode, batch 1, {how}"]
        share = rows[f"decode, batch 1, {how} / bandwidth's"]
        assert (share.target, share.at_least) == (aim, True)
        assert share.runs == [pytest.approx(rate / limit) for rate in alone.runs]
        assert rows[f"decode, batch 3, {how}"].target is None
    taken = rows["capture of a step"]
    captured = found.answers["steps captured"]
    assert captured == len(taken.runs) > 1
    assert rows["all captures together"].median == pytest.approx(sum(taken.runs) / 1e3)
    assert found.answers["kept for the next start"].startswith(f"{captured} steps, ")

    rows = figures(again := measured(archived.measure, found))
    assert again.left_out == {}
    # One is captured, whose kernels lead to those of the others.
    assert again.answers["steps"] == captured - 1
    share = rows["archive / capture of as many"]
    (took,) = rows["steps put together from an archive"].runs
    assert share.runs == [pytest.approx(took / (captured - 1) / taken.median)]
    assert (share.target, share.at_least) == (0.2, False)


@pytest.mark.heavy
def test_decode_where_nothing_can_be_captured(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "open", partial(Driver.open, Emulator()))
    monkeypatch.setattr(decode, "bandwidth", lambda context, nbytes: [1e9])
    monkeypatch.setattr(decode, "_BATCHES", (1,))
    rows = figures(found := measured(decode.measure, worker={"drivers": None}))
    assert found.left_out == {"decode with captured steps": "none was captured"}
    assert "decode, batch 1, eager" in rows
    assert "decode, batch 1, with captured steps" not in rows


@pytest.mark.heavy
def test_starts_from_an_image(measured: Measured, criu: Criu) -> None:
    rows = figures(found := measured(restored.measure))
    for name in ("image: made", "image: of a worker", "from an image: cuda_restore"):
        assert rows[name].median > 0
    assert len(rows["from an image / fresh"].runs) == 2
    assert [check.outcome for check in found.checks] == ["passed"]
    assert found.answers["and the same as fresh workers"] == "yes"
    assert not [row for row in rows.values() if row.target is not None]


@pytest.mark.heavy
def test_what_is_asked_about_checkpoints(measured: Measured, criu: Criu) -> None:
    names = ("unmapped", "mapped", "private", "pinned", "pairs")
    chosen = [p for p in PROBES if p.name in {f"checkpoint_{name}" for name in names}]
    chosen += [probe for probe in PROBES if probe.name in ("criu", "criu_private", "criu_plain")]
    found = measured(lambda report, setting: ask_all(report, setting, tuple(chosen)))
    assert found.left_out == {}
    answers = {probe.name: found.answers[probe.question] for probe in chosen}
    for name in ("unmapped", "private", "pinned", "pairs"):
        answer = answers[f"checkpoint_{name}"]
        assert answer["MiB freed on the GPU"] >= CONTEXT >> 20
        assert "read" in answer["behind it"]
        assert "wrong" not in answer["behind it"]
    assert "as wanted" in answers["checkpoint_unmapped"]["behind it"]
    mapped = answers["checkpoint_mapped"]
    assert mapped["checkpoint"] == "refused: CUDA_ERROR_NOT_SUPPORTED (not supported)"
    assert mapped["behind it"].endswith("and read")
    for name in ("checkpoint_private", "criu_private"):
        assert answers[name]["behind it"].endswith("by the graph, and read")
    assert " GiB of addresses reserved" in answers["criu_private"]["before"]
    assert answers["criu_plain"]["behind it"] == "it goes on"


def gpu_tests(tmp_path: Path, *chosen: str) -> str:
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
    chosen = "streamed and qwen3 or weights_are or zeroed or addresses or parked or two_processes"
    said = gpu_tests(tmp_path, str(ROOT / "tests" / "gpu"), "-k", chosen)
    assert "skipped" not in said
    assert "6 passed" in said, said


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_those_of_what_comes_back_pass_there(tmp_path: Path, criu: Criu) -> None:
    """All but those that others do as well."""
    files = [str(ROOT / "tests" / "gpu" / name) for name in RETURNING]
    said = gpu_tests(tmp_path, *files, "-k", "not bfloat16 and not answers_with and not to_stay")
    assert "skipped" not in said
    assert "7 passed" in said, said
