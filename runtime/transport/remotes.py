"""The decode workers on other hosts that a replica is to have: connected, lost, tried again.

Some are named once and for all. Others are listed somewhere (`lookups`): there are as many as are
listed at the moment. One that is not listed any more gets no more requests, and is let go when it
has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.replica.scale_spec import MOST_WORKERS

if TYPE_CHECKING:
    from coldframe.runtime.transport.lookups import Lookups

__all__ = ["ENGINE", "ROLE", "Remotes"]

ROLE = "remote"
ENGINE = "remote"
"""What the router calls their engine: their KV is their own."""
_AGAIN_S = 0.5
_MOST_S = 10.0
_ENDED = "it was told to end"


class Employer(Protocol):
    """Who has the workers."""

    def start_remote(self, address: str) -> str:
        """Starts the process that stands for a decode worker elsewhere: its name.

        Raises:
            ColdframeError: It cannot be started.
        """
        ...

    def end_remote(self, name: str) -> None:
        """Ends such a process, which has nothing to do; `Remotes.died` follows."""
        ...


class Requests(Protocol):
    """Who knows what each worker has to do; the router."""

    def retire(self, worker: str) -> None: ...

    def retain(self, worker: str) -> None: ...

    def is_free(self, worker: str) -> bool: ...


@dataclass(slots=True)
class _Place:
    address: str
    listed: bool = True
    name: str | None = None
    """Of the process that stands for it, where there is one."""
    retired: bool = False
    """Whether that gets no more requests, since it is not listed."""
    leaving: bool = False
    """Whether the worker has said itself that it goes."""
    not_before: float = 0.0
    again_s: float = _AGAIN_S
    was_up: bool = False


class Remotes:
    """One replica's.

    Args:
        employer: Has the processes.
        requests: Has what they do.
        addresses: `HOST:PORT` of those that are named.
        places: Where others are listed: `dns://NAME:PORT` or `file:///PATH` of each.
        recorder: Gets a span where one was lost, and where one comes onto a list or is not on it
            any more.
        warn: Told when one is lost, and where none is listed, and why.
        clock: Monotonic seconds.

    Raises:
        RequestError: One of the places is none.
    """

    def __init__(
        self,
        employer: Employer,
        requests: Requests,
        addresses: Sequence[str],
        places: Sequence[str],
        recorder: Recorder,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._employer = employer
        self._requests = requests
        self._recorder = recorder
        self._warn = warn
        self._clock = clock
        self._named = list(dict.fromkeys(addresses))
        self._places = {address: _Place(address) for address in self._named}
        self._lookups = self._open(places)
        self._too_many = False

    @property
    def fd(self) -> int | None:
        """Readable when somebody has looked at a list: `take` is due then. None without lists."""
        return None if self._lookups is None else self._lookups.fd

    def step(self) -> None:
        """Connects to those that are due; to be called about once a second."""
        if self._lookups is not None:
            self._lookups.step()
            self.take()
            self._follow(self._lookups.addresses)
        for place in list(self._places.values()):
            if place.listed and place.name is None and self._clock() >= place.not_before:
                try:
                    place.name = self._employer.start_remote(place.address)
                except ColdframeError as error:
                    self._lost(place, str(error))

    def take(self) -> None:
        """What is on the lists now is known from here on."""
        if self._lookups is not None:
            self._lookups.take()

    def is_up(self, name: str) -> None:
        """One is connected, and takes requests."""
        for place in self._places.values():
            if place.name == name:
                place.was_up, place.again_s = True, _AGAIN_S

    def leaves(self, name: str) -> None:
        """One has said that it goes when it has nothing to do any more."""
        for place in self._places.values():
            if place.name == name:
                place.leaving = True

    def died(self, name: str, why: str) -> None:
        """A process is gone: the connection is made anew, ever later, if it is still to be."""
        for place in list(self._places.values()):
            if place.name != name:
                continue
            if place.listed:
                self._lost(place, _ENDED if place.leaving else why)
            else:
                del self._places[place.address]

    def close(self) -> None:
        """Nothing is looked up any more."""
        if self._lookups is not None:
            self._lookups.close()

    # -- lists -----------------------------------------------------------------------------------

    def _open(self, places: Sequence[str]) -> Lookups | None:
        if not places:
            return None
        from coldframe.runtime.transport.lookups import Lookups  # most starts need none

        return Lookups(places, self._missed, self._clock)

    def _follow(self, listed: Sequence[str]) -> None:
        wanted = self._as_many_as_may_be([*self._named, *listed])
        for address in sorted(wanted - self._places.keys()):
            self._places[address] = _Place(address)
            self._recorder.add("remote_listed", now(), note=address)
        for place in list(self._places.values()):
            if place.address in wanted:
                self._stay(place)
            else:
                self._let_go(place)

    def _as_many_as_may_be(self, addresses: Sequence[str]) -> set[str]:
        """Each is a process here: of a list that is too long those go first that are not there."""
        wanted = set(addresses)
        if len(wanted) > MOST_WORKERS:
            if not self._too_many:
                self._warn(
                    f"{len(wanted)} decode workers are listed, and no more than {MOST_WORKERS} "
                    "of them are connected"
                )
            named, there = set(self._named), self._places.keys()
            ranked = sorted(wanted, key=lambda one: (one not in named, one not in there, one))
            wanted = set(ranked[:MOST_WORKERS])
            self._too_many = True
        else:
            self._too_many = False
        return wanted

    def _stay(self, place: _Place) -> None:
        place.listed = True
        if place.retired:
            place.retired = False
            if place.name is not None and not place.leaving:
                self._requests.retain(place.name)

    def _let_go(self, place: _Place) -> None:
        if place.listed:
            place.listed = False
            self._recorder.add("remote_unlisted", now(), note=place.address)
        if place.name is None:
            del self._places[place.address]
        elif self._requests.is_free(place.name):
            self._employer.end_remote(place.name)
        else:
            place.retired = True
            self._requests.retire(place.name)

    def _missed(self, place: str, why: str) -> None:
        self._warn(f"no decode worker is found at {place}: {why}")
        self._recorder.add("remote_lookup", now(), note=f"{place}: {why}")

    def _lost(self, place: _Place, why: str) -> None:
        if place.was_up or place.again_s == _AGAIN_S:  # told once of each loss
            self._warn(f"no decode worker at {place.address}: {why}")
            self._recorder.add("remote_lost", now(), note=f"{place.address}: {why}")
        place.name, place.was_up = None, False
        place.retired = place.leaving = False
        place.not_before = self._clock() + place.again_s
        place.again_s = min(2 * place.again_s, _MOST_S)
