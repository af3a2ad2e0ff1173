"""Requests on their way to the workers: in a line, first come first served, and bounded.

Each model has a line of its own, so that nobody waits behind another model's start. A few sequences
are with the workers at once, the rest wait here, where a place costs only what the request's text
takes. That is memory of one process: it is bounded for all lines together, in the `Hall`. A request
whose client goes, or whose time is up, leaves the line wherever it stands.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Generation, Piece
from coldframe.runtime.gateway.exchange import CURRENT
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics, RequestTrace
from coldframe.runtime.gateway.stream import RequestStream, Work

__all__ = ["Hall", "Limits", "Line"]

_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 120.0
"""More than that openai-python does not wait for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a line holds.

    Args:
        running: Sequences with the workers.
        waiting: Sequences in the line.
        wait_s: How long a request may wait for its first token.
    """

    running: int
    waiting: int
    wait_s: float


class Hall:
    """Where the lines of all models stand: sequences are numbered, and memory is bounded, in one.

    Args:
        most_bytes: Bytes of the requests that may be open.
    """

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes
        self._numbers = 0
        self._lines: dict[int, Line] = {}

    def line_of(self, number: int) -> Line | None:
        """The line of a sequence; None where that is over."""
        return self._lines.get(number)

    def fits(self, size: int) -> bool:
        """Whether there is memory for a request of so many bytes."""
        return size <= self._free_bytes

    def take(self, size: int) -> None:
        """A request of so many bytes is open."""
        self._free_bytes -= size

    def give_back(self, size: int) -> None:
        """It is over."""
        self._free_bytes += size

    def admit(self, line: Line) -> int:
        """A number for a sequence that enters a line; no other one ever had it."""
        self._numbers += 1
        self._lines[self._numbers] = line
        return self._numbers

    def release(self, number: int) -> None:
        """A sequence has left its line."""
        del self._lines[number]


class Line:
    """The line before a model's workers.

    Args:
        model: Its name.
        limits: How much the line holds.
        hall: Where it stands, with those of other models.
        send: Sends a message to the front.
        metrics: Gets what happens to requests.
        state: Says how far the replica is.
    """

    def __init__(
        self,
        model: str,
        limits: Limits,
        hall: Hall,
        send: Callable[[dict[str, Any]], None],
        metrics: Metrics,
        state: Callable[[], LoadState],
    ) -> None:
        self._model = model
        self._limits = limits
        self._hall = hall
        self._send = send
        self._metrics = metrics
        self._state = state
        self._waiting: OrderedDict[int, Work] = OrderedDict()
        self._running: dict[int, Work] = {}
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

    def enter(self, generations: Sequence[Generation], size: int) -> RequestStream:
        """Takes a request; see `api.Engine.submit`."""
        trace = self._metrics.begin(self._model)
        self._check_room(len(generations), size, trace)
        stream = RequestStream(self.leave, size, trace)
        if stream.exchange is not None:
            stream.exchange.asked(self._model, generations, cold=self._state().cold)
        for choice, generation in enumerate(generations):
            work = Work(self._hall.admit(self), choice, generation, stream)
            stream.open[work.id] = work
            self._waiting[work.id] = work
        self._hall.take(size)
        loop = asyncio.get_running_loop()
        stream.deadline = loop.call_later(self._limits.wait_s, self._too_late, stream)
        self._advance()
        return stream

    def leave(self, stream: RequestStream) -> None:
        """Takes a request out, wherever its sequences are."""
        for number in stream.open:
            self._hall.release(number)
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
            self._is_over(work, made.finish)

    def given(self, number: int, params: Mapping[str, Any]) -> None:
        """Another replica goes on with a sequence."""
        work = self._running.get(number)
        if work is not None:
            self._is_over(work, "length")
            work.stream.give(params)

    def _is_over(self, work: Work, finish: str) -> None:
        """A sequence has its last token."""
        stream = work.stream
        del self._running[work.id], stream.open[work.id]
        self._hall.release(work.id)
        self._ended.append(asyncio.get_running_loop().time())
        if not stream.open:
            stream.trace.end(finish)
            self._close(stream)
        self._advance()

    def failed(self, number: int, error: ApiError) -> None:
        """A sequence has failed, and its request with it."""
        work = self._running.pop(number, None) or self._waiting.pop(number, None)
        if work is not None:
            del work.stream.open[number]
            self._hall.release(number)
            self._fail(work.stream, error)

    def fail_all(self, error: ApiError) -> None:
        """No request will be answered."""
        for works in (self._running, self._waiting):
            while works:
                self._fail(next(iter(works.values())).stream, error)

    def _fail(self, stream: RequestStream, error: ApiError) -> None:
        _count(stream.trace, error)
        if stream.exchange is not None:
            stream.exchange.failed(error)
        self.leave(stream)
        stream.fail(error)

    def _close(self, stream: RequestStream) -> None:
        stream.open.clear()
        self._hall.give_back(stream.size)
        stream.forget_deadline()

    def _advance(self) -> None:
        while self._may_go and self._waiting and len(self._running) < self._limits.running:
            number, work = self._waiting.popitem(last=False)
            self._running[number] = work
            work.stream.submitted()
            generation = work.generation
            text = isinstance(generation.prompt, str)
            body = {
                "type": "submit",
                "id": number,
                "model": self._model,
                "params": generation.params.to_wire(),
                "prompt": generation.prompt if text else None,
                "prompt_ids": None if text else generation.prompt,
                "add_special": generation.add_special,
            }
            if generation.generated:
                body["generated_ids"] = generation.generated
            if generation.give:
                body["give"] = True
            if generation.kv is not None:
                body["kv"] = dict(generation.kv)
            self._send(body)

    # -- no place --------------------------------------------------------------------------------

    def _check_room(self, sequences: int, size: int, trace: RequestTrace) -> None:
        free = self._limits.running - len(self._running) if self._may_go else 0
        room = self._limits.waiting - len(self._waiting) + max(0, free)
        if sequences <= room and self._hall.fits(size):
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

    def _too_late(self, stream: RequestStream) -> None:
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
