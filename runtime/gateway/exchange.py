"""One HTTP request while it is being answered: what log, metrics and traces get to know of it.

Whoever computes for a request finds it in `CURRENT`, so that nothing in between need pass it on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Generation
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.request_log import Notes, notes_of
from coldframe.runtime.gateway.tracing import RequestRecord, Tracing

__all__ = ["CURRENT", "Exchange", "Metering"]

_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}


class Exchange:
    """A request and what has become of it so far.

    Args:
        notes: For its line in the log.
        record: For its spans, where there is a collector.
    """

    __slots__ = ("notes", "record")

    def __init__(self, notes: Notes, record: RequestRecord | None) -> None:
        self.notes = notes
        self.record = record

    def about(self, model: str) -> None:
        """It is for that model, whatever becomes of it."""
        self.notes.model = model

    def asked(self, model: str, generations: Sequence[Generation], *, cold: bool) -> None:
        """It asks for sequences.

        Args:
            model: The model card's name.
            generations: The sequences.
            cold: Whether no token has been made by this replica yet.
        """
        self.notes.model = model
        self.notes.prompt_tokens = self.notes.prompt_tokens or 0
        self.notes.completion_tokens = self.notes.completion_tokens or 0
        record = self.record
        if record is not None:
            params = generations[0].params
            asked = {
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.choice.count": len(generations),
            }
            record.model, record.cold = model, cold
            chat = not generations[0].add_special
            record.operation = "chat" if chat else "text_completion"
            record.asked = {name: value for name, value in asked.items() if value is not None}

    def submitted(self) -> None:
        """Its first sequence is with a worker."""
        if self.record is not None:
            self.record.submitted()

    def token(self, prompt_tokens: int) -> None:
        """A token has come.

        Args:
            prompt_tokens: Of its sequence's prompt, with the sequence's first token; else 0.
        """
        notes = self.notes
        notes.prompt_tokens = (notes.prompt_tokens or 0) + prompt_tokens
        notes.completion_tokens = (notes.completion_tokens or 0) + 1
        if self.record is not None:
            self.record.prompt_tokens += prompt_tokens
            self.record.token()

    def failed(self, error: ApiError) -> None:
        """It gets an error for an answer, or for the rest of one."""
        if self.record is not None:
            self.record.error = error.code or str(error.status)

    def finished(self, reason: str) -> None:
        """One of its sequences is done."""
        if self.record is not None:
            self.record.finishes.append(reason)


CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The request that this task answers."""


class Metering:
    """ASGI middleware: every request is an exchange, counted and traced once it is over.

    Args:
        app: The application.
        metrics: Counts answers by route.
        tracing: Gets a record of each, where there is a collector.
        quiet: Paths of probes, which are not traced.
    """

    def __init__(
        self, app: Any, metrics: Metrics, tracing: Tracing | None, quiet: Collection[str]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = None
        if self._tracing is not None and scope["path"] not in self._quiet:
            record = self._tracing.request(
                scope["method"], "", *map(_header(scope), (b"traceparent", b"tracestate"))
            )
        exchange = Exchange(notes_of(scope), record)
        token = CURRENT.set(exchange)
        try:
            await self._app(scope, receive, send)
        finally:
            CURRENT.reset(token)
            self._over(scope, exchange)

    def _over(self, scope: Any, exchange: Exchange) -> None:
        route = getattr(scope.get("route"), "path", "")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        status = exchange.notes.status or 499
        self._metrics.answered(method, route, status)
        if status == 401:
            self._metrics.refused("unauthorized")
        if self._tracing is not None and exchange.record is not None:
            exchange.record.route = route
            exchange.record.status = exchange.notes.status
            self._tracing.finish(exchange.record)


def _header(scope: Any) -> Callable[[bytes], str | None]:
    def value(name: bytes) -> str | None:
        found = [v for n, v in scope["headers"] if n == name]
        return found[0].decode("latin-1") if found else None

    return value
