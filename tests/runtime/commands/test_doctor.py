"""What `coldframe doctor` says of this machine, and of GPUs that answer as ones would."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.checks import devices
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.checks.machine import model_memory
from coldframe.runtime.commands import doctor
from coldframe.runtime.commands.doctor import examine
from coldframe.runtime.machine.side_process import ask
from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

NAMES = [
    *("cpu", "memory", "shm", "huge_pages", "io_uring", "userfaultfd", "namespaces"),
    *("capabilities", "ptrace", "seccomp", "clock", "versions", "torch", "compiler", "snapshots"),
    *("gpus", "host_to_device", "auto", "store_disk", "cache_disk", "port", "s3_credentials"),
    *("hub_token", "peer_token", "api_keys"),
]
GPU = {"device": "cuda:0", "name": "A GPU", "error": None, "free": 70 << 30, "total": 80 << 30}
LOST = {"error": "DeviceLost", "what": "it broke", "got": "CUDA_ERROR_ECC_UNCORRECTABLE"}
NO_GPUS = "import os; os._exit(0)"


def with_gpus(
    patch: pytest.MonkeyPatch, *gpus: dict[str, Any], why_not: str | None = None
) -> Finding:
    """What is found where a driver has told of those."""
    calls = {"arenas": True, "checkpoint": why_not is None, "checkpoint_why": why_not}
    told = {"error": None, "driver": "13.0", "calls": calls}
    text = json.dumps({**told, "gpus": gpus})
    patch.setattr(devices, "GPUS", f"import os; os.write(3, {text.encode()!r})")
    return devices.gpus(Case())


def arguments(store: Path, **more: object) -> argparse.Namespace:
    """The command's, for a store that is nobody's."""
    fixed = {
        "model": None,
        "host": None,
        "port": None,
        "cache": None,
        "json": False,
        "device": "auto",
    }
    return argparse.Namespace(**{**fixed, "snapshot_store": str(store), **more})


def test_all_of_it_is_said_twice(tmp_path: Path, demo_model: Any) -> None:
    env = {**without_settings(), "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path)}
    call = [COLDFRAME, "doctor", "--cache", str(tmp_path / "weights")]
    table = subprocess.run(call, capture_output=True, text=True, timeout=60, env=env)
    call += [str(demo_model()), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env=env)
    assert (table.returncode, done.returncode) == (0, 0), table.stderr + done.stderr
    told = json.loads(done.stdout)
    assert list(told) == ["ok", "checks"]
    assert told["ok"]
    checks = {check["name"]: check for check in told["checks"]}
    assert list(checks) == [*NAMES, "model", "model_disk", "source_link"]
    lines = [line for line in table.stdout.splitlines() if not line.startswith(" ")]
    for name, line in zip(NAMES, lines, strict=True):
        found = checks[name]
        assert list(found) == ["name", "status", "says", "remedy", "facts"]
        assert line.split()[:2] == [name, found["status"]]
        # Who is not well says why, and what to do.
        assert found["says"]
        assert (found["status"] == "ok") == (found["remedy"] is None)
    facts = {name: check["facts"] for name, check in checks.items()}
    assert facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["gpus"]["error"]["error"] == "NoDevice"
    assert facts["auto"]["device"] == "cpu"
    assert facts["model_disk"]["read_bytes_per_s"] > 0
    assert facts["cache_disk"]["write_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []  # of what was written there nothing is left


def test_nothing_of_torch_is_imported() -> None:
    code = (
        "import sys; from coldframe.runtime.commands.doctor import Case, examine; "
        "found = list(examine(Case(store='/tmp'))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("reaches", [True, False])
def test_gpus_that_can_be_used(monkeypatch: pytest.MonkeyPatch, reaches: bool) -> None:
    monkeypatch.setattr(devices, "may_reach_others", lambda: reaches)
    broken = {**GPU, "device": "cuda:1", "error": LOST}
    found = with_gpus(monkeypatch, GPU, broken)
    assert found.error is None
    assert (found.status, "CUDA_VISIBLE_DEVICES" in str(found.remedy)) == ("warning", True)
    first, contexts, *others, one, other = found.says.splitlines()
    assert "CUDA 13.0" in first
    assert contexts == "contexts can leave a GPU that rests"
    assert ["CAP_SYS_PTRACE" in line for line in others] == ([] if reaches else [True])
    assert found.facts["reaches_others"] is reaches
    assert one.startswith("cuda:0 A GPU: 75.2 GB of 85.9 GB free")
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in other


def test_a_driver_that_cannot_checkpoint_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpus(monkeypatch, GPU, why_not="the driver has no cuCheckpointProcessLock")
    assert found.status == "ok"
    assert "contexts stay on a GPU that rests: the driver has no cuCheckpointProcess" in found.says


def test_gpus_that_all_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpus(monkeypatch, {**GPU, "error": LOST})
    assert type(found.error).__name__ == "DeviceLost"


def test_a_driver_that_takes_its_process_down_harms_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "GPUS", "import os; os.abort()")
    case = Case(store=str(tmp_path))
    found = next(finding for finding in examine(case) if finding.name == "gpus")
    assert isinstance(found.error, PlatformError)
    assert found.error.got == "signal 6"


def test_without_what_the_cpu_takes_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing() -> str:
        raise PlatformError("torch is not installed", hint="Run: pip install torch")

    monkeypatch.setattr("coldframe.runtime.checks.software.torch_version", missing)
    monkeypatch.setattr(devices, "GPUS", NO_GPUS)
    assert doctor.run(arguments(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "torch          fail     PlatformError: torch is not installed" in said
    assert "-> Run: pip install torch" in said


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GPUS", NO_GPUS)
    case = Case(root=tmp_path, store=str(tmp_path))
    found = {finding.name: finding for finding in examine(case)}
    assert list(found) == NAMES
    error = found["memory"].error
    assert isinstance(error, PlatformError)
    assert found["memory"].status == "fail"
    assert str(tmp_path) in str(error.where)


def test_a_model_that_is_not_there_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "GPUS", NO_GPUS)
    asked = arguments(tmp_path, model=str(tmp_path / "nowhere"), json=True)
    assert doctor.run(asked) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["model"]["status"] == "fail"
    assert checks["model"]["facts"]["error"]["error"] == "SourceNotFound"


def test_a_model_is_judged_by_its_device(
    tmp_path: Path,
    demo_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with little memory of its own, and a GPU with much."""
    host = tmp_path / "host"
    (host / "proc").mkdir(parents=True)
    (host / "proc/meminfo").write_text("MemTotal: 200000 kB\nMemAvailable: 100000 kB\n")
    told = {"error": None, "driver": "13.0", "gpus": [GPU]}
    says = f"import os; os.write(3, {json.dumps(told).encode()!r})"
    monkeypatch.setattr("coldframe.runtime.planning.target.ENTRY", says)

    def found(device: str) -> Finding:
        return model_memory(Case(root=host, model=str(demo_model()), device=device))

    assert (found("cpu").status, found("auto").status) == ("fail", "fail")
    on_gpu = found("cuda")
    assert (on_gpu.status, on_gpu.facts["device"]) == ("ok", "cuda:0")
    assert on_gpu.facts["available"] == GPU["free"]
    # Where a GPU is seen it would be taken.
    (host / "dev").mkdir()
    for name in ("nvidiactl", "nvidia0"):
        (host / "dev" / name).touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("coldframe.runtime.machine.device_choice._why_none", lambda *_: None)
    assert found("auto").facts["device"] == "cuda:0"
    told["gpus"] = [{**GPU, "free": 1 << 20}]
    says = f"import os; os.write(3, {json.dumps(told).encode()!r})"
    monkeypatch.setattr("coldframe.runtime.planning.target.ENTRY", says)
    full = found("cuda:0")
    assert (full.status, "cuda:0" in str(full.error)) == ("fail", True)


def test_a_device_that_is_not_there_fails(
    tmp_path: Path,
    demo_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    named = arguments(tmp_path, model=str(demo_model()), device="cuda", json=True)
    assert doctor.run(named) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["model"]["facts"]["error"]["error"] == "NoDevice"
    with pytest.raises(RequestError, match="no such device"):
        doctor.run(arguments(tmp_path, device="tpu"))


def test_a_port_is_a_number_or_what_kubernetes_sets(tmp_path: Path) -> None:
    for text in ("http", "65536", "-1"):
        with pytest.raises(RequestError, match="no such port"):
            doctor.run(arguments(tmp_path, port=text))
    assert doctor._port("tcp://10.0.0.1:80") is None


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
