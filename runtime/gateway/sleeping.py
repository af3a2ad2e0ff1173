"""`/sleep`, `/wake_up` and `/is_sleeping`, as vLLM has them (docs.vllm.ai, "Sleep Mode").

Level 1 parks the replica, level 2 takes it to zero. Requests that the workers have are answered
first. Other than vLLM's, a sleeping server wakes by itself when somebody asks it something.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from coldframe.runtime.gateway.answering import JsonResponse
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.engine import FrontEngine

__all__ = ["Sleeping"]

_ASLEEP = frozenset({"parked", "zero"})
_AWAKE = frozenset({"ready"})
_LEVELS = {"1": frozenset({"parked", "zero"}), "2": frozenset({"zero"})}


class Sleeping:
    """Puts the replica to sleep, and wakes it.

    Args:
        engine: The replica.
        wait_s: How long whoever asks waits for it at most, in seconds.
    """

    def __init__(self, engine: FrontEngine, wait_s: float) -> None:
        self._engine = engine
        self._wait_s = wait_s

    async def sleep(self, request: Request) -> Response:
        level = request.query_params.get("level", "1")
        if level not in _LEVELS:
            raise ApiError(400, "the level of sleep is 1 or 2", param="level", code="invalid_value")
        await self._engine.ask(f"sleep{level}")
        await self._engine.until(_LEVELS[level], self._wait_s)
        return Response()

    async def wake_up(self, _: Request) -> Response:
        # There are no parts of it to wake one after the other: `tags` is taken and left alone.
        await self._engine.ask("wake_up")
        await self._engine.until(_AWAKE, self._wait_s)
        return Response()

    async def is_sleeping(self, _: Request) -> Response:
        return JsonResponse({"is_sleeping": self._engine.state.phase in _ASLEEP})
