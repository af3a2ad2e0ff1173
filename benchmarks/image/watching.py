"""A command, and the files that it and all that it starts open, in the order of the first opening.

A process of its own, since it becomes the parent of whoever loses theirs: so each process that the
command has started is known by its ancestors, however they end. What others on the machine open is
left out.

    python -m coldframe.benchmarks.image.watching OUT PLACE,... COMMAND...

writes `{"opened": [[path, at_ns], ...], "unknown": openings by processes that were gone before it
was looked whose they are, "overflown": bool}` to OUT, and ends as the command does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from coldframe.benchmarks.image.fanotify import Watch
from coldframe.snapshot.linux import adopting_orphans

__all__ = ["Openings", "main", "parent_of"]

_LOOK_S = 0.02


def parent_of(pid: int) -> int | None:
    """A process's parent; None where it is gone."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(said.rpartition(")")[2].split()[1])


class Openings:
    """Files by the first time that a process of a tree has opened them.

    Args:
        root: The process that all others descend from; it is none of them itself.
        parent: Tells a process's parent, or that it is gone.
    """

    def __init__(self, root: int, parent: Callable[[int], int | None] = parent_of) -> None:
        self.first_ns: dict[str, int] = {}
        self.unknown = 0
        self._root = root
        self._parent = parent
        self._ours: dict[int, bool] = {root: False, 0: False, 1: False}

    def add(self, path: str, pid: int, at_ns: int) -> None:
        """Takes note of one opening."""
        ours = self._is_ours(pid)
        if ours is None:
            self.unknown += 1
        elif ours:
            self.first_ns.setdefault(path, at_ns)

    def _is_ours(self, pid: int) -> bool | None:
        # A number may become another process's, but hardly in the seconds of a start.
        if pid in self._ours:
            return self._ours[pid]
        parent = self._parent(pid)
        if parent is None:
            return None
        ours = parent == self._root or self._is_ours(parent)
        if ours is not None:
            self._ours[pid] = ours
        return ours


def main(arguments: Sequence[str]) -> int:
    """The process: watches a command until it ends.

    Args:
        arguments: Where to write, what to watch, and the command.

    Returns:
        The command's exit status.

    Raises:
        PlatformError: Files cannot be watched here.
    """
    out, places, command = arguments[0], arguments[1].split(","), list(arguments[2:])
    with Watch(places) as watch, adopting_orphans():
        child = os.posix_spawnp(command[0], command, os.environ)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(child, number))
        openings, status = Openings(os.getpid()), None
        while status is None:
            select.select([watch.fd], [], [], _LOOK_S)
            for path, pid, at_ns in watch.opened():
                openings.add(path, pid, at_ns)
            # Only now: until it is waited for, a process that has ended has its parent's name.
            status = _reaped(child)
        found = {
            "opened": list(openings.first_ns.items()),
            "unknown": openings.unknown,
            "overflown": watch.overflown,
        }
    Path(out).write_text(json.dumps(found))
    return status


def _reaped(child: int) -> int | None:
    """Waits for all that have ended: the exit status of the command, if it is among them."""
    status = None
    while True:
        try:
            pid, said = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(said)
            status = code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
