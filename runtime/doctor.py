"""`coldframe doctor`: what this machine can do, and what it lacks for the rest.

Each finding is what was tried, not what a version promises: memory is mapped, namespaces are taken,
a context is made on each GPU. What might take this process down is asked of another one. Nothing of
torch is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldframe.loader.cgroup import cpu_count, cpu_quota, memory_available, memory_limit
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.devices.report import ENTRY as GPUS
from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.runtime.device_choice import AUTO, choose_device
from coldframe.runtime.flags import Parser
from coldframe.runtime.side_process import ask
from coldframe.runtime.units import human_bytes
from coldframe.snapshot.check import ENTRY as SNAPSHOTS
from coldframe.snapshot.machine import cpu_here, torch_version
from coldframe.snapshot.reach import may_reach_others

__all__ = ["Finding", "add_arguments", "examine", "run"]

_SYS_IO_URING_SETUP = 425  # the same number on every architecture
_SOON_S = 10.0
_NEEDED = ("cpu", "memory", "torch")
"""What the CPU as a device takes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked into.

    Args:
        name: What.
        says: What there is, for people.
        facts: The same as JSON values.
        error: What is missing.
    """

    name: str
    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: ColdframeError | None = None

    def to_json(self) -> dict[str, Any]:
        error = None if self.error is None else self.error.to_wire()
        return {"ok": self.error is None, **self.facts, "error": error}


def add_arguments(parser: Parser) -> None:
    parser.flag("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command: 0 where the CPU can be used, whatever else there is."""
    findings = list(examine())
    works = all(f.error is None for f in findings if f.name in _NEEDED)
    if args.json:
        print(json.dumps({"ok": works, **{f.name: f.to_json() for f in findings}}))
    else:
        print(_table(findings))
    return 0 if works else 1


def examine(root: str | Path = "/") -> Iterator[Finding]:
    """Looks into everything, in the order of the table.

    Args:
        root: Where `/proc`, `/sys` and `/dev` are looked for.
    """
    looks: tuple[tuple[str, Callable[[Path], Finding]], ...] = (
        ("cpu", _cpu),
        ("memory", _memory),
        ("huge_pages", _huge_pages),
        ("io_uring", _io_uring),
        ("torch", _torch),
        ("compiler", _compiler),
        ("snapshots", _snapshots),
        ("gpus", _gpus),
        ("auto", _auto),
    )
    for name, look in looks:
        try:
            yield look(Path(root))
        except ColdframeError as error:
            yield Finding(name, "", {}, error)
        except OSError as error:
            what = "this cannot be looked into"
            broken = PlatformError(what, where=error.filename, got=error.strerror)
            yield Finding(name, "", {}, broken)


def _cpu(root: Path) -> Finding:
    vendor, features = cpu_here()
    uname, quota = os.uname(), cpu_quota(root)
    facts = {
        "arch": uname.machine,
        "vendor": vendor,
        "kernel": uname.release,
        "cores": len(os.sched_getaffinity(0)),
        "quota": quota,
        "threads": cpu_count(root),
        "features": list(features),
    }
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    says = (
        f"{uname.machine} ({vendor}), {facts['cores']} cores, {limit}: {facts['threads']} threads; "
        f"Linux {uname.release}"
    )
    return Finding("cpu", says, facts)


def _memory(root: Path) -> Finding:
    total, available = _meminfo(root, "MemTotal"), memory_available(root)
    limit, page = memory_limit(root), os.sysconf("SC_PAGE_SIZE")
    facts = {"total": total, "available": available, "limit": limit, "page_size": page}
    limited = "no limit" if limit is None else f"a limit of {human_bytes(limit)}"
    says = (
        f"{human_bytes(available)} of {human_bytes(total)} available, {limited}, "
        f"pages of {page // 1024} KiB"
    )
    return Finding("memory", says, facts, _cannot_share(page))


