"""Measured rates that are kept from one plan to the next, and what makes them stale.

One file for each thing that was measured, named by a hash of all that it depends on: the machine,
the versions, our own sources, the model's shape, the length of the prompt. In it are the last few
measurements with their times; their medians are taken, since a machine is never quite idle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.whole_file import write_whole

__all__ = ["MOST_KEPT", "Kept", "calibration_directory"]

_VERSION = 1
MOST_KEPT = 5
_FRESH_S = 600.0
"""For so long nothing is measured again."""
_STALE_S = 86_400.0
_MOST_BYTES = 1 << 20


def calibration_directory() -> str:
    """Where this user's are: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "coldframe", "calibration")


@dataclass(frozen=True, slots=True)
class _Entry:
    at: float
    figures: Mapping[str, Any]


class Kept:
    """What is kept of one thing.

    Args:
        key: All that it depends on, as JSON values.
        directory: Where files are; by default `calibration_directory`.
    """

    def __init__(self, key: object, directory: str | None = None) -> None:
        text = json.dumps([_VERSION, key], sort_keys=True).encode()
        name = hashlib.sha256(text).hexdigest()[:32]
        self.path = os.path.join(directory or calibration_directory(), f"{name}.json")
        self._entries = self._read()

    @property
    def count(self) -> int:
        """How many measurements there are."""
        return len(self._entries)

    @property
    def age_s(self) -> float | None:
        """How long ago the newest was made."""
        return None if not self._entries else max(0.0, time.time() - self._entries[-1].at)

    @property
    def fresh(self) -> bool:
        """Whether there is one that need not be made again."""
        age = self.age_s
        return age is not None and age < _FRESH_S

    def forget(self) -> None:
        """Drops all, as where the machine is known to have changed."""
        self._entries = []

    def add(self, figures: Mapping[str, Any]) -> None:
        """Keeps another measurement: nested mappings of numbers and words, each time the same.

        Where the file cannot be written it is kept by this object alone.
        """
        if self._entries and _shape(self._entries[-1].figures) != _shape(figures):
            self._entries = []
        self._entries = [*self._entries, _Entry(time.time(), figures)][-MOST_KEPT:]
        document = [{"at": entry.at, "figures": entry.figures} for entry in self._entries]
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            write_whole(self.path, json.dumps(document).encode())

    def medians(self) -> Any:
        """The same figures, of each its median over what is kept; of words the newest.

        Raises:
            LookupError: There is none.
        """
        if not self._entries:
            raise LookupError("nothing is kept")
        return _median([entry.figures for entry in self._entries])

    def _read(self) -> list[_Entry]:
        """What of the file can be used; a file that is none of ours counts as none."""
        try:
            with open(self.path, encoding="utf-8") as file:
                found = json.loads(file.read(_MOST_BYTES))
            entries = [_Entry(float(item["at"]), dict(item["figures"])) for item in found]
        except (OSError, ValueError, TypeError, LookupError):
            return []
        now = time.time()
        entries = [entry for entry in entries if now - _STALE_S < entry.at <= now + 60]
        if len({json.dumps(_shape(entry.figures), sort_keys=True) for entry in entries}) > 1:
            return entries[-1:]
        return entries[-MOST_KEPT:]


def _shape(value: object) -> object:
    """The keys without what they are for."""
    return {k: _shape(v) for k, v in value.items()} if isinstance(value, Mapping) else None


def _median(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _median([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], str):
        return values[-1]
    return statistics.median(values)
