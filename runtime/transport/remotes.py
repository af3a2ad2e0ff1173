"""The decode workers on other hosts that a replica is to have: connected, lost, tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import Recorder, now

__all__ = ["ENGINE", "ROLE", "Remotes"]

ROLE = "remote"
ENGINE = "remote"
"""What the router calls their engine: their KV is their own."""
_AGAIN_S = 0.5
_MOST_S = 10.0


class Employer(Protocol):
    """Who has the workers."""

    def start_remote(self, address: str) -> str:
        """Starts the process that stands for a decode worker elsewhere: its name.

        Raises:
            ColdframeError: It cannot be started.
        """
        ...


@dataclass(slots=True)
class _Place:
    address: str
    name: str | None = None
    """Of the process that stands for it, where there is one."""
    not_before: float = 0.0
    again_s: float = _AGAIN_S
    was_up: bool = False


class Remotes:
    """One replica's.

    Args:
        employer: Has the processes.
        addresses: `HOST:PORT` of each.
        recorder: Gets a span where one was lost.
        warn: Told when one is lost, and why.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        employer: Employer,
        addresses: Sequence[str],
        recorder: Recorder,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._employer = employer
        self._recorder = recorder
        self._warn = warn
        self._clock = clock
        self._places = [_Place(address) for address in addresses]

    def step(self) -> None:
        """Connects to those that are due; to be called about once a second."""
        for place in self._places:
            if place.name is None and self._clock() >= place.not_before:
                try:
                    place.name = self._employer.start_remote(place.address)
                except ColdframeError as error:
                    self._lost(place, str(error))

    def is_up(self, name: str) -> None:
        """One is connected, and takes requests."""
        for place in self._places:
            if place.name == name:
                place.was_up, place.again_s = True, _AGAIN_S

    def died(self, name: str, why: str) -> None:
        """A process is gone: the connection is made anew, ever later."""
        for place in self._places:
            if place.name == name:
                self._lost(place, why)

    def _lost(self, place: _Place, why: str) -> None:
        if place.was_up or place.again_s == _AGAIN_S:  # told once of each loss
            self._warn(f"no decode worker at {place.address}: {why}")
            self._recorder.add("remote_lost", now(), note=f"{place.address}: {why}")
        place.name, place.was_up = None, False
        place.not_before = self._clock() + place.again_s
        place.again_s = min(2 * place.again_s, _MOST_S)