def _cannot_share(page: int) -> ColdframeError | None:
    """Why no memory can be shared by descriptor, which all arenas are."""
    try:
        fd = os.memfd_create("coldframe-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, page)
            with mmap.mmap(fd, page) as view:
                view[0] = 1
        finally:
            os.close(fd)
    except OSError as error:
        return PlatformError("memory cannot be shared", where="memfd", got=error.strerror)
    return None


def _huge_pages(root: Path) -> Finding:
    size, free = _meminfo(root, "Hugepagesize"), _meminfo(root, "HugePages_Free") // 1024
    got = allocate_huge("doctor", size)
    if got is None:
        raise PlatformError(
            "no huge pages can be had, so that loads fault in small ones",
            expected="reserved ones (vm.nr_hugepages), or CAP_SYS_ADMIN for a tmpfs with them",
            got=f"{free} reserved and free",
            hint="Loads into memory take longer; all else is the same.",
        )
    fd, way = got
    os.close(fd)
    facts = {"size": size, "free": free, "way": way}
    return Finding("huge_pages", f"of {human_bytes(size)}, by a {way}", facts)


def _io_uring(root: Path) -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    # With nothing to set up it is refused for that, where it is not refused as such.
    libc.syscall(_SYS_IO_URING_SETUP, 0, None)
    code = ctypes.get_errno()
    if code not in (errno.EFAULT, errno.EINVAL):
        raise PlatformError(
            "there is no io_uring",
            got=os.strerror(code),
            hint="Nothing of coldframe needs it; other loaders may.",
        )
    return Finding("io_uring", "can be used")


def _torch(root: Path) -> Finding:
    version = torch_version()
    return Finding("torch", version, {"version": version})


def _compiler(root: Path) -> Finding:
    """Of C++: what compiles decode steps, when an image is made."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise PlatformError(
            "there is no C++ compiler: decode steps stay eager",
            expected=name,
            hint="Install one (make system), or name one in CXX; nothing else needs it.",
        )
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_SOON_S
        )
        version = next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""
    except subprocess.TimeoutExpired:
        version = ""
    if not version:
        raise PlatformError(
            "the C++ compiler does not run: decode steps stay eager",
            where=path,
            hint="Install another one (make system), or name one in CXX; nothing else needs it.",
        )
    facts = {"path": path, "version": version}
    return Finding("compiler", f"decode steps can be compiled: {version}", facts)


def _snapshots(root: Path) -> Finding:
    found = ask(SNAPSHOTS, "snapshots")
    error = found.pop("error")
    if error is not None:
        return Finding("snapshots", "", found, ColdframeError.from_wire(error))
    way = "a user namespace" if found["namespaces"] == "user" else "root's rights"
    says = f"workers can be frozen and restored: CRIU {found['version']} with {way}"
    return Finding("snapshots", says, found)


def _gpus(root: Path) -> Finding:
    reaches = may_reach_others()
    found = ask(GPUS, "GPUs") | {"kernel_module": _kernel_module(root), "reaches_others": reaches}
    error = found.pop("error")
    broken = [gpu["error"] for gpu in found["gpus"] if gpu["error"] is not None]
    if error is None and len(broken) == len(found["gpus"]) > 0:
        error = broken[0]
    if error is not None:
        return Finding("gpus", "", found, ColdframeError.from_wire(error))
    calls = found["calls"]
    says = [
        f"{len(found['gpus'])}, a driver for CUDA {found['driver']} "
        f"(module {found['kernel_module'] or 'unknown'})",
        "contexts can leave a GPU that rests"
        if calls["checkpoint"]
        else f"contexts stay on a GPU that rests: {calls['checkpoint_why']}",
    ]
    if calls["checkpoint"] and not reaches:
        says.append("but not those of workers that run as another user: CAP_SYS_PTRACE is missing")
    says += map(_gpu, found["gpus"])
    return Finding("gpus", "\n".join(says), found)


def _gpu(gpu: Mapping[str, Any]) -> str:
    if gpu["error"] is not None:
        return f"{gpu['device']} {gpu['name']}: {ColdframeError.from_wire(gpu['error'])}"
    free, total = human_bytes(gpu["free"]), human_bytes(gpu["total"])
    return f"{gpu['device']} {gpu['name']}: {free} of {total} free, memory can be shared"


def _kernel_module(root: Path) -> str | None:
    """The version of the driver's part in the kernel."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return None if found is None else found[0]


def _auto(root: Path) -> Finding:
    choice = choose_device(AUTO, root=root)
    says = f"--device auto takes {choice.device}: {choice.why}"
    return Finding("auto", says, {"device": choice.device, "why": choice.why})


def _meminfo(root: Path, key: str) -> int:
    """A line of /proc/meminfo; kilobytes as bytes, and a plain number times 1024."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def _table(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        mark = "ok" if finding.error is None else "--"
        error = finding.error
        says = finding.says if error is None else f"{type(error).__name__}: {error}"
        first, *rest = says.splitlines() or [""]
        lines.append(f"{finding.name:<12}{mark:<4}{first}")
        lines += [f"{'':<16}{line}" for line in rest]
    return "\n".join(lines)
