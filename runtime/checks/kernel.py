"""What the kernel lets this process do: tried where that costs nothing, else read from /proc."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

from coldframe.loader.errors import PlatformError
from coldframe.runtime.checks.finding import Case, Finding

__all__ = ["capabilities", "clock", "io_uring", "namespaces", "ptrace", "seccomp", "userfaultfd"]

_SYS_IO_URING_SETUP = 425  # the same number on every architecture
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_CAPABILITIES = {"SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24, "CHECKPOINT_RESTORE": 40}
"""capabilities(7)."""
_SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")
_TIME_ERROR = 5
_EARLIEST = 1_700_000_000
_PTRACE = (
    "any of one's own",
    "descendants, and those that allow it",
    "with CAP_SYS_PTRACE alone",
    "not at all",
)


def io_uring(case: Case) -> Finding:
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


def userfaultfd(case: Case) -> Finding:
    """What CRIU brings pages in late with; coldframe's restores do not."""
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise PlatformError(
            "whether there is userfaultfd is not known on this architecture",
            got=os.uname().machine,
            hint="Nothing of coldframe needs it.",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise PlatformError(
            "there is no userfaultfd",
            got=os.strerror(ctypes.get_errno()),
            hint="Nothing of coldframe needs it; lazy restores of CRIU's own would.",
        )
    os.close(fd)
    return Finding("userfaultfd", "can be used")


def namespaces(case: Case) -> Finding:
    """Whether user namespaces may be made: how workers are restored without root."""
    proc = case.root / "proc/sys"
    most = _number(proc / "user/max_user_namespaces")
    # Debian's own switch, and Ubuntu's.
    allowed = _number(proc / "kernel/unprivileged_userns_clone")
    restricted = _number(proc / "kernel/apparmor_restrict_unprivileged_userns")
    facts = {"max_user_namespaces": most, "unprivileged": allowed, "apparmor": restricted}
    root = os.geteuid() == 0
    forbidden = most == 0 or allowed == 0 or restricted == 1
    if forbidden and not root:
        raise PlatformError(
            "user namespaces may not be made, so that workers are restored by root alone",
            expected="user.max_user_namespaces above 0, kernel.unprivileged_userns_clone = 1, "
            "kernel.apparmor_restrict_unprivileged_userns = 0",
            got=", ".join(f"{key} {value}" for key, value in facts.items() if value is not None),
            hint="Set them with sysctl, or run as root with CAP_SYS_ADMIN.",
        )
    says = "not needed by root" if root else f"up to {most} user namespaces"
    return Finding("namespaces", says, facts)


def capabilities(case: Case) -> Finding:
    """Those that freezing and restoring take; without root a user namespace gives them."""
    text = _status(case.root, "CapEff")
    if text is None:
        raise PlatformError("this process's capabilities cannot be read", where="/proc/self/status")
    held = int(text, 16)
    facts = {name.lower(): bool(held >> bit & 1) for name, bit in _CAPABILITIES.items()}
    there = [f"CAP_{name}" for name in _CAPABILITIES if facts[name.lower()]]
    return Finding("capabilities", ", ".join(there) or "none of those that CRIU takes", facts)


def ptrace(case: Case) -> Finding:
    scope = _number(case.root / "proc/sys/kernel/yama/ptrace_scope")
    facts = {"scope": scope}
    if scope is None:
        return Finding("ptrace", "no Yama: whom it may trace goes by user", facts)
    says = f"ptrace_scope {scope}: {_PTRACE[min(scope, len(_PTRACE) - 1)]}"
    remedy = None
    if scope >= 2:
        remedy = "CRIU freezes by ptrace: sysctl kernel.yama.ptrace_scope=1 (3 lasts until a boot)."
    return Finding("ptrace", says, facts, remedy=remedy)


def seccomp(case: Case) -> Finding:
    mode = int(_status(case.root, "Seccomp") or 0)
    facts = {"mode": mode, "filters": int(_status(case.root, "Seccomp_filters") or 0)}
    if mode == 0:
        return Finding("seccomp", "no filter", facts)
    says = f"mode {mode}, {facts['filters']} filters: what they forbid shows in the other lines"
    return Finding("seccomp", says, facts)


def clock(case: Case) -> Finding:
    """That signatures made by it are believed, and that reading it costs nothing."""
    now = time.time()
    place = case.root / "sys/devices/system/clocksource/clocksource0/current_clocksource"
    try:
        source = place.read_text().strip()
    except OSError:
        source = "unknown"
    synchronised = _synchronised()
    facts = {"time": now, "source": source, "synchronised": synchronised}
    says = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)) + f", by {source}"
    says += {True: ", synchronised", False: ", not synchronised", None: ""}[synchronised]
    remedy = None
    if now < _EARLIEST:
        remedy = "Set the clock: S3 and TLS refuse one that is years off."
    elif synchronised is False:
        remedy = "Run an NTP client: S3 refuses what a clock has signed that is 15 minutes off."
    elif source in _SLOW_CLOCKS:
        remedy = f"{source} is slow to read: every span and deadline asks it. Boot with tsc."
    return Finding("clock", says, facts, remedy=remedy)


def _synchronised() -> bool | None:
    """What adjtimex(2) says of the clock; None where it may not be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(512))  # modes = 0: asks alone
    return None if state < 0 else state != _TIME_ERROR


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _status(root: Path, key: str) -> str | None:
    try:
        lines = (root / "proc/self/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:"))
    return next(found, None)
