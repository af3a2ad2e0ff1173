"""Requests on their way to the workers: in a line, first come first served, and bounded.

A few sequences are with the workers at once, the rest wait here, where a place costs only what the
request's text takes. A request whose client goes, or whose time is up, leaves the line wherever it
stands.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Generation, Piece
from coldframe.runtime.gateway.exchange import CURRENT
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics, RequestTrace

__all__ = ["Limits", "Line"]

_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 120.0
"""More than that openai-python does not wait for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a line holds.

    Args:
        running: Sequences with the workers.
        waiting: Sequences in the line.
        waiting_bytes: Bytes of their requests.
        wait_s: How long a request may wait for its first token.
    """

    running: int
    waiting: int
    waiting_bytes: int
    wait_s: float


class _Work:
    """One sequence."""

    __slots__ = ("choice", "generation", "id", "stream")

    def __init__(self, number: int, choice: int, generation: Generation, stream: _Stream) -> None:
        self.id = number
        self.choice = choice
        self.generation = generation
        self.stream = stream


class _Stream:
    """The sequences of one request; see `api.Stream`."""

    def __init__(self, line: Line, size: int, trace: RequestTrace) -> None:
        self.size = size
        self.trace = trace
        self.open: dict[int, _Work] = {}
        self.deadline: asyncio.TimerHandle | None = None
        self._entered = time.monotonic()
        self._submitted: float | None = None
        self._answered: float | None = None
        self.exchange = CURRENT.get()
        self._begun: set[int] = set()
        self._line = line
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
            self._line.leave(self)
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

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Line:
    """The line before the workers.

    Args:
        limits: How much it holds.
        send: Sends a message to the front.
        metrics: Gets what happens to requests.
        state: Says how far the replica is.
    """

    def __init__(
        self,
        limits: Limits,
        send: Callable[[dict[str, Any]], None],
        metrics: Metrics,
        state: Callable[[], LoadState],
    ) -> None:
        self._limits = limits
        self._send = send
        self._metrics = metrics
        self._state = state
        self._numbers = 0
        self._waiting: OrderedDict[int, _Work] = OrderedDict()
        self._running: dict[int, _Work] = {}
        self._bytes = 0
        self._may_go = False
        self._ended: deque[float] = deque(maxlen=32)
        """When the last sequences were done: how fast the line moves."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def open_gate(self) -> None:
        """The front knows its model: from now on it takes sequences."""
        self._may_go = True
        self._advance()

    def enter(self, model: str, generations: Sequence[Generation], size: int) -> _Stream:
        """Takes a request; see `api.Engine.submit`."""
        trace = self._metrics.begin(model)
        self._check_room(len(generations), size, trace)
        stream = _Stream(self, size, trace)
        if stream.exchange is not None:
            stream.exchange.asked(model, generations, cold=self._state().cold)
        for choice, generation in enumerate(generations):
            self._numbers += 1
            work = _Work(self._numbers, choice, generation, stream)
            stream.open[work.id] = work
            self._waiting[work.id] = work
        self._bytes += size
        loop = asyncio.get_running_loop()
        stream.deadline = loop.call_later(self._limits.wait_s, self._too_late, stream)
        self._advance()
        return stream

    def leave(self, stream: _Stream) -> None:
        """Takes a request out, wherever its sequences are."""
        for number in stream.open:
            if self._waiting.pop(number, None) is None and number in self._running:
                del self._running[number]
                self._send({"type": "cancel", "id": number})
        self._close(stream)
        self._advance()

    def token(
        self, number: int, item: Sequence[Any], piece: Callable[[int, Sequence[Any]], Piece]
    ) -> None:
        """A token has come.

        Args:
            number: Of its sequence.
            item: As the front sent it.
            piece: Makes the piece of it, for the choice with that index.
        """
        work = self._running.get(number)
        if work is None:
            return  # its request has gone meanwhile
        stream, made = work.stream, piece(work.choice, item)
        if stream.deadline is not None:
            stream.answered()
        stream.add(made)
        if made.finish is not None:
            del self._running[work.id], stream.open[work.id]
            self._ended.append(asyncio.get_running_loop().time())
            if not stream.open:
                stream.trace.end(made.finish)
                self._close(stream)
            self._advance()

    def failed(self, number: int, error: ApiError) -> None:
        """A sequence has failed, and its request with it."""
        work = self._running.pop(number, None) or self._waiting.pop(number, None)
        if work is not None:
            del work.stream.open[number]
            self._fail(work.stream, error)

    def fail_all(self, error: ApiError) -> None:
        """No request will be answered."""
        for works in (self._running, self._waiting):
            while works:
                self._fail(next(iter(works.values())).stream, error)

    def _fail(self, stream: _Stream, error: ApiError) -> None:
        _count(stream.trace, error)
        if stream.exchange is not None:
            stream.exchange.failed(error)
        self.leave(stream)
        stream.fail(error)

    def _close(self, stream: _Stream) -> None:
        stream.open.clear()
        self._bytes -= stream.size
        stream.forget_deadline()

    def _advance(self) -> None:
        while self._may_go and self._waiting and len(self._running) < self._limits.running:
            number, work = self._waiting.popitem(last=False)
            self._running[number] = work
            work.stream.submitted()
            generation = work.generation
            text = isinstance(generation.prompt, str)
            self._send(
                {
                    "type": "submit",
                    "id": number,
                    "params": generation.params.to_wire(),
                    "prompt": generation.prompt if text else None,
                    "prompt_ids": None if text else generation.prompt,
                    "add_special": generation.add_special,
                }
            )

    # -- no place --------------------------------------------------------------------------------

    def _check_room(self, sequences: int, size: int, trace: RequestTrace) -> None:
        free = self._limits.running - len(self._running) if self._may_go else 0
        room = self._limits.waiting - len(self._waiting) + max(0, free)
        if sequences <= room and self._bytes + size <= self._limits.waiting_bytes:
            return
        if sequences > self._limits.waiting + self._limits.running:
            error = ApiError(
                400,
                f"a request may ask for {self._limits.waiting + self._limits.running} sequences "
                f"at most here, not {sequences}",
                param="n",
            )
        elif self._state().cold:
            error = self.loading("too many requests wait for the model already", "queue_full")
        else:
            error = ApiError(
                429,
                "all places are taken: the workers are busy and as many requests wait as may",
                kind="rate_limit_error",
                code="saturated",
                retry_after_s=self._pace_s(sequences),
            )
        _count(trace, error)
        exchange = CURRENT.get()
        if exchange is not None:
            exchange.failed(error)
        raise error

    def loading(self, why: str, code: str) -> ApiError:
        """The answer to who cannot wait: how far the load is, and when to come again."""
        state = self._state()
        eta = state.eta_s
        return ApiError(
            503,
            f"Loading model: {why}",
            kind="unavailable_error",
            code=code,
            retry_after_s=min(max(_LEAST_RETRY_S, eta or 0.0), _MOST_RETRY_S),
            more={
                "stage": state.stage,
                "progress": state.bytes_done / state.bytes_total if state.bytes_total else None,
                "eta_s": eta,
            },
        )

    def _too_late(self, stream: _Stream) -> None:
        if self._state().cold:
            error = self.loading("this request has waited as long as it may", "deadline")
        else:
            error = ApiError(
                503,
                "this request has waited as long as it may",
                kind="unavailable_error",
                code="deadline",
                retry_after_s=self._pace_s(1),
            )
        self._fail(stream, error)

    def _pace_s(self, sequences: int) -> float:
        """How long it takes until so many places are free, as the line moved last."""
        if len(self._ended) < 2:
            return _LEAST_RETRY_S
        # Up to now: a line that stands still is a slow one.
        taken = asyncio.get_running_loop().time() - self._ended[0]
        return min(max(_LEAST_RETRY_S, sequences * taken / len(self._ended)), _MOST_RETRY_S)


def _count(trace: RequestTrace, error: ApiError) -> None:
    trace.refused(error.code or str(error.status))
    error.counted = True
