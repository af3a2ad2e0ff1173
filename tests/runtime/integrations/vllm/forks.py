"""Processes that have vLLM imported already: forks of one that does nothing but import it.

Two thirds of an engine's start are imports, the same ones every time. What is forked has modules,
and neither an engine nor a thread of anybody's: what an engine sees of its start is that they come
at once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

_ROOT = Path(__file__).parents[4]
_MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
)
"""What engines of the tests import; what else there is they import themselves."""
_MOST = 1 << 17
"""Bytes that are said at once: an environment."""


class Forked:
    """A process that is not this one's child, as `subprocess.Popen` has one that is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """None while it runs; what its exit status was nobody knows."""
        return None if self._process.is_running() else -1

    def wait(self, timeout: float | None = None) -> None:
        try:
            self._process.wait(timeout)
        except psutil.TimeoutExpired as error:
            raise subprocess.TimeoutExpired("a fork", timeout or 0) from error

    def send_signal(self, number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Imported:
    """The process that has vLLM imported. It ends with this one.

    Args:
        environment: All variables of it; what is read by imports is read there.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=_ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    def fork(
        self, function: Callable[[int], object], fds: Sequence[int], environment: Mapping[str, str]
    ) -> Forked:
        """Has a function called in a fork.

        Args:
            function: Of a module's top level; it gets the first descriptor's number over there, and
                what it returns lives as long as the fork.
            fds: That one, and those of its standard output and error.
            environment: All variables of it.

        Raises:
            EOFError: The process is gone; its standard error has why.
        """
        where = (function.__module__, function.__qualname__)
        said = json.dumps({"where": where, "environment": environment}).encode()
        socket.send_fds(self._ours, [said], list(fds))
        if not (answer := self._ours.recv(_MOST)):
            raise EOFError(f"vLLM cannot be imported: {self._process.wait(20)}")
        return Forked(int(answer))

    def close(self) -> None:
        self._ours.close()
        self._process.wait(20)


# -- in the process itself -------------------------------------------------------------------------


def _main(number: int) -> None:
    connection = socket.socket(fileno=number)
    gc.disable()
    for module in _MODULES:
        importlib.import_module(module)
    gc.freeze()  # a collection would copy all of it into each fork
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    while True:
        said, fds, *_ = socket.recv_fds(connection, _MOST, 3)
        if not said:
            return
        if not (pid := os.fork()):
            connection.close()
            _become(json.loads(said), *fds)
        for fd in fds:
            os.close(fd)
        connection.send(str(pid).encode())


def _become(asked: Mapping[str, Any], number: int, output: int, errors: int) -> NoReturn:
    status = 1
    kept: list[object] = []
    try:
        os.setpgid(0, 0)  # what it starts is to end with it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for source, target in ((output, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        os.environ.clear()
        os.environ.update(asked["environment"])
        tempfile.tempdir = None  # what it was before
        module, name = asked["where"]
        kept.append(getattr(importlib.import_module(module), name)(number))
        status = 0
    except BaseException:  # noqa: BLE001 - told, and the end in any case
        traceback.print_exc()
    finally:
        os._exit(status)  # an engine's threads would keep it; what is kept is not taken down


if __name__ == "__main__":
    _main(int(sys.argv[1]))
    os._exit(0)  # what was imported has a lot to say of its end
