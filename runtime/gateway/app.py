"""The gateway put together: routes, the engine behind them, and uvicorn around them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from coldframe.loader.wire import Channel
from coldframe.runtime.gateway.answering import Answering, refusal
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.cors import with_cors
from coldframe.runtime.gateway.engine import FrontEngine
from coldframe.runtime.gateway.exchange import Metering
from coldframe.runtime.gateway.keys import ApiKeys, KeyGuard, open_paths
from coldframe.runtime.gateway.log_bridge import route_logging
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.openai.service import OpenAI
from coldframe.runtime.gateway.platforms.adapters import adapter
from coldframe.runtime.gateway.platforms.table import by_name
from coldframe.runtime.gateway.protocol import HttpLimits, connection_limit, http_protocol
from coldframe.runtime.gateway.renderer import Renderer
from coldframe.runtime.gateway.request_log import RequestLog
from coldframe.runtime.gateway.routes import add_routes, probe_paths
from coldframe.runtime.gateway.served import ServedModel
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.shape import Shape, shape_of
from coldframe.runtime.gateway.tracing import ColdStart, Tracing, open_tracing

if TYPE_CHECKING:
    from coldframe.runtime.integrations.dynamo.worker import DynamoWorker

__all__ = ["Gateway"]

_BACKLOG = 2048
"""Connections that the kernel holds at most."""
_LATECOMERS_S = 0.05
"""How long connections are taken that the kernel had before the port was closed, in seconds."""
_LAST_WORDS_S = 0.5
"""So long before the drain budget is over those that are still open are told, in seconds."""


class Gateway:
    """A gateway that serves on listeners it was given.

    Args:
        channel: The socket to the front.
        settings: What the front told.
        listeners: Bound and listening sockets.
        renderer: Fills in chat templates.
    """

    def __init__(
        self,
        channel: Channel,
        settings: GatewaySettings,
        listeners: list[socket.socket],
        renderer: Renderer,
    ) -> None:
        self.accepting = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._behind: set[asyncio.Task[None]] = set()
        self._listeners = listeners
        self.log = Log(
            settings.log_format, settings.log_level, process="gateway", secrets=settings.keys
        )
        route_logging(self.log)
        self.metrics = Metrics()
        self._tracing = open_tracing(os.environ, lambda why: self.log.warning("tracing", why=why))
        self._drain_s = settings.drain_s
        self._dynamo_settings = settings.dynamo
        self._dynamo: DynamoWorker | None = None
        self.engine = FrontEngine(channel, settings, self.metrics, self._on_phase, self._front_gone)
        limits = HttpLimits(connections=connection_limit())
        self._renderer = renderer
        renderer.elsewhere = self.engine.templates
        answering = Answering(
            OpenAI(self.engine, renderer.render),
            self.metrics,
            max_body=settings.max_body,
            limits=limits,
        )
        shape = shape_of(adapter(by_name(settings.platform).errors))
        app = _app(shape)
        add_routes(app, settings, self.engine, answering, self.metrics)
        config = uvicorn.Config(
            self._surrounded(app, settings, shape),
            http=http_protocol(limits, shape),
            loop="asyncio",
            ws="none",
            lifespan="off",  # nothing is loaded there: uvicorn would not accept before it is done
            log_config=None,
            access_log=False,
            server_header=False,
            # So many are accepted in one go, before the first of them can be refused.
            backlog=min(_BACKLOG, limits.connections),
            timeout_graceful_shutdown=max(1, int(settings.drain_s)),
        )
        self._server = _Server(config, self.accepting)

    def _surrounded(self, app: ASGIApp, settings: GatewaySettings, shape: Shape) -> ASGIApp:
        """The application within what every request goes through, from the inside out."""
        health, quiet = probe_paths(settings)
        unguarded = open_paths(health, metrics=settings.open_metrics)
        guarded = KeyGuard(app, ApiKeys(settings.keys), unguarded, shape)
        metered = Metering(guarded, self.metrics, self._tracing, quiet)
        return RequestLog(with_cors(metered, settings.cors), self.log, quiet, shape)

    async def serve(self) -> None:
        """Serves until it is told to drain, and all open requests have their answers."""
        if self._dynamo_settings is not None:
            self._beside(self._serve_dynamo(self._dynamo_settings))
        try:
            await self._server.serve(sockets=self._listeners)
            if self._dynamo is not None:
                await self._dynamo.close()
        finally:
            await asyncio.to_thread(self._close)

    async def _serve_dynamo(self, settings: Mapping[str, Any]) -> None:
        """Answers Dynamo, too; without it this gateway ends, and the front starts another."""
        from coldframe.runtime.integrations.dynamo.settings import DynamoSettings
        from coldframe.runtime.integrations.dynamo.worker import DynamoWorker

        worker = DynamoWorker(DynamoSettings.from_wire(settings), self.engine, self.log)
        self._dynamo = worker

        async def leave() -> None:
            await worker.leave()
            self.engine.say({"type": "left"})

        self.engine.on_leave = lambda: self._beside(leave())
        try:
            await worker.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, it may pass
            self.log.error("not registered with Dynamo", why=f"{type(error).__name__}: {error}")
            self._server.should_exit = self._server.force_exit = True

    def _close(self) -> None:
        self._renderer.close()
        if self._tracing is not None:
            self._tracing.close()

    def _on_phase(self, model: ServedModel, before: str, phase: str) -> None:
        # All models drain at once: it is the container that ends.
        if phase == "draining" and self._ending is None:
            self._ending = asyncio.create_task(self._end())
            # Who is not done then is told so; the front would only cut the connection.
            late = max(0.0, self._drain_s - _LAST_WORDS_S)
            asyncio.get_running_loop().call_later(late, self.engine.give_up)
        elif phase == "ready" and before == "starting":
            self._beside(self._after_start(model))
        elif phase == "zero" and all(m.state.phase == "zero" for m in self.engine.models.values()):
            self._beside(asyncio.to_thread(self._renderer.rest))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Has something done that nobody waits for."""
        behind = asyncio.create_task(work)
        self._behind.add(behind)
        behind.add_done_callback(self._behind.discard)

    async def _after_start(self, model: ServedModel) -> None:
        """What would have delayed the first token."""
        card = model.known_card
        if card is not None and card.chat_template is not None:
            with contextlib.suppress(ApiError):  # who asks for a chat is told what is wrong with it
                await asyncio.to_thread(self._renderer.prepare, card.chat_template)
        if self._tracing is not None:
            await _trace_start(self._tracing, model)

    async def _end(self) -> None:
        # Who has connected while nobody accepted yet is told, and not cut off.
        await self.accepting.wait()
        await asyncio.sleep(_LATECOMERS_S)
        self._server.should_exit = True

    def _front_gone(self) -> None:
        # The kernel ends this process with the front; this is for where it does not.
        self._server.should_exit = True
        self._server.force_exit = True


async def _trace_start(tracing: Tracing, model: ServedModel) -> None:
    for _ in range(20):
        startup = await model.ask("startup")
        timeline = startup["timeline"]
        # The spans of who made the first token come behind it.
        if any(stage["name"] == "prefill[head]" for stage in timeline["stages"]):
            break
        await asyncio.sleep(0.1)
    state = model.state
    tracing.cold_start(
        ColdStart(model.name, timeline, startup["began_ns"], state.tier, state.device)
    )


class _Server(uvicorn.Server):
    """uvicorn's server, told to end by the front and not by signals."""

    def __init__(self, config: uvicorn.Config, accepting: asyncio.Event) -> None:
        super().__init__(config)
        self._accepting = accepting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _app(shape: Shape) -> FastAPI:
    # No pages that load scripts from elsewhere.
    app = FastAPI(title="coldframe", docs_url=None, redoc_url=None)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"[:200]
        words = {404: f"There is nothing at {what}", 405: f"{what} is not how this is asked for"}
        told = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
        response = refusal(told, shape(told, request.url.path))
        response.headers.update(error.headers or {})
        return response

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refusal(error, shape(error, request.url.path))

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ApiError, refused)
    return app
