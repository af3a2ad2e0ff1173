"""What the gateway asks the front, and who waits for the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from coldframe.runtime.gateway.api import ApiError

__all__ = ["Questions"]

_ASK_S = 10.0


class Questions:
    """Questions that are open.

    Args:
        send: Sends a message to the front.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._count = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._latest: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}

    def put(self, model: str, what: str) -> asyncio.Future[dict[str, Any]]:
        """Asks something of a model, such as `startup` or `stats`; the answer may never come."""
        # Everybody who asks meanwhile gets the same answer: the front has other things to do.
        answer = self._latest.get((model, what))
        if answer is None or answer.done():
            self._count += 1
            answer = asyncio.get_running_loop().create_future()
            self._latest[model, what] = self._waiting[self._count] = answer
            self._send({"type": "ask", "id": self._count, "what": what, "model": model})
        return answer

    async def ask(self, model: str, what: str) -> dict[str, Any]:
        """As `put`, and waits for the answer.

        Raises:
            ApiError: The front does not answer.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self.put(model, what)), _ASK_S)
        except TimeoutError:
            raise ApiError(
                503, "the front does not answer", kind="server_error", code="replica_error"
            ) from None

    def answered(self, number: int, body: dict[str, Any]) -> None:
        """The answer to a question has come."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(body)
