"""The front's side of clones: asked for, watched, ended; the processes themselves are elsewhere.

A clone is the child of a PID 1, and that of the process that made it, so what the front knows of
it comes over a socket (`service` has the protocol). What it gets, it can use like a `Child`.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import Child
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel, Message
from coldframe.snapshot.restorer_process import RestorerProcess

__all__ = ["CloneChild", "CloneEvent", "Cloner"]

_END_S = 5.0


class CloneEvent(NamedTuple):
    """What has come of a clone that was asked for, or of the cloner itself (`name` is None).

    Args:
        name: Whose news.
        error: Why there is no clone; None where there is one.
    """

    name: str | None
    error: ColdframeError | None


class CloneChild:
    """A clone, with the methods of a `Child`.

    Attributes:
        pid: Its process id here; 0 while it is on its way.
        spawned_ns: When it was asked for, CLOCK_MONOTONIC.
    """

    def __init__(self, cloner: Cloner, name: str) -> None:
        self.name = name
        self.pid = 0
        self.spawned_ns = now()
        self.status: int | None = None
        self.failed = False
        """Whether it was told that there will be no clone; its end is told after that."""
        self._cloner = cloner

    def poll(self) -> int | None:
        """The exit code where it has ended, else None."""
        if self.status is None:
            self._cloner.receive(0.0)
        return self.status

    def wait(self) -> int:
        """Waits for its end: the exit code, or minus the signal that ended it."""
        while self.status is None:
            self._cloner.receive(None)
        return self.status

    def kill(self) -> int:
        """Ends it at once: the exit code, as `wait`."""
        if self.poll() is None:
            self._cloner.kill(self.name)
            deadline = time.monotonic() + _END_S
            while self.status is None and time.monotonic() < deadline:
                self._cloner.receive(_END_S)
            if self.status is None:
                self._cloner.end(ReplicaError("the process that makes clones does not answer"))
        assert self.status is not None
        return self.status


class Cloner:
    """A process that makes clones.

    Args:
        tier: `image` or `template`.
        channel: The socket to it.
        child: The process, where it is one of ours; it ends with the socket.
    """

    def __init__(self, tier: str, channel: Channel, child: Child | None = None) -> None:
        self.tier = tier
        self.events: deque[CloneEvent] = deque()
        """News, in order; whoever takes them removes them."""
        self.image: str | None = None
        """The id of what clones are made of, once that is known."""
        self.manifest: dict[str, Any] | None = None
        """Its manifest."""
        self.spans: list[list[Any]] = []
        """The spans that came; whoever takes them removes them."""
        self.error: ColdframeError | None = None
        """Why it makes no clones, where that is so."""
        self.closing: Callable[[], object] = lambda: None
        """Called before the socket is closed, for whoever watches it."""
        self._channel = channel
        self._child = child
        self._clones: dict[str, CloneChild] = {}
        self._closed = False

    @classmethod
    def spawn_restorer(cls) -> Cloner:
        """Starts a process that restores images; what it is to find is told by `prepare`.

        Raises:
            PlatformError: It cannot be started.
        """
        return cls.of(RestorerProcess())

    @classmethod
    def of(cls, process: RestorerProcess) -> Cloner:
        """A process that restores images, taken over."""
        return cls("image", Channel(process.socket), process.child)

    @classmethod
    def connect(cls, path: str) -> Cloner:
        """Joins a template that is resident.

        Raises:
            ReplicaError: Nobody listens there.
            SnapshotError: Whoever listens there is another user.
        """
        from coldframe.snapshot.template_socket import peer_uid  # where there are templates only

        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not blocking: whoever listens there may not be one of ours.
        sock.setblocking(False)
        try:
            sock.connect(path)
            owner = os.stat(path, follow_symlinks=False).st_uid
        except OSError as error:
            sock.close()
            raise ReplicaError(
                "no template listens there", where=path, got=error.strerror
            ) from error
        # Whoever makes our workers can do as we can: it must be us.
        uid = peer_uid(sock)
        if os.getuid() != uid or os.getuid() != owner:
            sock.close()
            raise SnapshotError(
                "the template belongs to another user",
                where=path,
                expected=f"user {os.getuid()}",
                got=f"user {uid}",
            )
        sock.setblocking(True)
        return cls("template", Channel(sock))

    def fileno(self) -> int:
        return self._channel.fileno()

    def prepare(self, wanted: Mapping[str, Any]) -> None:
        """Says what clones are wanted of; whether there can be any, events tell."""
        self._send({"type": "prepare", **wanted})

    def clone(self, name: str, control_fd: int) -> CloneChild:
        """Asks for a clone with that control socket; an event tells what comes of it."""
        child = CloneChild(self, name)
        if self.error is not None:
            child.status, child.failed = 1, True
            self.events.append(CloneEvent(name, self.error))
            return child
        self._clones[name] = child
        self._send({"type": "clone", "name": name}, [control_fd])
        return child

    def kill(self, name: str) -> None:
        """Ends a clone at once."""
        self._send({"type": "kill", "name": name})

    def receive(self, timeout: float | None = 0.0) -> None:
        """Takes in what has been said; waits for it at most so many seconds."""
        if self._closed:
            return
        if timeout is None or self._channel.wait_readable(timeout):
            messages, ended = self._channel.receive_ready()
            for message in messages:
                self._take(message)
            if ended:
                self.end(ReplicaError("the process that makes clones is gone"))

    def end(self, reason: ColdframeError) -> None:
        """It makes no more clones, and those that it made end with it."""
        if not self._closed:
            self._closed = True
            self.closing()
            self._channel.close()
            if self._child is not None:
                self._child.kill()
            for child in self._clones.values():
                child.status = -9
                if not child.failed:
                    self.events.append(CloneEvent(child.name, reason))
            self._clones.clear()
            self.events.append(CloneEvent(None, reason))
        self.error = self.error or reason

    def close(self) -> None:
        """Ends it and all its clones."""
        self.end(ReplicaError("it was closed"))
        self.events.clear()

    @property
    def has_clones(self) -> bool:
        """Whether some clone of it lives."""
        return any(child.pid and child.status is None for child in self._clones.values())

    @property
    def closed(self) -> bool:
        return self._closed

    def _take(self, message: Message) -> None:
        body = message.body
        self.spans += body.get("spans", ())
        name = body.get("name")
        child = self._clones.get(name) if name is not None else None
        match message.kind:
            case "prepared":
                self.image, self.manifest = body["id"], body["manifest"]
                self.events.append(CloneEvent(None, None))
            case "refused":
                self.error = ColdframeError.from_wire(body["error"])
                self.events.append(CloneEvent(None, self.error))
            case "started" if child is not None:
                child.pid = body["pid"] or 0
                self.events.append(CloneEvent(name, None))
            case "failed" if child is not None:
                child.failed = True
                self.events.append(CloneEvent(name, ColdframeError.from_wire(body["error"])))
            case "ended" if child is not None:
                child.status = body["status"]
                del self._clones[child.name]

    def _send(self, body: Mapping[str, Any], fds: list[int] | None = None) -> None:
        if self._closed:
            return
        try:
            self._channel.send(body, fds or ())
        except ReplicaError as error:
            self.end(error)
