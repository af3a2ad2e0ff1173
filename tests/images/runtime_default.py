"""A command under the seccomp profile `RuntimeDefault`, as CRI-O and Podman have it.

The profile is Debian's copy of theirs, which comes with buildah; libseccomp makes a filter of it.

    runtime_default.py CAP_A,CAP_B COMMAND...

Capabilities are those that the container will have: the profile goes by them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

PROFILE = Path("/usr/share/containers/seccomp.json")
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS = 3  # an attribute of libseccomp's filters, which is on by default
_COMPARISONS = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class _Argument(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def chosen(profile: dict[str, Any], capabilities: set[str]) -> list[dict[str, Any]]:
    """The entries of a profile that count for a container."""
    here = _ARCHITECTURES[os.uname().machine]

    def counts(entry: dict[str, Any]) -> bool:
        wanted, unwanted = entry.get("includes") or {}, entry.get("excludes") or {}
        return (
            set(wanted.get("caps", ())) <= capabilities
            and here in wanted.get("arches", (here,))
            and not set(unwanted.get("caps", ())) & capabilities
            and here not in unwanted.get("arches", ())
        )

    return [entry for entry in profile["syscalls"] if counts(entry)]


def confine(capabilities: set[str]) -> None:
    """Puts this process, and all that it becomes, under the profile."""
    profile = json.loads(PROFILE.read_text())
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    made = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    assert made.value
    assert library.seccomp_attr_set(made, _NO_NEW_PRIVS, ctypes.c_uint32(0)) == 0
    for entry in chosen(profile, capabilities):
        action = _action(entry["action"], entry.get("errnoRet"))
        arguments = [
            _Argument(given["index"], _COMPARISONS[given["op"]], given["value"], given["valueTwo"])
            for given in entry.get("args") or ()
        ]
        for name in entry["names"] if action != default else ():
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:  # there are others on other machines
                array = (_Argument * len(arguments))(*arguments)
                status = library.seccomp_rule_add_array(
                    made, ctypes.c_uint32(action), number, len(arguments), array
                )
                assert status == 0, (name, status)
    assert library.seccomp_load(made) == 0


def _action(name: str, errno: int | None) -> int:
    return {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO | (errno or 1)}[name]


if __name__ == "__main__":
    confine(set(sys.argv[1].split(",")))
    os.execvp(sys.argv[2], sys.argv[2:])
