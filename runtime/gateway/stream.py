"""One request's sequences while they wait and are computed: what its answer is read from."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Generation, Piece
from coldframe.runtime.gateway.exchange import CURRENT
from coldframe.runtime.gateway.metrics import RequestTrace

__all__ = ["RequestStream", "Work"]


class Work:
    """One sequence."""

    __slots__ = ("choice", "generation", "id", "stream")

    def __init__(
        self, number: int, choice: int, generation: Generation, stream: RequestStream
    ) -> None:
        self.id = number
        self.choice = choice
        self.generation = generation
        self.stream = stream


class RequestStream:
    """The sequences of one request; see `api.Stream`.

    Args:
        leave: Takes it out of the line that it stands in.
        size: Bytes of the request.
        trace: Gets what happens to it.
    """

    def __init__(
        self, leave: Callable[[RequestStream], None], size: int, trace: RequestTrace
    ) -> None:
        self.size = size
        self.trace = trace
        self.open: dict[int, Work] = {}
        self.deadline: asyncio.TimerHandle | None = None
        self.exchange = CURRENT.get()
        self.given: Mapping[str, Any] | None = None
        self._leave = leave
        self._entered = time.monotonic()
        self._submitted: float | None = None
        self._answered: float | None = None
        self._begun: set[int] = set()
        self._pieces: deque[Piece] = deque()
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                while self._pieces:
                    yield self._pieces.popleft()
                if self._error is not None:
                    raise self._error
                if not self.open:
                    return
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self.open:
            self.trace.gone()
            self._leave(self)
            self._wake()

    def timing(self) -> dict[str, float]:
        now = time.monotonic()
        times = {"queue": self._submitted, "first_token": self._answered, "total": now}
        return {name: t - self._entered for name, t in times.items() if t is not None}

    def submitted(self) -> None:
        """Its first sequence is with a worker."""
        if self._submitted is None:
            self._submitted = time.monotonic()
            self.trace.submitted()
            if self.exchange is not None:
                self.exchange.submitted()

    def answered(self) -> None:
        """Its first token is there."""
        self._answered = time.monotonic()
        self.forget_deadline()

    def forget_deadline(self) -> None:
        """It may take as long as it likes, or is over."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def add(self, piece: Piece) -> None:
        """A token has come."""
        self.trace.token(piece.prompt_tokens, piece.choice)
        if self.exchange is not None:
            first = piece.choice not in self._begun
            self._begun.add(piece.choice)
            self.exchange.token(piece.prompt_tokens if first else 0)
            if piece.finish is not None:
                self.exchange.finished(piece.finish)
        self._pieces.append(piece)
        self._wake()

    def give(self, params: Mapping[str, Any]) -> None:
        """Another replica goes on with it."""
        self.given = params
        if self.exchange is not None:
            self.exchange.finished("length")
        self._wake()

    def fail(self, error: ApiError) -> None:
        """It gets no more tokens, but this."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
