"""Ctrl-C and SIGTERM: a benchmark ends through its stack, and with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["Terminated", "end", "guarded", "terminable", "unbroken"]

_KINDS = (signal.SIGINT, signal.SIGTERM)
_GRACE_S = 5.0
# It waits for the end of what it reads: that comes when nobody is left who could write.
_GUARD = 'read -r whom && ! read -r more && kill -s KILL -- "$whom"'


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends what Ctrl-C ends, in the same way. The exit status is 143."""


class _Handling:
    """The one signal that counts, and whether it has to wait."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.raised = False
        self.held = 0

    def take(self, number: int, _: FrameType | None) -> None:
        # Those that come later would break off what ends things in order.
        self.came = self.came or number
        self.break_off()

    def break_off(self) -> None:
        if self.came is None or self.raised or self.held:
            return
        self.raised = True
        raise Terminated if self.came == signal.SIGTERM else KeyboardInterrupt


_handling: _Handling | None = None


@contextmanager
def terminable() -> Iterator[None]:
    """Has the first of both signals end what is in the context, as an exception.

    Raises:
        KeyboardInterrupt: SIGINT came.
        Terminated: SIGTERM came.
    """
    global _handling
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handling = _Handling()
    outer, _handling = _handling, handling
    # Who was started in the background by a shell does not listen to Ctrl-C, and shall not.
    kinds = [kind for kind in _KINDS if signal.getsignal(kind) != signal.SIG_IGN]
    before = {kind: signal.signal(kind, handling.take) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        _handling = outer


@contextmanager
def unbroken() -> Iterator[None]:
    """Signals wait until it is over: who has just been started is not forgotten."""
    handling = _handling
    if handling is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handling.held += 1
    try:
        yield
    finally:
        handling.held -= 1
        handling.break_off()


@contextmanager
def guarded() -> Iterator[Callable[[int], None]]:
    """Somebody who ends a process where this one is killed before it could.

    Not by what the kernel has for that (PR_SET_PDEATHSIG): it would have to be asked for between
    fork and exec, on the clock.

    Returns:
        To be called with the process's id, or that of its group with a minus sign.
    """
    ours, theirs = os.pipe()
    guard: subprocess.Popen[bytes] | None = None
    try:
        with unbroken():
            guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD],
                stdin=ours,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us, not for it
            )
        yield lambda whom: _write(theirs, f"{whom}\n")
    finally:
        if guard is not None:
            guard.kill()  # before its pipe is closed: nothing is left to be ended
            guard.wait()
        os.close(ours)
        os.close(theirs)


def _write(fd: int, text: str) -> None:
    with suppress(BrokenPipeError):  # somebody has killed the guard
        os.write(fd, text.encode())


def end(process: subprocess.Popen[Any], *, group: bool, grace_s: float = _GRACE_S) -> None:
    """Ends a process in order where it listens to that, else at once.

    Args:
        process: It may have ended.
        group: Whether it has a group of its own, all of which is ended.
        grace_s: How long it may take, in seconds.
    """
    if process.poll() is None and grace_s > 0:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
    process.wait()
