"""Clients that go away: what is computed for them ends with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

__all__ = ["ClientGone", "Receive", "Send", "send_stream", "until_gone"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_T = TypeVar("_T")


class ClientGone(Exception):
    """The client is gone. Nobody is left to be told: whoever catches this ends quietly."""


async def until_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """The result of some work, unless the client goes away before.

    Args:
        receive: ASGI's, once the body has been read.
        work: What is awaited here, in this task; it is cancelled when the client goes.

    Raises:
        ClientGone: It went; the work has ended.
    """
    async with _Watch(receive):
        return await work


async def send_stream(
    send: Send,
    receive: Receive,
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    chunks: AsyncIterator[bytes],
) -> None:
    """Sends an answer in parts, as they come.

    Args:
        send: ASGI's.
        receive: ASGI's, once the body has been read.
        status: The HTTP status.
        headers: Names in lower case.
        chunks: The parts. Closed at the end, whatever that is; so an asynchronous generator frees
            what it holds in its `finally`.

    Raises:
        ClientGone: The client went, or did not take the answer in time.
    """
    try:
        async with _Watch(receive) as watch:
            await send({"type": "http.response.start", "status": status, "headers": [*headers]})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            # A server says "disconnect" after a whole answer too.
            watch.stop()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


class _Watch:
    """Cancels the task that it is entered in when the client goes, as `asyncio.timeout` does.

    One task listens for the whole of an answer: a token costs nothing here.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> _Watch:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a client can only be watched from a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if self._gone:
            # Somebody else may have cancelled the task as well, and that must go on.
            ours = self._task.uncancel() <= self._cancelling
            if ours and kind in (None, asyncio.CancelledError):
                raise ClientGone from None
        elif self._listener.done() and not self._listener.cancelled():
            self._listener.result()

    def stop(self) -> None:
        """Listens no more; from now on nothing is cancelled."""
        self._listener.cancel()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
