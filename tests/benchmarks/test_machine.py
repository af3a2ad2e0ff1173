"""What a machine is told by, and which of its settings a benchmark keeps."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from coldframe.benchmarks.command import BENCHMARKS
from coldframe.benchmarks.document import document
from coldframe.benchmarks.gpu_identity import entry, gpu_identity
from coldframe.benchmarks.machine import fingerprint, settings_forgotten
from coldframe.loader.errors import RequestError
from coldframe.runtime.cli import main
from tests.loader.devices.emulator import Emulator


def test_only_the_machines_settings_are_kept_and_the_others_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", "/run/here")
    monkeypatch.setenv("COLDFRAME_CRIU", "/opt/criu")
    monkeypatch.setenv("COLDFRAME_THROTTLE", "1MB/s")
    monkeypatch.setenv("COLDFRAME_DECODE", "vllm")
    before = dict(os.environ)
    with settings_forgotten():
        assert os.environ["COLDFRAME_RUN_DIR"] == "/run/here"
        assert os.environ["COLDFRAME_CRIU"] == "/opt/criu"
        assert "COLDFRAME_THROTTLE" not in os.environ
        assert "COLDFRAME_DECODE" not in os.environ
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["cold", "serve", "handoff", "replay", "rest", "endpoint"])
def test_who_starts_replicas_does_so_without_the_users_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def run(args: argparse.Namespace) -> int:
        seen.update(os.environ, flag=args.throttle, term=signal.getsignal(signal.SIGTERM))
        return 0

    measuring = types.ModuleType("measuring")
    vars(measuring).update(run=run, add_arguments=lambda parser: parser.flag("--throttle"))
    monkeypatch.setitem(sys.modules, "measuring", measuring)
    monkeypatch.setitem(BENCHMARKS, name, ("measuring", "of what it sees"))
    monkeypatch.setenv("COLDFRAME_THROTTLE", "1MB/s")
    monkeypatch.setenv("COLDFRAME_RUN_DIR", "/run/here")
    assert main(["bench", name]) == 0
    assert seen["flag"] == "1MB/s"  # its own flags are still to be had by their twins
    assert "COLDFRAME_THROTTLE" not in seen
    assert seen["COLDFRAME_RUN_DIR"] == "/run/here"
    assert seen["term"] != signal.getsignal(signal.SIGTERM)
    assert os.environ["COLDFRAME_THROTTLE"] == "1MB/s"


def test_a_machine_is_told_with_its_disk_and_who_takes_part(tmp_path: Path) -> None:
    found = fingerprint(device="cpu", model=tmp_path, vllm_python=sys.executable, transformers=True)
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    )
    words = kind.stdout.strip()
    told = str(found["disk"]["filesystem"])
    assert words.startswith(told) or told.startswith(words[:3])
    assert found["disk"]["device"]
    assert found["memory"] > 1 << 28
    assert found["transformers"][0].isdigit()
    assert found["device"] == "cpu"
    assert "vllm" in found
    assert not {"gpu", "gpu_uuid"} & found.keys()
    assert json.loads(json.dumps(found)) == found
    assert document("rows", fingerprint=found, rows=[])["fingerprint"] == found
    assert document("rows", rows=[])["fingerprint"] == fingerprint()


def test_there_must_be_such_an_interpreter(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such interpreter"):
        fingerprint(vllm_python=tmp_path / "none")


def test_a_gpu_that_cannot_be_asked_is_told_so() -> None:
    found = fingerprint(device="cuda:977")
    assert (found["device"], found["gpu"]) == ("cuda:977", None)
    assert found["gpu_error"]


def test_which_gpu_it_is() -> None:
    found = gpu_identity(0, Emulator(devices=2))
    other = gpu_identity(1, Emulator(devices=2))
    assert (found["gpu"], other["gpu"], found["cuda"]) == (
        "Emulated GPU 0",
        "Emulated GPU 1",
        "13.0",
    )
    assert found["gpu_uuid"].startswith("GPU-")
    assert found["gpu_uuid"] != other["gpu_uuid"]
    assert "main(3, 1)" in entry(1)
