"""The first part: is there a GPU at all, and what is the machine that all figures belong to.

It runs in a process of its own like every part: whoever keeps a driver open makes the next start of
it faster, and a cold start is to be measured cold.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from coldframe.benchmarks.gpu.report import Report, Setting
from coldframe.benchmarks.harness import fingerprint
from coldframe.benchmarks.within import run_within
from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver

__all__ = ["FINGERPRINT", "hypervisor", "measure", "notes", "torch_cuda"]

FINGERPRINT = "fingerprint"

_PACKAGES = ("cuda-bindings", "safetensors", "transformers", "triton")
_ASKED = (
    "driver_version",
    "memory.total",
    "pcie.link.gen.max",
    "pcie.link.width.max",
    "persistence_mode",
    "clocks.max.sm",
    "clocks.max.memory",
)
_ASK_S = 20.0
_LETS_GO = ((12, 9, 1), (13, 0, 0))
"""The bindings that let Python's other threads run while they are in the driver, from these on."""


def measure(report: Report, setting: Setting) -> None:
    """Finds out what the machine is.

    Raises:
        NoDevice: It has no GPU that can be used.
    """
    driver = Driver.open()
    context = Context(driver, setting.ordinal)
    try:
        context.bind()
        free, total = driver.memory_info()
        gpu = {
            "gpu": driver.device_name(setting.ordinal),
            "gpus": driver.device_count(),
            "gpu_memory": total,
            "gpu_memory_free": free,
            "granularity": context.granularity,
        }
    finally:
        context.close()
    bindings, guest_of = _version("cuda-bindings"), hypervisor()
    report.keep(
        FINGERPRINT,
        {
            **fingerprint(),
            "hypervisor": guest_of,
            "notes": notes(bindings, guest_of),
            **gpu,
            "cuda": _cuda(driver),
            **_nvidia_smi(setting.ordinal),
            "torch_cuda": torch_cuda(),
            **{name: _version(name) for name in _PACKAGES},
            "memory": _memory_total(),
            "memory_available": memory_available(),
            "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        },
    )


def notes(bindings: str | None, guest_of: str | None) -> list[str]:
    """What whoever reads the figures has to know of the machine.

    Args:
        bindings: The version of cuda-bindings, if it is known.
        guest_of: What the machine runs on, if it is a virtual one.
    """
    found = []
    if bindings is None:
        found.append("nobody says of which version cuda-bindings is")
    elif not _lets_go(bindings):
        found.append(
            f"cuda-bindings {bindings} holds Python's global lock in every call of the driver: "
            "while a context is made or a copy is waited for no reader goes on; 12.9.1 and 13.0.0 "
            "do not"
        )
    if guest_of is not None:
        found.append(
            f"a virtual machine ({guest_of}), whose host may cache the disk: cold is the guest's "
            "page cache only"
        )
    return found


def _lets_go(bindings: str) -> bool:
    numbers = tuple(int(number) for number in re.findall(r"\d+", bindings)[:3])
    same = [since for since in _LETS_GO if since[0] == numbers[0]]
    return numbers >= (same[0] if same else _LETS_GO[-1])


def hypervisor() -> str | None:
    """What this machine is a guest of, or None where nothing says that it is virtual."""
    flags = [line for line in (_text("/proc/cpuinfo") or "").splitlines() if "flags" in line[:5]]
    if not any("hypervisor" in line.split() for line in flags):
        return None
    return _text("/sys/class/dmi/id/sys_vendor") or "unknown"


def _cuda(driver: Driver) -> str:
    """The CUDA version that the driver speaks."""
    number = driver.version()
    return f"{number // 1000}.{number % 1000 // 10}"


def torch_cuda() -> str | None:
    """What torch is built for, by its version file alone: its first import reads gigabytes."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    built: str | None = run_path(str(Path(found.origin).with_name("version.py"))).get("cuda")
    return built


def _nvidia_smi(ordinal: int) -> dict[str, str]:
    """What only the maker's tool tells; less where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"nvidia_smi": "there is none"}
    command = [tool, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "-i", str(ordinal)]
    try:
        done = run_within(command, _ASK_S)
    except subprocess.TimeoutExpired:
        return {"nvidia_smi": f"no answer within {_ASK_S:.0f} s"}
    if done.returncode:
        return {"nvidia_smi": (done.stdout + done.stderr).strip()}
    told = [word.strip() for word in done.stdout.strip().split(",")]
    return {
        name.replace(".", "_"): value for name, value in zip(_ASKED, told, strict=False) if value
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_total() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    return 0


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
