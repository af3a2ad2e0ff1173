"""Processes whose GPU fails them, on machines without one.

A child that is told to use a GPU says that it cannot, in the words of whoever tests, and one that
is told to use the CPU is the real one. What it is to use stands in the first message that it gets.
"""

from __future__ import annotations

import pytest

from coldframe.runtime.replica import launch
from coldframe.runtime.start import early

_BREAKING = """
import os, socket
from coldframe.loader import errors
from coldframe.loader.wire import Channel

control = socket.socket(fileno=os.dup(3))
if b'"cuda:' in control.recv(1 << 16, socket.MSG_PEEK):
    error = errors.{kind}("the GPU is of no use", where="cuSomething", got={name!r})
    if {word!r} == "listening":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.path.join(sys.argv[1], "memory.sock"))
        listener.listen()
    broken = {{"type": {word!r}, "error": error.to_wire(), "spans": []}}
    Channel.from_fd(3).send(broken)
    while control.recv(1 << 16):
        pass
    os._exit(1)
control.close()
{entry}
"""


def breaking_memory(kind: str, name: str) -> str:
    """The entry of a memory service that reports an error of a GPU's, and waits for its end.

    Args:
        kind: Of the error, one of ours.
        name: What the driver calls it.
    """
    return _code(early._MAIN, "failed", kind, name)


def break_memory(patch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    patch.setattr(early, "_MAIN", breaking_memory(kind, name))


def break_workers(patch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """Workers that do the same. Their memory service only listens."""
    patch.setattr(launch, "_WORKER", _code(launch._WORKER, "broken", kind, name))
    silent = _code(early._MAIN, "listening", kind, name)
    patch.setattr(early, "_MAIN", silent)


def _code(entry: str, word: str, kind: str, name: str) -> str:
    return f"exec({_BREAKING.format(entry=entry, word=word, kind=kind, name=name)!r})"
