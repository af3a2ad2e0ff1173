"""`coldframe bench cold` itself: what it refuses, and real runs of the smallest model."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from coldframe.benchmarks.cold.command import status
from coldframe.benchmarks.document import SCHEMA
from coldframe.runtime.cli import main
from tests.runtime.snapshots import eventually
from tests.support import without_settings

BENCH = [Path(sys.executable).parent / "coldframe", "bench", "cold"]
STAGES = {
    *("process_spawn", "interpreter", "imports", "listen", "snapshot_check", "snapshot_read"),
    *("snapshot_restore", "hooks", "checkpoint_open", "plan", "weight_read", "weight_fetch"),
    *("attach", "tokenizer", "kv_alloc", "warmup", "ready", "queue", "tokenize", "prefill"),
    *("first_token", "handoff", "decode", "last_token", "unattributed", "stage_ready", "files"),
    "weights_return",
}


def bench(*arguments: object, runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in (*BENCH, *arguments)],
        capture_output=True,
        text=True,
        env={**without_settings(), "COLDFRAME_RUN_DIR": str(runs)},
        check=False,
    )


def refused(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path, *arguments: object
) -> str:
    """What the command says in this process, which prints no document and ends with 1."""
    patch.setenv("COLDFRAME_RUN_DIR", str(runs))
    patch.delenv("COLDFRAME_SNAPSHOT", raising=False)
    assert main(["bench", "cold", *map(str, arguments)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    return error


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line, which keeps to the schema and says nothing that contradicts itself."""
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    reference = found["cells"][0]["tokens"]
    assert len(reference) == found["answer_tokens"]
    for cell in found["cells"]:
        _check_cell(cell, found["runs"], reference)
    return found


def _check_cell(cell: dict[str, Any], runs: int, reference: Sequence[int]) -> None:
    ttft = cell["ttft"]["runs"]
    assert len(ttft) == len(cell["starts"]) == runs
    assert [start["ttft_s"] for start in cell["starts"]] == ttft
    assert (cell["tokens"], cell["tokens_equal"], cell["differs"]) == (reference, True, None)
    assert all(a < b for a, b in zip(ttft, cell["last_token"]["runs"], strict=True))
    for run, whole in enumerate(ttft):
        path = [share["seconds"]["runs"][run] for share in cell["path"]]
        assert sum(path) == pytest.approx(whole)
    for stage in cell["stages"]:
        busy = stage["seconds"]["runs"]
        for part in ("overlap", "beside_weights"):
            pairs = zip(stage[part]["runs"], busy, strict=True)
            assert all(0 <= a <= b + 1e-9 for a, b in pairs)
    rests = cell["tier"] in ("parked", "warm")
    assert cell["clock"] == ("request" if rests else "exec")
    for start in cell["starts"]:
        # Of a rest it begins with the request.
        assert start["timeline"]["ttft_s"] is not None
        assert any(stage["name"] == "prefill[head]" for stage in start["timeline"]["stages"])
    assert cell["memory"]["min"] > 100 << 20
    assert cell["evicted"] is (True if cell["cache"] == "cold" else None)
    if cell["ratio"] is not None:
        rates = cell["ceiling"]["rate"]["runs"]
        for ratio, took, rate in zip(cell["ratio"]["runs"], ttft, rates, strict=True):
            assert ratio == pytest.approx(took / (cell["bytes"] / rate))
    stages = {share["name"] for share in (*cell["path"], *cell["stages"])}
    assert stages <= STAGES, stages - STAGES


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["none"], "no such directory"),
        ([".", "--tier", "lukewarm"], "no such tier"),
        ([".", "--throttle", "fast"], "no rate"),
        ([".", "--quick", "--tier", "fresh"], "one matrix"),
        ([".", "--matrix", "none.json"], "cannot be read"),
        ([".", "--runs", "0"], "--runs"),
        ([".", "--tokens", "0"], "--tokens"),
        ([".", "--prompt-tokens", "0"], "--prompt-tokens"),
        ([".", "--fail-if-slower", "10%"], "--baseline"),
        ([".", "--beside", "llamas"], "llamas"),
        ([".", "--any-tokens", "--tier", ","], "nothing to measure"),
        ([".", "--output", "none/there.json"], "--output"),
        ([".", "--snapshot-store", "."], "--snapshot-store"),
        (["."], "config.json"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    (tmp_path / "something").touch()
    model = tmp_path / arguments[0]
    rest = [str(tmp_path / a) if ("." in a and "/" in a) or a == "." else a for a in arguments[1:]]
    assert word in refused(monkeypatch, capsys, tmp_path, model, *rest)


def test_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path, "--baseline", "x", "--fail-if-slower", "slowly", runs=tmp_path)
    assert done.returncode == 2
    assert "no share" in done.stderr


