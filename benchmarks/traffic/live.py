"""A trace against a real server: what became of it, by the server's log and the client's clock."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.http_client import Connection, knock
from coldframe.benchmarks.servers import Server, coldframe_server
from coldframe.benchmarks.traffic.client import Sent, send_all
from coldframe.benchmarks.traffic.played import Asked, Played, Stay
from coldframe.benchmarks.traffic.statelog import changes, met, stays
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import PlatformError

__all__ = ["Fleet", "Replayed", "get", "post", "replay", "settled"]

_WAIT_S = 120.0
_LOOK_S = 0.05
_BEFORE_S = 1.0
_LOG_S = 0.5
"""How late the log may be at most."""
_METRIC = re.compile(r"coldframe_(\w+)_total\{([^}]*)\} (\S+)")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Models of one server.

    Args:
        places: Where each is, by its name, in the order in which they are served.
        vocabulary: Token ids that all of them know are below that.
        flags: More for `coldframe serve`.
        environment: What to change for it.
    """

    places: Mapping[str, Path]
    vocabulary: int
    flags: Sequence[str]
    environment: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def serve(self, *more: str) -> AbstractContextManager[Server]:
        """The server."""
        first, *others = self.places.values()
        named = [flag for name in self.names for flag in ("--model-name", name)]
        flags = [*map(str, others), *named, *self.flags, *more]
        return coldframe_server(first, *flags, environment=self.environment, name=None)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay.

    Args:
        played: What became of the trace.
        sent: Its requests.
        counted: What the server has counted meanwhile, of all models: seconds in which it held its
            device (`device_s`), was parked and at zero, and its cold starts.
    """

    played: Played
    sent: Sequence[Sent]
    counted: Mapping[str, float]


def replay(
    fleet: Fleet,
    flags: Sequence[str],
    arrivals: Sequence[Arrival],
    asks: Sequence[int],
    tail_s: float,
) -> Replayed:
    """Sends a trace to a server of its own, all of whose models are at zero when it begins.

    Args:
        fleet: The models.
        flags: The policy's.
        arrivals: The trace.
        asks: Which model each of them asks, by its number.
        tail_s: For how long the server is looked at behind the last arrival, in seconds; until the
            last answer's end at least.

    Raises:
        PlatformError: The server failed, or a request was not answered.
    """
    names = [fleet.names[number] for number in asks]
    with fleet.serve(*flags, "--log-format", "json") as server:
        settled(server, {"ready", "zero", "parked"})
        post(server, "/sleep?level=2")
        settled(server, {"zero"})
        before = _counted(server)
        origin_ns = time.monotonic_ns() + int(_BEFORE_S * 1e9)

        def progress(count: int) -> None:
            if sys.stderr.isatty() or count in (1, len(arrivals)) or count % 100 == 0:
                end = "\r" if sys.stderr.isatty() and count < len(arrivals) else "\n"
                print(f"replay: {count} of {len(arrivals)} sent", end=end, file=sys.stderr)

        sent = send_all(server.port, arrivals, names, fleet.vocabulary, origin_ns, progress)
        until_ns = origin_ns + int((arrivals[-1].at_s + tail_s) * 1e9)
        until_ns = max(until_ns, *(one.last_ns for one in sent))
        time.sleep(max(0.0, (until_ns - time.monotonic_ns()) / 1e9))
        after = _counted(server)
        time.sleep(_LOG_S)
        words = server.words()
    seconds = (until_ns - origin_ns) / 1e9
    states: dict[str, list[Stay]] = {}
    for name in fleet.names:
        own = [change for change in changes(words, fleet.names) if change.model == name]
        states[name] = stays(own, origin_ns / 1e9, seconds)
    asked = []
    for one, name in zip(sent, names, strict=True):
        at_s = (one.sent_ns - origin_ns) / 1e9
        asked.append(Asked(at_s, name, one.ttft_s, met(at_s, states[name])))
    counted = {name: after[name] - before[name] for name in after}
    return Replayed(Played(asked, states, seconds), sent, counted)


def get(server: Server, path: str) -> bytes:
    """Raises PlatformError: The server does not answer, or not with 200."""
    with Connection(knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9)), _WAIT_S) as c:
        return c.get(path).body


def post(server: Server, path: str) -> float:
    """Orders something: how long that took, in seconds.

    Raises:
        PlatformError: The server does not answer, or not with 200.
    """
    with Connection(knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9)), _WAIT_S) as c:
        return c.post(path, b"").seconds


def settled(server: Server, states: set[str]) -> None:
    """Waits until all models are in one of some states.

    Raises:
        PlatformError: They do not come there.
    """
    late = time.monotonic() + _WAIT_S
    while True:
        told = json.loads(get(server, "/startup"))
        found = {name: model["state"] for name, model in told.get("models", {"": told}).items()}
        if set(found.values()) <= states:
            return
        if "failed" in found.values() or time.monotonic() > late:
            raise PlatformError(
                "the server's models are not where they should be",
                expected=" or ".join(sorted(states)),
                got=found,
            )
        time.sleep(_LOOK_S)


def _counted(server: Server) -> dict[str, float]:
    names = {"device_seconds": "device_s", "parked_seconds": "parked_s", "zero_seconds": "zero_s"}
    names["coldstarts"] = "starts"
    found: dict[str, Any] = dict.fromkeys(names.values(), 0.0)
    for name, _, value in _METRIC.findall(get(server, "/metrics").decode()):
        if name in names:
            found[names[name]] += float(value)
    return found
