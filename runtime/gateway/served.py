"""One of the models that are served, as the gateway has it: how far it is, what it is, its line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.gateway.api import ApiError, Generation, ModelCard, Stream
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.questions import Questions
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.waiting import Hall, Limits, Line

__all__ = ["ServedModel"]

_OVER = frozenset({"failed", "draining"})


class ServedModel:
    """A model and its line.

    Args:
        name: As clients call it.
        settings: The line's limits.
        hall: Where the line stands.
        send: Sends a message to the front.
        questions: What is asked there.
        metrics: Gets what happens to requests.
        on_phase: Called with the phase that was and the one that is, when these differ.
    """

    def __init__(
        self,
        name: str,
        settings: GatewaySettings,
        hall: Hall,
        send: Callable[[dict[str, Any]], None],
        questions: Questions,
        metrics: Metrics,
        on_phase: Callable[[ServedModel, str, str], None],
    ) -> None:
        self.name = name
        self.state = LoadState()
        self._hall = hall
        self._questions = questions
        self._on_phase = on_phase
        self._wait_s = settings.max_wait_s
        self._most_curious = settings.max_running + settings.max_waiting
        self._welcomed = False
        self._card: ModelCard | None = None
        self._settled = asyncio.Event()
        """Set while its card is known, or it is known that there will be none."""
        self._curious = 0
        """How many wait for its card."""
        self._woken = False
        self._watchers: set[tuple[Set[str], asyncio.Future[str]]] = set()
        limits = Limits(settings.max_running, settings.max_waiting, settings.max_wait_s)
        self.line = Line(name, limits, hall, send, metrics, lambda: self.state)

    # -- requests --------------------------------------------------------------------------------

    @property
    def known_card(self) -> ModelCard | None:
        """Its card, if that is known yet."""
        return self._card

    async def card(self, *, size: int = 0) -> ModelCard:
        """Its card; waits while that is on the way, and has it come where the model rests.

        Args:
            size: Bytes of the request that waits for it.

        Raises:
            ApiError: It cannot be had.
        """
        if self._card is None:
            await self._settle(size)
        if self._card is None:
            raise self.refusal()
        return self._card

    async def _settle(self, size: int) -> None:
        """Waits for the card, bounded as the line is: nothing can stand there before it."""
        if self._curious >= self._most_curious or not self._hall.fits(size):
            raise self.line.loading("too many requests wait for the model already", "queue_full")
        self._curious += 1
        self._hall.take(size)
        try:
            self._wake_up()
            async with asyncio.timeout(self._wait_s):
                await self._settled.wait()
        except TimeoutError:
            raise self.line.loading("its config is still on the way", "deadline") from None
        finally:
            self._curious -= 1
            self._hall.give_back(size)

    def _wake_up(self) -> None:
        """Has a model started that never was, where somebody waits to know what it is."""
        if self._curious and not self._woken and self.state.phase == "zero":
            self._woken = True
            self._questions.put(self.name, "wake_up")

    def submit(self, generations: Sequence[Generation], *, size: int) -> Stream:
        """See `api.Engine.submit`."""
        if self.state.phase in _OVER:
            raise self.refusal()
        return self.line.enter(generations, size)

    def give_up(self) -> None:
        """Ends the requests that are open: they had their time."""
        self.line.fail_all(self.refusal())

    # -- its state -------------------------------------------------------------------------------

    @property
    def starts_first(self) -> bool:
        """Whether it is on its way for the first time: it has never been open to requests."""
        return self.state.phase == "starting" and not self._welcomed

    async def ask(self, what: str) -> dict[str, Any]:
        """Asks the front something of it, such as `startup` or `stats`.

        Raises:
            ApiError: The front does not answer.
        """
        return await self._questions.ask(self.name, what)

    async def until(self, phases: Set[str], seconds: float) -> None:
        """Waits until it is in one of some phases, or has been since this was called.

        Raises:
            ApiError: It has not come to that.
        """
        watched = phases | _OVER
        reached = self.state.phase
        if reached not in watched:
            watcher = (watched, asyncio.get_running_loop().create_future())
            self._watchers.add(watcher)
            try:
                reached = await asyncio.wait_for(watcher[1], seconds)
            except TimeoutError:
                raise ApiError(
                    503,
                    f"the replica is still {self.state.phase}",
                    kind="unavailable_error",
                    code="deadline",
                    retry_after_s=1.0,
                ) from None
            finally:
                self._watchers.discard(watcher)
        if reached not in phases:
            raise self.refusal()

    def take_card(self, card: ModelCard) -> None:
        """The front knows what it is, and takes sequences from now on."""
        self._card = card
        self._settled.set()
        self.line.open_gate()

    def take_state(self, state: LoadState) -> None:
        """The front says how far it is."""
        before, self.state = self.state.phase, state
        self._welcomed = self._welcomed or state.open
        if state.phase == before:
            return
        for phases, reached in self._watchers:
            if state.phase in phases and not reached.done():
                reached.set_result(state.phase)
        self._woken = False
        if state.phase == "failed":
            self._settled.set()
            self.line.fail_all(self.refusal())
        elif self._card is None:
            self._settled.clear()
            self._wake_up()
        self._on_phase(self, before, state.phase)

    def refusal(self) -> ApiError:
        """What those get to know whom it will not answer."""
        if self.state.phase == "draining":
            return ApiError(
                503,
                "this replica is being shut down",
                kind="unavailable_error",
                code="draining",
                retry_after_s=1.0,
            )
        if self.state.error is not None:
            return ApiError.of(ColdframeError.from_wire(dict(self.state.error)))
        return ApiError(503, "the replica is gone", kind="server_error", code="replica_error")
