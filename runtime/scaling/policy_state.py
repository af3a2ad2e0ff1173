"""What policies have learned, in a file: it outlives the process, and the container with it.

    {"version": 1, "saved_at": seconds since 1970, "models": {name: what its policy knows},
     "others": {name: [saved_at, what its policy knew]}}

It is written now and then, and at the end, whole or not at all, by a thread: nobody but the end of
the process waits until it is on a disk. Several replicas may have one file on a volume that they
share: what it says of models that this one does not serve stays in it, and of those that several
serve the last word counts. A file that cannot be used is a warning, and is put aside as FILE.bad:
models go on as if nothing had been learned.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.whole_file import write_whole
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.scaling.late_writer import LateWriter
from coldframe.runtime.scaling.unasked import Unasked

__all__ = ["PolicyState"]

_VERSION = 1
_OFTEN_S = 30.0
"""How often it is written, in seconds."""
_LAST_S = 5.0
"""How long the end of a process waits for a disk, or a mount that does not answer."""
_MOST_BYTES = 64 << 20
_MOST_AWAY_S = 30 * 86400.0
"""What is older says nothing any more."""
_UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)

_Known = dict[str, tuple[float, Any]]
"""By model: when it was saved, and what."""


@dataclass(frozen=True, slots=True)
class _Learned:
    """What is to be written: when it was learned, of which models, and as JSON."""

    saved_at: float
    names: frozenset[str]
    states: str


class PolicyState:
    """The file of all models' policies.

    Args:
        path: Where it is.
        log: Gets why it cannot be used.
        clock: Seconds since 1970.
    """

    def __init__(self, path: str, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._log = log
        self._clock = clock
        self._saved_at = clock()
        self._complained = False
        self._others: _Known = {}
        """Of models that are not served here; the writer's, once there is something to write."""
        self._writer = LateWriter(self._write, self._failed, "policy-state")

    def restore(self, models: Mapping[str, Unasked]) -> None:
        """Has policies go on from what is there, and tries whether it can be written.

        Args:
            models: By the names that clients call them by.
        """
        refused, known = False, {}
        try:
            known = self._read()
        except FileNotFoundError:
            pass
        except _UNUSABLE as error:
            refused = True
            self._warn(repr(error))
        for name, unasked in models.items():
            if name not in known:
                continue
            saved_at, state = known[name]
            away_s = max(0.0, self._clock() - saved_at)
            try:
                if away_s > _MOST_AWAY_S:
                    raise ValueError(f"it is {away_s / 86400:.0f} days old")
                unasked.policy.restore(state, unasked.arrivals(), away_s)
            except (*_UNUSABLE, OverflowError) as error:
                refused = True
                self._warn(f"{name}: {error!r}")
        self._others = {name: found for name, found in known.items() if name not in models}
        if refused:
            self._put_aside()
        self.save(models.items())

    def step(self, models: Iterable[tuple[str, Unasked]]) -> None:
        """Has it written where it is time."""
        if self._clock() - self._saved_at >= _OFTEN_S:
            self.save(models)

    def save(self, models: Iterable[tuple[str, Unasked]]) -> None:
        """Has it written, behind whatever else there is to do here."""
        self._saved_at = self._clock()
        states = {name: unasked.policy.saved(unasked.arrivals()) for name, unasked in models}
        # As a text already: policies go on learning.
        self._writer.give(_Learned(self._saved_at, frozenset(states), json.dumps(states)))

    def close(self) -> None:
        """Waits until all that was saved is written; but not for ever."""
        if not self.flush(_LAST_S):
            self._warn(f"it was not written within {_LAST_S:g} s")

    def flush(self, seconds: float) -> bool:
        """Waits until it is written: whether it is, within so many seconds."""
        return self._writer.wait(seconds)

    def _write(self, learned: _Learned) -> None:
        """Writes it; in the writer's thread."""
        with suppress(*_UNUSABLE):  # which another one has written, and it is replaced
            self._others |= self._read()
        self._others = {
            name: (saved_at, state)
            for name, (saved_at, state) in self._others.items()
            if name not in learned.names and learned.saved_at - saved_at <= _MOST_AWAY_S
        }
        document = (
            f'{{"version": {_VERSION}, "saved_at": {json.dumps(learned.saved_at)}, '
            f'"models": {learned.states}, "others": {json.dumps(self._others)}}}'
        )
        write_whole(self._path, document.encode())
        self._complained = False

    def _failed(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            self._warn(f"it cannot be written: {error}")

    def _read(self) -> _Known:
        """What the file says of all models.

        Raises:
            OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError: It is none.
        """
        # A pipe would have this process wait for whoever writes to it.
        fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("this is no file")
            found = json.loads(file.read(_MOST_BYTES))
        if found["version"] != _VERSION:
            raise ValueError(f"its version is {found['version']!r}")
        known, latest = {}, _moment(found["saved_at"])
        for name, (saved_at, state) in found.get("others", {}).items():
            known[str(name)] = (_moment(saved_at), state)
        for name, state in found["models"].items():
            known[str(name)] = (latest, state)
        return known

    def _put_aside(self) -> None:
        """What could not be used is not lost by writing over it."""
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(self._path).st_mode):
                os.replace(self._path, f"{self._path}.bad")

    def _warn(self, why: str) -> None:
        self._log.warning("policy state", path=self._path, why=why)


def _moment(value: Any) -> float:
    moment = float(value)
    if not math.isfinite(moment):
        raise ValueError("this is no time")
    return moment
