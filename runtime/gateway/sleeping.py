"""`/sleep`, `/wake_up` and `/is_sleeping`, as vLLM has them (docs.vllm.ai, "Sleep Mode").

Level 1 parks a model, level 2 takes it to zero. Requests that the workers have are answered first.
Other than vLLM's, a sleeping server wakes by itself when somebody asks it something. `model` says
which model is meant; without it all are, but for those that have failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set

from starlette.requests import Request
from starlette.responses import Response

from coldframe.runtime.gateway.answering import JsonResponse
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.engine import FrontEngine
from coldframe.runtime.gateway.served import ServedModel

__all__ = ["Sleeping"]

_ASLEEP = frozenset({"parked", "zero"})
_AWAKE = frozenset({"ready"})
_LEVELS = {"1": frozenset({"parked", "zero"}), "2": frozenset({"zero"})}


class Sleeping:
    """Puts models to sleep, and wakes them.

    Args:
        engine: Has the models.
        wait_s: How long whoever asks waits for them at most, in seconds.
    """

    def __init__(self, engine: FrontEngine, wait_s: float) -> None:
        self._engine = engine
        self._wait_s = wait_s

    async def sleep(self, request: Request) -> Response:
        level = request.query_params.get("level", "1")
        if level not in _LEVELS:
            raise ApiError(400, "the level of sleep is 1 or 2", param="level", code="invalid_value")
        orders = (self._order(m, f"sleep{level}", _LEVELS[level]) for m in self._meant(request))
        await asyncio.gather(*orders)
        return Response()

    async def wake_up(self, request: Request) -> Response:
        # There are no parts of it to wake one after the other: `tags` is taken and left alone.
        for model in self._meant(request):
            # One by one: where the device does not hold them all, each has been awake once.
            await self._order(model, "wake_up", _AWAKE)
        return Response()

    async def is_sleeping(self, request: Request) -> Response:
        asleep = all(model.state.phase in _ASLEEP for model in self._meant(request))
        return JsonResponse({"is_sleeping": asleep})

    async def _order(self, model: ServedModel, what: str, phases: Set[str]) -> None:
        await model.ask(what)
        await model.until(phases, self._wait_s)

    def _meant(self, request: Request) -> list[ServedModel]:
        name = request.query_params.get("model")
        if name is not None:
            return [self._engine.pick(name)]
        models = list(self._engine.models.values())
        return [model for model in models if model.state.phase != "failed"] or models
