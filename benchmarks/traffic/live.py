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

from coldframe.benchmarks.http_client import Connection
from coldframe.benchmarks.servers import Server, coldframe_server, knock_at
from coldframe.benchmarks.traffic.client import send_all
from coldframe.benchmarks.traffic.open_loop import Record
from coldframe.benchmarks.traffic.played import Asked, Outcome, Played
from coldframe.benchmarks.traffic.statelog import changes, met, stays
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import PlatformError

__all__ = ["Fleet", "Replayed", "get", "post", "replay", "settled"]

_WAIT_S = 120.0
_LOOK_S = 0.05
_BEFORE_S = 1.0
_LOG_S = 0.5
"""How late the log may be at most."""
_LOGGED = ("--log-level", "info", "--log-format", "json")
"""What states are read from."""
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
        flags = [*map(str, others), *named, *self.flags, *more, *_LOGGED]
        return coldframe_server(first, *flags, environment=self.environment, name=None)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay.

    Args:
        played: What became of the trace.
        sent: Its requests, as the client saw them.
        counted: What the server has counted meanwhile, of all models: seconds in which it held its
            device (`device_s`), was parked and at zero, and its cold starts.
        budget_left_s: What was left of the server's budget when it began; None without one.
    """

    played: Played
    sent: Sequence[Record]
    counted: Mapping[str, float]
    budget_left_s: float | None


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
        PlatformError: The server failed, or its log does not say what its models were.
    """
    names = [fleet.names[number] for number in asks]
    with fleet.serve(*flags) as server:
        settled(server, {"ready", "zero", "parked"})
        post(server, "/sleep?level=2")
        settled(server, {"zero"})
        budget_left_s = json.loads(get(server, "/startup"))["policy"]["budget_left_s"]
        before = _counted(server)
        origin = time.monotonic() + _BEFORE_S

        def progress(count: int) -> None:
            if sys.stderr.isatty() or count in (1, len(arrivals)) or count % 100 == 0:
                end = "\r" if sys.stderr.isatty() and count < len(arrivals) else "\n"
                print(f"replay: {count} of {len(arrivals)} sent", end=end, file=sys.stderr)

        sent = send_all(server, arrivals, names, fleet.vocabulary, origin, progress)
        ended = [one.end_s for one in sent if one.end_s is not None]
        lost_s = [] if all(one.whole for one in sent) else [time.monotonic() - origin]
        seconds = max(arrivals[-1].at_s + tail_s, sent[-1].sent_s, *ended, *lost_s)
        time.sleep(max(0.0, origin + seconds - time.monotonic()))
        after = _counted(server)
        time.sleep(_LOG_S)
        words = server.words()
    found = changes(words, fleet.names)
    states = {
        name: stays([change for change in found if change.model == name], origin, seconds)
        for name in fleet.names
    }
    asked = [
        Asked(one.sent_s, name, _ttft_s(one), met(one.sent_s, states[name]), _outcome(one))
        for one, name in zip(sent, names, strict=True)
    ]
    counted = {name: after[name] - before[name] for name in after}
    return Replayed(Played(asked, states, seconds), sent, counted, budget_left_s)


def _outcome(one: Record) -> Outcome:
    if one.whole and one.first_s is not None:
        return "answered"
    return "failed" if one.status in (None, 200) else "refused"


def _ttft_s(one: Record) -> float | None:
    return None if one.first_s is None else one.first_s - one.sent_s


def get(server: Server, path: str) -> bytes:
    """Raises PlatformError: The server has ended, does not answer, or not with 200."""
    with Connection(knock_at(server, time.monotonic_ns() + int(_WAIT_S * 1e9)), _WAIT_S) as c:
        return c.get(path).body


def post(server: Server, path: str) -> float:
    """Orders something: how long that took, in seconds.

    Raises:
        PlatformError: The server has ended, does not answer, or not with 200.
    """
    with Connection(knock_at(server, time.monotonic_ns() + int(_WAIT_S * 1e9)), _WAIT_S) as c:
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
