from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coldframe.runtime.gateway.syscalls import compute_only
from tests.support import unavailable

_SHUT_IN = """
import ctypes, errno, os, signal, socket, sys, time
from coldframe.runtime.gateway.syscalls import compute_only

ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # no_new_privs, which the kernel asks for
if not compute_only():
    print("no seccomp")
    raise SystemExit
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *args):
    return OSError(ctypes.get_errno(), name) if getattr(libc, name)(*args) < 0 else None

tries = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "socket": lambda: socket.socket(),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "setuid": lambda: os.setuid(1),
    "rename": lambda: os.rename("/tmp/a", "/tmp/b"),
    "dup": lambda: os.dup(0),
}
for name, trial in tries.items():
    try:
        trial()
        print(name, "went through")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
ctypes.set_errno(0)
print("ptrace", libc.ptrace(16, os.getppid(), 0, 0), errno.errorcode[ctypes.get_errno()])
big = bytearray(64 << 20)
print(len(big), time.time() > 0, len(os.urandom(4)), sum(range(10)))
sys.stdout.flush()
os._exit(0)
"""


def test_what_is_not_on_the_list_is_refused_and_the_rest_goes_on() -> None:
    if os.uname().machine not in ("x86_64", "aarch64"):
        unavailable("the list has no numbers for this architecture")
    done = subprocess.run(
        [sys.executable, "-c", _SHUT_IN], capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    if lines == ["no seccomp"]:
        unavailable("this kernel has no seccomp filters")
    assert done.stderr == ""
    *tries, ptrace, last = lines
    names = ["open", "socket", "fork", "exec", "kill", "setuid", "rename", "dup"]
    assert tries == [f"{name} EPERM" for name in names]
    assert ptrace == "ptrace -1 EPERM"
    assert last == f"{64 << 20} True 4 45"


def test_an_architecture_that_is_not_on_the_list_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.uname()
    other = os.uname_result((*real[:4], "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert compute_only() is False
