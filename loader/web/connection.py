"""One HTTP/1.1 connection whose bodies are received where they belong, without a copy on the way.

Only what is needed to read ranges: GET requests, one after the other, answers with a length (or,
for small ones, chunked or until the connection ends). Python's own client reads a body through a
buffer, some 8 KiB at a time; here the kernel writes it into the caller's memory, about a megabyte
for each system call.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence

from coldframe.loader.web.broken import Broken, reason_of
from coldframe.loader.web.head import Garbled, Head, length_of, parse_head

__all__ = ["Connection"]

_HEAD_PIECE = 4096
_MAX_HEAD = 64 << 10
_SMALL_PIECE = 64 << 10
_ENDED = "the connection ended before the answer did"


class Connection:
    """A connected socket that speaks HTTP/1.1. For one thread; `shut_down` is for any.

    Args:
        sock: A socket, or a TLS one, connected.
        tls: Which of them.
        stall_s: Without a byte for so long it counts as broken.
        prefix: What the request line has before the path: the server's URL, towards a proxy.
        headers: Sent with each request: a proxy's credentials.

    Attributes:
        used: It has given an answer before, and may have been closed since.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        tls: bool,
        stall_s: float,
        prefix: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._sock = sock
        self._tls = tls
        self._stall_s = stall_s
        self._prefix = prefix
        self._headers = dict(headers or {})
        self._early = memoryview(b"")  # of the body, came with the head
        self._left: int | None = 0  # bytes of the body; None: until the end
        self._chunked = False
        self._persistent = True
        self.used = False
        # Shorter than the stall: a piece that came in part says so, and then the clock runs anew.
        tick = max(0.001, stall_s / 4)
        if tls:
            sock.settimeout(tick)
        else:
            # A timeout of Python's makes the socket non-blocking, which ends MSG_WAITALL.
            sock.settimeout(None)
            seconds = int(tick)
            value = struct.pack("@ll", seconds, int((tick - seconds) * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def reusable(self) -> bool:
        """Whether another request can follow: the answer is at its end."""
        return self._persistent and self._left == 0 and not self._early

    def send(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Sends a request.

        Raises:
            Broken: It could not be sent.
            Garbled: There is a line break in it.
        """
        lines = [f"{method} {self._prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**headers, **self._headers}.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise Garbled("a line break in the request")
        try:
            self._sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        except OSError as error:
            raise Broken(reason_of(error), ended=True) from None

    def head(self) -> Head:
        """Receives the beginning of the answer; its body is next.

        Raises:
            Broken: There was none, or not all of it.
            Garbled: It is not HTTP.
        """
        version, status, reason, headers = parse_head(self._receive_head())
        while 100 <= status < 200 and status != 101:
            version, status, reason, headers = parse_head(self._receive_head())
        self._persistent = version == "1.1" and "close" not in headers.get("connection", "").lower()
        coding = headers.get("transfer-encoding", "identity").lower()
        if coding not in ("identity", "chunked"):
            raise Garbled("an unknown transfer coding")
        self._chunked = coding == "chunked"
        self._left = None if self._chunked else length_of(headers)
        if status in (204, 304):
            self._left, self._chunked = 0, False
        if self._left is not None and len(self._early) > self._left:
            raise Garbled("more bytes than the answer has")
        self.used = True
        return Head(status, reason, headers, self._left)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Receives bytes of a body that is not chunked; waits until all buffers are full if it can.

        Args:
            buffers: No more room than the body has bytes left; none of them empty.

        Returns:
            How many came; at least one.

        Raises:
            Broken: None came for too long, or the connection has ended.
        """
        if self._early:
            count = self._take_early(buffers)
        elif self._tls:
            count = self._receive_tls(buffers[0])
        elif len(buffers) == 1:
            size = len(buffers[0])
            count = self._wait(self._sock.recv_into, buffers[0], size, socket.MSG_WAITALL)
        else:
            count = self._wait(self._receive_many, buffers)
        if count == 0:
            raise Broken(_ENDED, ended=True)
        if self._left is not None:
            self._left -= count
        return count

    def read(self, limit: int) -> bytes:
        """All of a small body, or its first bytes where it has more than `limit`.

        Raises:
            Broken: It broke off.
            Garbled: Its chunks are none.
        """
        if self._chunked:
            return self._read_chunked(limit)
        if self._left is not None:
            return self._read_exactly(min(self._left, limit))
        found = bytearray()
        piece = memoryview(bytearray(_SMALL_PIECE))
        while len(found) < limit:
            if self._early:
                count = self._take_early([piece])
            else:
                count = self._wait(self._sock.recv_into, piece)
            if count == 0:  # its end is the connection's
                break
            found += piece[:count]
        return bytes(found[:limit])

    def shut_down(self) -> None:
        """Ends what another thread is waiting for on this connection; it gets `Broken`."""
        try:
            # Not the TLS socket's own method: that forgets its TLS first, and the thread in
            # `recv_into` would go on with what is encrypted.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self._sock.close()

    def _take_early(self, buffers: Sequence[memoryview]) -> int:
        taken = 0
        for buffer in buffers:
            piece = self._early[: len(buffer)]
            buffer[: len(piece)] = piece
            self._early = self._early[len(piece) :]
            taken += len(piece)
            if not self._early:
                break
        return taken

    def _receive_many(self, buffers: Sequence[memoryview]) -> int:
        return self._sock.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]

    def _receive_tls(self, buffer: memoryview) -> int:
        """One record after the other (16 KiB): TLS has no way to wait for more."""
        count = 0
        while count < len(buffer):
            try:
                got = self._wait(self._sock.recv_into, buffer[count:])
            except Broken:
                if count:
                    break  # the next call meets it again
                raise
            if got == 0:
                break
            count += got
        return count

    def _wait(self, receive: Callable[..., int], *args: object) -> int:
        """Receives; what comes back with nothing is tried again until it is a stall."""
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            try:
                return receive(*args)
            except (BlockingIOError, TimeoutError):  # a quarter of the stall's time has passed
                deadline = deadline or time.monotonic() + 0.7 * self._stall_s
            except OSError as error:
                raise Broken(reason_of(error), ended=True) from None
        raise Broken(f"no byte came for {self._stall_s:g} s")

    def _more(self) -> None:
        """Receives a little more of a head or of the lines between chunks."""
        piece = memoryview(bytearray(_HEAD_PIECE))
        count = self._wait(self._sock.recv_into, piece)
        if count == 0:
            raise Broken(_ENDED, ended=True)
        self._early = memoryview(bytes(self._early) + piece[:count])

    def _until(self, mark: bytes) -> bytes:
        while (end := bytes(self._early).find(mark)) < 0:
            if len(self._early) > _MAX_HEAD:
                raise Garbled("a head without an end")
            self._more()
        found = bytes(self._early[:end])
        self._early = self._early[end + len(mark) :]
        return found

    def _receive_head(self) -> bytes:
        return self._until(b"\r\n\r\n")

    def _read_exactly(self, count: int) -> bytes:
        found = memoryview(bytearray(count))
        at = 0
        while at < count:
            at += self.receive([found[at : at + _SMALL_PIECE]])
        return bytes(found)

    def _read_chunked(self, limit: int) -> bytes:
        found = bytearray()
        while len(found) < limit:
            text = self._until(b"\r\n").split(b";")[0].strip()
            if not text or text.strip(b"0123456789abcdefABCDEF"):
                raise Garbled("a chunk without a length")
            size = int(text, 16)
            if size == 0:
                while self._until(b"\r\n"):  # trailers
                    continue
                self._chunked, self._left = False, 0
                break
            found += self._read_exactly(min(size, limit - len(found)))
            if len(found) < limit and self._until(b"\r\n"):
                raise Garbled("a chunk without an end")
        return bytes(found)
