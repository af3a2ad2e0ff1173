"""Messages between the processes of a replica: JSON objects, with file descriptors alongside.

A frame is a 4-byte big-endian length, then one JSON object. Descriptors travel as SCM_RIGHTS
on the frame's first byte; the object's `fds` field counts them, so that a reader that got
several frames in one go knows whose they are. The end of the stream is the death of its owner;
who sends what is no frame is as good as dead, and its stream ends there too.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coldframe.loader.errors import ReplicaError

__all__ = ["Channel", "Message", "MAX_FDS"]

MAX_FDS = 200
"""Descriptors in one message; the kernel's own limit (SCM_MAX_FD) is 253."""

_LENGTH = struct.Struct(">I")
_MAX_FRAME = 256 << 20
_READ = 256 << 10


class Message(NamedTuple):
    """One message: its JSON object and the descriptors that came with it."""

    body: dict[str, Any]
    fds: tuple[int, ...]

    @property
    def kind(self) -> str:
        return str(self.body.get("type"))


class Channel:
    """One end of a Unix stream socket that carries messages.

    `send` may be called from any thread. Reading belongs to one thread: either `recv`, which
    blocks for the next message, or `receive_ready`, for use under a selector.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._inbox: deque[Message] = deque()
        self._closed = False

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), cls(theirs)

    @classmethod
    def connect(cls, path: str) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise ReplicaError(
                "cannot reach a process of the replica", where=path, got=error.strerror
            ) from error
        return cls(sock)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def wait_readable(self, timeout: float) -> bool:
        """Waits at most so many seconds until there is something to receive."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def detach(self) -> int:
        """The bare descriptor, which is the caller's to close."""
        return self._sock.detach()

    def set_send_timeout(self, seconds: int) -> None:
        """Let `send` fail when the other side has not read for that long."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))

    def send(self, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends one message.

        Raises:
            ReplicaError: The other side is gone or has stopped reading.
        """
        if fds:
            body = {**body, "fds": len(fds)}
        frame = memoryview(self.frame(body))
        try:
            with self._send_lock:
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    frame = frame[self._sock.sendmsg([frame], rights) :]
                if frame:  # who has all of it may have answered, and gone, by now
                    self._sock.sendall(frame)
        except OSError as error:
            raise ReplicaError(
                "a process of the replica is gone or no longer reads",
                where=f"message {body.get('type')!r}",
                got=error.strerror,
            ) from error

    @staticmethod
    def frame(body: Mapping[str, Any]) -> bytes:
        """A message without descriptors as it goes over the socket, for `send_some`."""
        payload = json.dumps(body, separators=(",", ":")).encode()
        return _LENGTH.pack(len(payload)) + payload

    def send_some(self, data: memoryview) -> int:
        """Sends what the socket takes at once, for those who may not block: how many bytes.

        Raises:
            ReplicaError: The other side is gone.
        """
        try:
            with self._send_lock:
                return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ReplicaError("a process of the replica is gone", got=error.strerror) from error

    def recv(self, timeout: float | None = None) -> Message | None:
        """The next message, or None at the end of the stream.

        Args:
            timeout: Seconds to wait; None waits for ever.

        Raises:
            TimeoutError: Nothing came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._inbox:
            if self._closed:
                return None
            if deadline is not None:
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError
            self._fill()
        return self._inbox.popleft()

    def receive_ready(self) -> tuple[list[Message], bool]:
        """Reads once, after a selector said so: the complete messages, and whether it ended."""
        if not self._closed:
            self._fill()
        messages = list(self._inbox)
        self._inbox.clear()
        return messages, self._closed

    def buffered(self) -> list[Message]:
        """The messages that `recv` has read beside the one that it returned."""
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def hang_up(self) -> None:
        """Ends the stream in both directions, whoever else has the socket, and wakes `recv`."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            return

    def close(self) -> None:
        self._closed = True
        self._sock.close()
        for fd in [*self._fds, *(fd for message in self._inbox for fd in message.fds)]:
            os.close(fd)
        self._fds.clear()
        self._inbox.clear()

    def _fill(self) -> None:
        try:
            data, rights, flags, _ = self._sock.recvmsg(
                _READ, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:  # reset: the owner died with data unread
            data, rights, flags = b"", [], 0
        for level, kind, raw in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                self._fds.extend(received)
        if not data or flags & socket.MSG_CTRUNC:
            self._closed = True
            return
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_FRAME:
                self._closed = True
                return
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = _parse(self._buffer[_LENGTH.size : end])
            count = 0 if body is None else body.pop("fds", 0)
            if body is None or type(count) is not int or not 0 <= count <= len(self._fds):
                self._closed = True
                return
            del self._buffer[:end]
            self._inbox.append(Message(body, tuple(self._fds.popleft() for _ in range(count))))


def _parse(payload: bytearray) -> dict[str, Any] | None:
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
