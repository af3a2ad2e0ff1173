"""What policies have learned, in a file: it outlives the process, and the container with it.

    {"version": 1, "saved_at": seconds since 1970, "models": {name: what its policy knows}}

It is written now and then, and at the end, whole or not at all. A file that cannot be used is a
warning: models go on as if nothing had been learned.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.unasked import Unasked

__all__ = ["PolicyState"]

_VERSION = 1
_OFTEN_S = 30.0
"""How often it is written, in seconds."""
_MOST_BYTES = 64 << 20
_MOST_AWAY_S = 30 * 86400.0
"""What is older says nothing any more."""


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

    def restore(self, models: Mapping[str, Unasked]) -> None:
        """Has policies go on from what is there.

        Args:
            models: By the names that clients call them by.
        """
        try:
            with open(self._path, "rb") as file:
                found = json.loads(file.read(_MOST_BYTES))
            if found["version"] != _VERSION:
                raise ValueError(f"its version is {found['version']!r}")
            away_s = max(0.0, self._clock() - float(found["saved_at"]))
            states = dict(found["models"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._warn(repr(error))
            return
        if away_s > _MOST_AWAY_S:
            self._warn(f"it is {away_s / 86400:.0f} days old")
            return
        for name, unasked in models.items():
            if name not in states:
                continue
            try:
                unasked.policy.restore(states[name], unasked.clock(), away_s)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                self._warn(f"{name}: {error!r}")

    def step(self, models: Iterable[tuple[str, Unasked]]) -> None:
        """Writes it where it is time."""
        if self._clock() - self._saved_at >= _OFTEN_S:
            self.save(models)

    def save(self, models: Iterable[tuple[str, Unasked]]) -> None:
        """Writes it."""
        self._saved_at = self._clock()
        states = {name: unasked.policy.saved(unasked.clock()) for name, unasked in models}
        document = {"version": _VERSION, "saved_at": self._saved_at, "models": states}
        fresh = f"{self._path}.{os.getpid()}"
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(document, file)
            os.replace(fresh, self._path)
            self._complained = False
        except OSError as error:
            with suppress(OSError):
                os.unlink(fresh)
            if not self._complained:
                self._complained = True
                self._warn(f"it cannot be written: {error}")

    def _warn(self, why: str) -> None:
        self._log.warning("policy state", path=self._path, why=why)
