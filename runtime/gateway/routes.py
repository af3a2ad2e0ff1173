"""Which path is answered by whom: OpenAI's routes, those of the platform, those of the state."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from coldframe.runtime.gateway.answering import Answering, JsonResponse
from coldframe.runtime.gateway.engine import FrontEngine
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.openai.service import model, models
from coldframe.runtime.gateway.platforms.adapters import adapter
from coldframe.runtime.gateway.platforms.documents import document
from coldframe.runtime.gateway.platforms.kserve import VERSION
from coldframe.runtime.gateway.platforms.profile import Route
from coldframe.runtime.gateway.platforms.table import COMMON, by_name
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.sleeping import Sleeping
from coldframe.runtime.gateway.status import Status

__all__ = ["add_routes", "probe_paths"]

_STATE = ("/healthz", "/readyz", "/startup", "/placement", "/metrics", "/")

_Handler = Callable[[Request], Awaitable[Response]]


def add_routes(
    app: FastAPI,
    settings: GatewaySettings,
    engine: FrontEngine,
    answering: Answering,
    metrics: Metrics,
) -> None:
    """Gives an application all its routes.

    Args:
        app: Has none yet.
        settings: Whose contract is kept, and what may be asked without a key.
        engine: Has the models.
        answering: Answers what asks for tokens.
        metrics: What is told at /metrics.
    """
    table = _Table(app)
    _add_openai(table, engine, answering)
    for route in [*by_name(settings.platform).routes_for(os.environ), *COMMON]:
        table.add(route.method, route.path, _platform(route, engine, answering))
    status = Status(engine, metrics)
    table.add("GET", "/healthz", status.alive)
    table.add("GET", "/readyz", status.ready)
    table.add("GET", "/startup", status.startup)
    table.add("GET", "/placement", status.placement, include_in_schema=False)
    table.add("GET", "/metrics", status.metrics)
    table.add("GET", "/", status.page, include_in_schema=False)
    sleeping = Sleeping(engine, settings.max_wait_s)
    table.add("POST", "/sleep", sleeping.sleep, include_in_schema=False)
    table.add("POST", "/wake_up", sleeping.wake_up, include_in_schema=False)
    table.add("GET", "/is_sleeping", sleeping.is_sleeping, include_in_schema=False)

    def described() -> dict[str, Any]:
        from coldframe.runtime.gateway.openapi import openapi

        return openapi(settings, os.environ)

    app.openapi = described  # type: ignore[method-assign]


def probe_paths(settings: GatewaySettings) -> tuple[set[str], set[str]]:
    """The platform's health routes; and all paths that are asked again and again, by whomever."""
    routes = by_name(settings.platform).routes_for(os.environ)
    health = set()
    for route in routes:
        if route.kind != "predict":
            path = route.path.replace("{version}", VERSION)
            health |= {path.replace("{model}", name) for name in settings.models}
    return health, {*health, *_STATE}


class _Table:
    """Routes by method and path; the first that is given for one stays."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._taken: set[tuple[str, str]] = set()

    def add(self, method: str, path: str, handler: _Handler, **more: Any) -> None:
        if (method, path) in self._taken:
            return
        self._taken.add((method, path))
        self._app.add_api_route(path, handler, methods=[method], response_model=None, **more)
        if method == "GET":  # probes ask for the head alone
            self._app.add_route(path, handler, methods=["HEAD"], include_in_schema=False)


def _add_openai(table: _Table, engine: FrontEngine, answering: Answering) -> None:
    async def completions(request: Request) -> Response:
        return await answering.openai(request, "completion")

    async def chat(request: Request) -> Response:
        return await answering.openai(request, "chat")

    async def list_models(_: Request) -> Response:
        if len(engine.models) == 1:
            await engine.default.card()
        return JsonResponse(models({name: m.known_card for name, m in engine.models.items()}))

    async def one_model(request: Request) -> Response:
        return JsonResponse(model(await engine.card(request.path_params["name"])))

    table.add("POST", "/v1/completions", completions)
    table.add("POST", "/v1/chat/completions", chat)
    table.add("GET", "/v1/models", list_models)
    # A name may be that of a hub: org/name.
    table.add("GET", "/v1/models/{name:path}", one_model)


def _platform(route: Route, engine: FrontEngine, answering: Answering) -> _Handler:
    if route.kind == "predict":
        translated = adapter(route.adapter or "")

        async def predict(request: Request) -> Response:
            return await answering.predict(request, translated)

        return predict

    async def tell(request: Request) -> Response:
        phases = {name: model.state.health for name, model in engine.models.items()}
        status, body = document(route, engine.health, phases, request.path_params)
        return Response(status_code=status) if body is None else JsonResponse(body, status)

    return tell
