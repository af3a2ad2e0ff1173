"""One request and the beginning of its answer: sent, refused, or there to be read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from coldframe.loader.errors import SourceChanged, SourceError, SourceProtocol
from coldframe.loader.web.address import Address, Refusal, Target
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.connection import Connection
from coldframe.loader.web.dial import host_header
from coldframe.loader.web.head import Garbled, Head
from coldframe.loader.web.pool import Pool

__all__ = ["Exchange", "Told"]

Told = Callable[["Connection | None"], None]
Accepted = Callable[[Target, Mapping[str, str]], None]

_MAX_REFUSAL = 64 << 10
_ANSWERS = frozenset({200, 206, 416})


def _nobody(connection: Connection | None) -> None:
    return


class Exchange:
    """Sends requests and sorts the answers. Safe for several threads.

    Args:
        address: Makes the requests, and says what refusals mean. One that has a method `accepted`
            is shown the request and the headers of each answer that is none.
        pool: Has the connections.

    Attributes:
        requests: How many were sent.
    """

    def __init__(self, address: Address, pool: Pool) -> None:
        self._address = address
        self._pool = pool
        self._accepted: Accepted | None = getattr(address, "accepted", None)
        self._lock = threading.Lock()
        self.requests = 0

    @contextmanager
    def ask(
        self,
        name: str,
        headers: Mapping[str, str],
        where: str,
        told: Told = _nobody,
    ) -> Iterator[tuple[Connection, Head]]:
        """Sends a request for a file; the connection is given back at the end.

        Args:
            name: The file.
            headers: `Range` and conditions.
            where: The file and the range, for errors.
            told: Called with the connection once there is one, and with None when it goes back.

        Yields:
            The connection, with the body to come, and the answer: status 200, 206 or 416.

        Raises:
            Broken: It did not work out, and may the next time.
            SourceError: It will not.
        """
        target = self._address.target(name, {"Accept-Encoding": "identity", **headers})
        connection, head = self._send(target, where, told)
        keep = False
        try:
            if head.status not in _ANSWERS:
                refusal = _refusal_of(target, connection, head, where)
                keep = True
                raise self._refused(refusal, conditional=len(headers) > 1)
            if head.headers.get("content-encoding", "identity").lower() != "identity":
                raise SourceProtocol(
                    "the server sends the file in another coding than it is stored in",
                    where=where,
                    expected="Content-Encoding: identity, as it was asked for",
                    got=f"{head.headers['content-encoding']:.40}",
                )
            if self._accepted is not None:
                self._accepted(target, head.headers)
            yield connection, head
            keep = True
        except Garbled as error:
            raise _garbled(error, where) from None
        finally:
            told(None)
            if keep:
                self._pool.give(connection)
            else:
                self._pool.drop(connection)

    def _send(self, target: Target, where: str, told: Told) -> tuple[Connection, Head]:
        given = {name.lower() for name in target.headers}
        fixed = {"Host": host_header(target), "User-Agent": "coldframe"}
        headers = {k: v for k, v in fixed.items() if k.lower() not in given} | dict(target.headers)
        fresh = False
        while True:
            connection = self._pool.take(target, fresh=fresh)
            kept = connection.used
            try:
                told(connection)
                with self._lock:
                    self.requests += 1
                connection.send("GET", target.path, headers)
                return connection, connection.head()
            except BaseException as error:
                told(None)
                self._pool.drop(connection)
                if isinstance(error, Garbled):
                    raise _garbled(error, where) from None
                # A server may close a connection that was idle just when we use it again. That
                # is no failure: the request goes out on a new one.
                if not (kept and isinstance(error, Broken) and error.ended):
                    raise
                fresh = True

    def _refused(self, refusal: Refusal, *, conditional: bool) -> Broken:
        try:
            again = self._address.refused(refusal)
        except SourceChanged:
            raise
        except SourceError:
            if refusal.status == 412 and conditional:
                raise SourceChanged(
                    "a file was changed while it was loaded",
                    where=refusal.what,
                    expected="the version that was read first",
                    got="status 412: it is not there any more",
                ) from None
            raise
        return Broken(
            again.why,
            status=refusal.status,
            after_s=again.after_s,
            slow_down=again.slow_down,
            at_once=again.at_once,
        )


def _refusal_of(target: Target, connection: Connection, head: Head, where: str) -> Refusal:
    body = b""
    with suppress(Broken, Garbled):  # then its status alone must tell
        body = connection.read(_MAX_REFUSAL)
    return Refusal(head.status, head.reason, head.headers, body, target, where)


def _garbled(error: Garbled, where: str) -> SourceProtocol:
    return SourceProtocol(
        "what came is not HTTP as it should be", where=where, expected="HTTP/1.1", got=error
    )
