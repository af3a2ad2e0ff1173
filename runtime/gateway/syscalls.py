"""A process that computes and answers on the sockets that it has, and can do nothing else.

Resource limits keep a process from opening and forking; they do not keep it from signalling or
tracing others of its user, or from running a program. A seccomp filter does: every system call but
those on the list fails with EPERM (https://docs.kernel.org/userspace-api/seccomp_filter.html).
"""

from __future__ import annotations

import os
import struct

__all__ = ["compute_only"]

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What the interpreter, its allocator and a socket need, by their numbers on each architecture.
_ALLOWED = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "close": 3,
        "poll": 7,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "sched_yield": 24,
        "mremap": 25,
        "madvise": 28,
        "getpid": 39,
        "sendto": 44,
        "recvfrom": 45,
        "sendmsg": 46,
        "recvmsg": 47,
        "exit": 60,
        "gettimeofday": 96,
        "gettid": 186,
        "futex": 202,
        "restart_syscall": 219,
        "clock_gettime": 228,
        "exit_group": 231,
        "getrandom": 318,
    },
    "aarch64": {
        "close": 57,
        "read": 63,
        "write": 64,
        "ppoll": 73,
        "exit": 93,
        "exit_group": 94,
        "futex": 98,
        "clock_gettime": 113,
        "sched_yield": 124,
        "restart_syscall": 128,
        "rt_sigaction": 134,
        "rt_sigprocmask": 135,
        "rt_sigreturn": 139,
        "gettimeofday": 169,
        "getpid": 172,
        "gettid": 178,
        "sendto": 206,
        "recvfrom": 207,
        "sendmsg": 211,
        "recvmsg": 212,
        "brk": 214,
        "munmap": 215,
        "mremap": 216,
        "mmap": 222,
        "mprotect": 226,
        "madvise": 233,
        "getrandom": 278,
    },
}

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000
_EPERM = 1
# Classic BPF: load a word of the call's description, compare and skip, end.
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARCH_AT = 0, 4


def compute_only() -> bool:
    """Leaves this process the system calls on the list, for good.

    It must have no_new_privs set, or be privileged. What is missing for it later (a page of a
    library that must be found first, say) is not there any more.

    Returns:
        Whether it is so; not on an architecture that the list has not, or where the kernel has no
        seccomp. Resource limits are all there is then.
    """
    import ctypes

    machine = os.uname().machine
    # A 32-bit interpreter has other numbers than its kernel.
    if machine not in _ALLOWED or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    program = _program(_AUDIT_ARCH[machine], sorted(_ALLOWED[machine].values()))
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    filter_ = Program(len(program) // 8, ctypes.addressof(code))
    prctl = ctypes.CDLL(None).prctl
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    return bool(prctl(_PR_SET_SECCOMP, mode, ctypes.byref(filter_), 0, 0) == 0)


def _program(arch: int, numbers: list[int]) -> bytes:
    """The filter: refuse another architecture's calls, allow these, refuse the rest."""
    refuse = (_RETURN, 0, 0, _RET_ERRNO | _EPERM)
    steps = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, arch),
        refuse,
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in numbers:
        steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _RET_ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, refuse])
