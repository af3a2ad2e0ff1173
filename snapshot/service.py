"""The side of the process that makes clones: asked for them over a socket, it says how they fare.

The same for clones of an image (`restorer`) and for forks of a resident template (`template`).

Messages in:  `prepare` (what must fit), `clone` (its name; beside it, its control socket), `kill`.
Messages out: `prepared` or `refused` (what there is, or why there is nothing), then for each clone
`started` (its PID) or `failed` (why), and `ended` (its exit code); with each, `spans`.
The end of the socket is the end of all clones that were asked for over it.
"""

from __future__ import annotations

import os
import selectors
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel, Message

__all__ = ["Clone", "CloneService", "Source"]

_REST_S = 10.0


class Clone(Protocol):
    """A clone that is on its way or lives.

    Attributes:
        channel: Readable when there is news of its start; None where it starts at once.
        pidfd: Readable when it has ended.
    """

    @property
    def channel(self) -> Channel | None: ...

    @property
    def pidfd(self) -> int: ...

    def inside(self) -> int | None:
        """Its PID, for whoever wants to look at it."""
        ...

    def kill(self) -> int:
        """Ends it, where it has not ended: its exit code, or minus the signal that ended it."""
        ...


class Source(Protocol):
    """What clones are made of."""

    def prepare(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Sees whether it can serve what is wanted, and gets ready for that.

        Returns:
            What there is, for the answer.

        Raises:
            ColdframeError: It cannot.
        """
        ...

    def clone(self, name: str, control_fd: int) -> Clone:
        """Starts a clone with that control socket.

        Raises:
            ColdframeError: It cannot.
        """
        ...

    def gone(self, name: str) -> None:
        """A clone has ended: what was kept for it can go."""
        ...

    def rest(self) -> None:
        """Nothing was asked for a while: what was only kept ready can go."""
        ...


class CloneService:
    """Serves one socket until it ends.

    Args:
        channel: The socket.
        source: What clones are made of.
        recorder: Its spans go out after each answer.
    """

    def __init__(self, channel: Channel, source: Source, recorder: Recorder) -> None:
        self._channel = channel
        self._source = source
        self._recorder = recorder
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel.fileno(), selectors.EVENT_READ, self._on_channel)
        self._clones: dict[str, Clone] = {}
        self._watched: dict[str, list[int]] = {}
        """The descriptors of each clone that the selector has."""
        self._messages: deque[Message] = deque()
        self._refusal: ColdframeError | None = SnapshotError("nothing has been prepared")
        self._running = True

    def asked_for(self) -> dict[str, int]:
        """The clones that are asked for and will be made next: their control sockets, by name."""
        if self._running and self._channel.wait_readable(0.0):
            self._receive()
        return {m.body["name"]: m.fds[0] for m in self._messages if m.kind == "clone"}

    def run(self) -> None:
        try:
            while self._running:
                ready = self._selector.select(_REST_S)
                if not ready:
                    self._source.rest()
                for key, _ in ready:
                    if self._selector.get_map().get(key.fd) == key:
                        key.data()
        finally:
            for name in list(self._clones):
                self._forget(name)
            self._selector.close()

    def _on_channel(self) -> None:
        self._receive()
        while self._messages:
            self._take(self._messages.popleft())

    def _receive(self) -> None:
        messages, ended = self._channel.receive_ready()
        self._messages += messages
        self._running = self._running and not ended

    def _take(self, message: Message) -> None:
        match message.kind:
            case "prepare":
                self._prepare(message.body)
            case "clone":
                (fd,) = message.fds
                try:
                    self._clone(message.body["name"], fd)
                finally:
                    os.close(fd)
            case "kill":
                if message.body["name"] in self._clones:
                    self._on_end(message.body["name"])

    def _prepare(self, wanted: dict[str, Any]) -> None:
        try:
            found = self._source.prepare(wanted)
        except ColdframeError as error:
            self._refusal = error
            self._say({"type": "refused", "error": error.to_wire()})
        else:
            self._refusal = None
            self._say({"type": "prepared", **found})

    def _clone(self, name: str, control_fd: int) -> None:
        try:
            if self._refusal is not None:
                raise self._refusal
            clone = self._source.clone(name, control_fd)
        except ColdframeError as error:
            self._say({"type": "failed", "name": name, "error": error.to_wire()})
            self._say({"type": "ended", "name": name, "status": 1})
            return
        self._clones[name] = clone
        self._watched[name] = []
        self._watch(name, clone.pidfd, self._on_end)
        if clone.channel is None:
            self._say({"type": "started", "name": name, "pid": clone.inside()})
        else:
            self._watch(name, clone.channel.fileno(), self._on_news)

    def _watch(self, name: str, fd: int, ready: Callable[[str], None]) -> None:
        self._watched[name].append(fd)
        self._selector.register(fd, selectors.EVENT_READ, lambda: ready(name))

    def _on_news(self, name: str) -> None:
        clone = self._clones[name]
        assert clone.channel is not None
        messages, ended = clone.channel.receive_ready()
        for message in messages:
            if message.kind == "started":
                self._say({"type": "started", "name": name, "pid": clone.inside()})
            else:
                self._say({"type": "failed", "name": name, "error": message.body["error"]})
        if ended:
            fd = clone.channel.fileno()
            self._selector.unregister(fd)
            self._watched[name].remove(fd)

    def _on_end(self, name: str) -> None:
        clone = self._clones[name]
        channel = clone.channel
        # Its last words, where it has some.
        while channel and channel.fileno() in self._watched[name] and channel.wait_readable(0.0):
            self._on_news(name)
        self._say({"type": "ended", "name": name, "status": self._forget(name)})

    def _forget(self, name: str) -> int:
        """Ends a clone, where it has not ended yet: its exit code."""
        for fd in self._watched.pop(name):
            self._selector.unregister(fd)
        status = self._clones.pop(name).kill()
        self._source.gone(name)
        return status

    def _say(self, body: dict[str, Any]) -> None:
        spans = [span.to_wire() for span in self._recorder.drain()]
        try:
            self._channel.send({**body, "spans": spans})
        except ColdframeError:  # the other side is gone, which the loop will see
            self._running = False
