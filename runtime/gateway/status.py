"""The routes that say how all is: `/healthz`, `/readyz`, `/startup`, `/placement`, `/metrics`, `/`.

To ask for one of them is no request, and wakes nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coldframe.runtime.gateway.answering import JsonResponse
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.engine import FrontEngine
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.served import ServedModel
from coldframe.runtime.gateway.startup import InShort, Startup, in_short, startup_document

__all__ = ["Status"]

_LOOK_S = 2.0
_LOOK_STEP_S = 0.01


class Status:
    """Says how the models are.

    Args:
        engine: Has them.
        metrics: What is told at /metrics, beside what the front counts.
    """

    def __init__(self, engine: FrontEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    async def alive(self, _: Request) -> Response:
        return JsonResponse({"status": "live"})

    async def ready(self, _: Request) -> Response:
        engine = self._engine
        if engine.ready:
            body: dict[str, Any] = {"status": "ready", "state": engine.default.state.phase}
            if len(engine.models) > 1:
                body["models"] = self._models()
            return JsonResponse(body)
        # About the one that all wait for.
        late = [model for model in engine.models.values() if model.starts_first]
        document = self._document(late[0] if late else engine.default, None)
        if document["error"] is not None:
            # A probe shows no key; where exactly it failed is in the log, and at /startup.
            document["error"] = {"what": document["error"].get("what")}
        return JsonResponse(document, 503)

    async def startup(self, request: Request) -> Response:
        model = self._engine.pick(request.query_params.get("model"))
        told = await model.ask("startup")
        document = self._document(model, told["timeline"], told.get("decode"))
        document["policy"], document["states"] = told.get("policy"), told.get("states")
        document["latest"] = told.get("latest")
        document["no_clone"] = (told.get("snapshot") or {}).get("why")
        document["load_mode"] = told.get("load_mode")
        document["load_mode_reason"] = told.get("load_mode_reason")
        return JsonResponse(document)

    async def placement(self, _: Request) -> Response:
        """What somebody wants to know who has to say where a model is to run."""
        models = self._engine.models.values()
        told = await asyncio.gather(*map(_placement, models))
        names = (model.name for model in models)
        return JsonResponse({"version": 1, "models": dict(zip(names, told, strict=True))})

    async def metrics(self, request: Request) -> Response:
        from coldframe.runtime.endpoint.frontstats import FrontStats

        models = self._engine.models.values()
        told = await asyncio.gather(*(_stats(model) for model in models))
        stats = {
            model.name: FrontStats.from_wire(numbers)
            for model, numbers in zip(models, told, strict=True)
            if numbers is not None
        }
        accept = request.headers.get("accept", "")
        # The first one imports much.
        body, kind = await asyncio.to_thread(self._metrics.render, stats, accept)
        return Response(body, media_type=None, headers={"content-type": kind})

    async def page(self, request: Request) -> Response:
        from coldframe.runtime.gateway.page import read_page

        page = read_page()
        if request.headers.get("if-none-match") == page.headers["etag"]:
            return Response(status_code=304, headers=dict(page.headers))
        return Response(page.body, headers=dict(page.headers))

    def _document(
        self,
        model: ServedModel,
        timeline: Mapping[str, Any] | None,
        decode: Mapping[str, Any] | None = None,
    ) -> Startup:
        document = startup_document(
            model.name,
            model.state,
            running=model.line.running,
            waiting=model.line.waiting,
            timeline=timeline,
            decode=decode,
        )
        if len(self._engine.models) > 1:
            document["models"] = self._models()
        return document

    def _models(self) -> dict[str, InShort]:
        return {name: in_short(model.state) for name, model in self._engine.models.items()}


async def _placement(model: ServedModel) -> dict[str, Any]:
    """What there is of a model, once its files have been looked at, unless that takes too long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LOOK_S
    while True:
        told: dict[str, Any] = await model.ask("placement")
        if told["looked"] or loop.time() > until:
            return told
        await asyncio.sleep(_LOOK_STEP_S)


async def _stats(model: ServedModel) -> dict[str, Any] | None:
    try:
        return await model.ask("stats")
    except ApiError:
        return None