def test_a_baseline_that_is_none(
    demo_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    garbage = tmp_path / "garbage.json"
    garbage.write_text("what is this")
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps({"schema": 1, "kind": "cold", "model": {}, "fingerprint": {}, "cells": []})
    )
    for file, word in (
        (garbage, "no document of this benchmark"),
        (tmp_path / "none", "cannot be read"),
        (other, "another machine"),
    ):
        asked = (demo_model(), "--baseline", file)
        assert word in refused(monkeypatch, capsys, tmp_path, *asked)


def test_a_cold_start_through_http_and_without(
    own_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    model, output = own_model(), tmp_path / "found.json"
    matrix = ("--tier", "fresh", "--through", "http,run", "--cache", "cold", "--runs", 1)
    done = bench(*(model, *matrix, "--tokens", 4, "--no-plan", "--output", output), runs=no_leaks)
    assert done.returncode == 0, done.stderr
    found = document(done)
    assert [cell["id"] for cell in found["cells"]] == [
        "fresh/cold/disk/native/http",
        "fresh/cold/disk/native/run",
    ]
    assert (found["failed"], found["baseline"], found["interrupted"]) == ([], None, False)
    assert json.loads(output.read_text()) == found
    assert found["model"]["path"] == str(model)
    for cell in found["cells"]:
        assert cell["bytes"] == found["model"]["read_bytes"]
        assert cell["prediction"] is None
        assert cell["ratio"]["median"] > 0
        assert cell["id"] in done.stdout
        assert cell["id"] in done.stderr
        assert cell["starts"][0]["timeline"]["critical_path"]


def _left(runs: Path) -> list[psutil.Process]:
    """The processes that were started with a run directory in there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("COLDFRAME_RUN_DIR", "").startswith(str(runs)):
                found.append(process)
    return found


@pytest.mark.heavy
def test_who_is_terminated_tells_of_the_finished_rounds_and_leaves_nothing(
    demo_model: Callable[..., Path], no_leaks: Path
) -> None:
    matrix = ("--tier", "fresh", "--cache", "warm", "--runs", "99", "--tokens", "2")
    command = [*BENCH, demo_model(), *matrix, "--no-plan"]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**without_settings(), "COLDFRAME_RUN_DIR": str(no_leaks)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("1 of 99"):
                break
        else:
            pytest.fail("".join(said))
        # In the middle of a start.
        servers = [one for one in _left(no_leaks) if "serve" in one.cmdline()]
        while not servers and process.poll() is None:
            servers = [one for one in _left(no_leaks) if "serve" in one.cmdline()]
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate()
    assert process.returncode == 143, error
    found = json.loads(out.splitlines()[-1])
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert found["interrupted"]
    assert found["runs"] >= 1
    assert [len(cell["starts"]) for cell in found["cells"]] == [found["runs"]]
    assert (found["failed"], found["left_out"]) == ([], [])
    assert f"interrupted after {found['runs']} rounds" in out
    assert servers
    eventually(lambda: _left(no_leaks) == [])


def test_what_the_exit_status_says() -> None:
    fine: dict[str, Any] = {"cells": [{"tokens_equal": True}], "failed": [], "baseline": None}
    assert status(fine, any_tokens=False) == 0
    differ = {**fine, "cells": [*fine["cells"], {"tokens_equal": False}]}
    assert (status(differ, any_tokens=False), status(differ, any_tokens=True)) == (1, 0)
    assert status({**fine, "failed": ["fresh/cold/disk/native/http"]}, any_tokens=True) == 1
    # Others' programs are not what is tested.
    assert status({**fine, "failed": ["transformers/cold/disk/run"]}, any_tokens=False) == 0
    for slower, lost, expected in (([], [], 0), ([{}], [], 1), ([], ["a"], 1)):
        against = {"slower": slower, "lost": lost}
        assert status({**fine, "baseline": against}, any_tokens=False) == expected


PROGRESS = """
from coldframe.benchmarks.cold.progress import Progress
with Progress() as progress:
    progress.say("a plan")
    progress.expect(2)
    progress.step("one", 1.5)
    progress.step("two", None)
"""


def test_on_a_terminal_there_is_a_bar_and_else_there_are_lines() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS], stderr=-1, text=True, check=True)
    assert done.stderr.splitlines() == ["a plan", "1 of 2: one: 1.50 s", "2 of 2: two: failed"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRESS], stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # what reading says at a terminal's end
            while part := os.read(ours, 1 << 16):
                said += part
        os.close(ours)
    assert process.returncode == 0, said
    assert "2/2" in said.decode()
    assert "\x1b[" in said.decode()


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("criu")
def test_a_wide_matrix_and_then_against_itself(
    own_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    matrix, was = tmp_path / "matrix.json", tmp_path / "was.json"
    blocks = [
        {"tier": ["fresh", "restored"], "cache": "warm", "source": "http", "throttle": "2MB/s"},
        {"tier": ["restored", "template"], "cache": ["cold"], "through": ["http", "run"]},
        {"tier": ["fresh"], "cache": "warm", "source": ["s3", "peer"]},
        {"tier": ["parked", "warm"], "cache": ["cold", "warm"]},
    ]
    matrix.write_text(json.dumps({"matrix": blocks}))
    model = own_model("llama", "bfloat16")
    done = bench(model, "--matrix", matrix, "--runs", 1, "--output", was, runs=no_leaks)
    assert done.returncode == 0, done.stderr
    found = document(done)
    cells = {cell["id"]: cell for cell in found["cells"]}
    assert set(cells) == {
        "fresh/warm/http@2MB/s/native/http",
        "restored/warm/http@2MB/s/native/http",
        "restored/cold/disk/native/http",
        "restored/cold/disk/native/run",
        "template/cold/disk/native/http",
        "template/cold/disk/native/run",
        "fresh/warm/s3/native/http",
        "fresh/warm/peer/native/http",
        "parked/warm/disk/native/http",
        "warm/warm/disk/native/http",
    }
    (rule,) = (each for each in found["left_out"] if each["what"].startswith("parked and warm"))
    assert "2 cells" in rule["what"]
    for cell in cells.values():
        moved = cell["tier"] not in ("parked", "warm")
        assert cell["prediction"] is not None
        assert (cell["ratio"] is not None) is moved
        assert cell["bytes"] == (found["model"]["read_bytes"] if moved else 0)
        assert (cell["image_bytes"] is not None) is (cell["tier"] == "restored")
        names = {stage["name"] for stage in cell["stages"]}
        if cell["source"] in ("s3", "http", "peer"):
            assert "weight_fetch" in names
        if cell["tier"] in ("restored", "template"):
            assert "snapshot_restore" in names
    for tier in ("fresh", "restored"):
        throttled = cells[f"{tier}/warm/http@2MB/s/native/http"]
        assert throttled["ceiling"]["rate"]["max"] <= 2e6
        # No byte is there before the link lets it through.
        assert throttled["ratio"]["min"] >= 0.98

    # Any machine is faster than one that needs no time at all...
    never = json.loads(was.read_text())
    never["cells"] = never["cells"][-2:]
    for cell in never["cells"]:
        cell["ttft"] = dict.fromkeys(("median", "p90", "min", "max"), 1e-09)
    was.write_text(json.dumps(never))
    rest = ("--tier", "parked", "--cache", "warm", "--runs", 1, "--no-plan")
    done = bench(model, *rest, "--baseline", was, "--fail-if-slower", "10%", runs=no_leaks)
    against = document(done)["baseline"]
    assert done.returncode == 1
    (slower,) = against["slower"]
    assert slower["ratio"] > 1e3
    assert "slower" in done.stdout
    assert len(against["missing"]) == 1
    assert (against["lost"], against["added"]) == ([], [])


@pytest.mark.heavy
def test_files_that_cannot_be_evicted_are_left_out(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    memory = Path("/dev/shm") / f"coldframe-test-{os.getpid()}"
    memory.mkdir()
    try:
        for file in demo_model().iterdir():
            (memory / file.name).write_bytes(file.read_bytes())
        matrix = ("--tier", "fresh", "--through", "run", "--runs", 1, "--no-plan")
        done = bench(memory, *matrix, runs=no_leaks)
        assert done.returncode == 0, done.stderr
        found = document(done)
        assert [cell["cache"] for cell in found["cells"]] == ["warm"]
        (left_out,) = (each for each in found["left_out"] if each["what"].startswith("fresh"))
        assert "evicted" in left_out["why"]
        done = bench(memory, *matrix, "--cache", "cold", runs=no_leaks)
        assert done.returncode == 1
        assert "nothing of it can be measured here" in done.stderr
        assert "evicted" in done.stderr
        assert done.stdout == ""
    finally:
        for file in memory.iterdir():
            file.unlink()
        memory.rmdir()
