"""What `coldframe doctor` says of this machine, and of GPUs that answer as ones would."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.runtime import doctor
from coldframe.runtime.doctor import Finding, examine
from coldframe.runtime.side_process import ask
from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

NAMES = ["cpu", "memory", "huge_pages", "io_uring", "torch", "compiler", "snapshots", "gpus"]
NAMES.append("auto")
GPU = {"device": "cuda:0", "name": "A GPU", "error": None, "free": 70 << 30, "total": 80 << 30}
LOST = {"error": "DeviceLost", "what": "it broke", "got": "CUDA_ERROR_ECC_UNCORRECTABLE"}


def with_gpus(
    patch: pytest.MonkeyPatch, *gpus: dict[str, Any], why_not: str | None = None
) -> Finding:
    """What is found where a driver has told of those."""
    calls = {"arenas": True, "checkpoint": why_not is None, "checkpoint_why": why_not}
    told = {"error": None, "driver": "13.0", "calls": calls}
    text = json.dumps({**told, "gpus": gpus})
    patch.setattr(doctor, "GPUS", f"import os; os.write(3, {text.encode()!r})")
    return next(finding for finding in examine() if finding.name == "gpus")


def test_all_of_it_is_said_twice() -> None:
    env = {**without_settings(), "CUDA_VISIBLE_DEVICES": ""}
    call = [COLDFRAME, "doctor"]
    table = subprocess.run(call, capture_output=True, text=True, timeout=60, env=env)
    done = subprocess.run([*call, "--json"], capture_output=True, text=True, timeout=60, env=env)
    assert (table.returncode, done.returncode) == (0, 0), table.stderr + done.stderr
    told = json.loads(done.stdout)
    assert list(told) == ["ok", *NAMES]
    lines = [line for line in table.stdout.splitlines() if not line.startswith(" ")]
    for name, line in zip(NAMES, lines, strict=True):
        found = told[name]
        assert line.split()[:2] == [name, "ok" if found["ok"] else "--"]
        # Who fails says why, and what to do.
        assert found["ok"] == (found["error"] is None)
        if not found["ok"]:
            assert f"{found['error']['error']}: {found['error']['what']}" in line
            assert found["error"]["hint"]
    assert told["ok"]
    assert told["memory"]["available"] <= told["memory"]["total"]
    assert told["gpus"]["error"]["error"] == "NoDevice"
    assert told["auto"]["device"] == "cpu"


def test_nothing_of_torch_is_imported() -> None:
    code = (
        "import sys; from coldframe.runtime.doctor import examine; "
        "found = list(examine()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("reaches", [True, False])
def test_gpus_that_can_be_used(monkeypatch: pytest.MonkeyPatch, reaches: bool) -> None:
    monkeypatch.setattr(doctor, "may_reach_others", lambda: reaches)
    broken = {**GPU, "device": "cuda:1", "error": LOST}
    found = with_gpus(monkeypatch, GPU, broken)
    assert found.error is None
    first, contexts, *others, one, other = found.says.splitlines()
    assert "CUDA 13.0" in first
    assert contexts == "contexts can leave a GPU that rests"
    assert ["CAP_SYS_PTRACE" in line for line in others] == ([] if reaches else [True])
    assert found.facts["reaches_others"] is reaches
    assert one.startswith("cuda:0 A GPU: 75.2 GB of 85.9 GB free")
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in other


def test_a_driver_that_cannot_checkpoint_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpus(monkeypatch, GPU, why_not="the driver has no cuCheckpointProcessLock")
    assert found.error is None
    assert "contexts stay on a GPU that rests: the driver has no cuCheckpointProcess" in found.says


def test_gpus_that_all_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpus(monkeypatch, {**GPU, "error": LOST})
    assert type(found.error).__name__ == "DeviceLost"


def test_a_driver_that_takes_its_process_down_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "GPUS", "import os; os.abort()")
    found = next(finding for finding in examine() if finding.name == "gpus")
    assert isinstance(found.error, PlatformError)
    assert found.error.got == "signal 6"


def test_without_what_the_cpu_takes_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise PlatformError("torch is not installed", hint="Run: pip install torch")

    monkeypatch.setattr(doctor, "torch_version", missing)
    monkeypatch.setattr(doctor, "GPUS", "import os; os._exit(0)")
    assert doctor.run(argparse.Namespace(json=False)) == 1
    assert "PlatformError: torch is not installed" in capsys.readouterr().out


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GPUS", "import os; os._exit(0)")
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert list(found) == NAMES
    error = found["memory"].error
    assert isinstance(error, PlatformError)
    assert str(tmp_path) in str(error.where)


# -- asking a process -----------------------------------------------------------------------------


def test_what_a_process_says() -> None:
    assert ask("import os; os.write(3, b'{\"a\": 1}')", "nothing") == {"a": 1}


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("import os; os._exit(3)", "exit status 3"),
        ("import os; os.write(3, b'{\"a\"'); os._exit(4)", "exit status 4"),
        ("import os; os.write(3, b'[1]'); os._exit(5)", "exit status 5"),
    ],
)
def test_one_that_says_nothing_of_use_is_an_error(code: str, got: str) -> None:
    with pytest.raises(PlatformError, match="looks into the test died") as raised:
        ask(code, "the test")
    assert raised.value.got == got


def test_one_that_hangs_is_ended(no_leaks: Path) -> None:
    with pytest.raises(PlatformError, match="hangs"):
        ask("import time; time.sleep(60)", "the test", 0.05)
