"""The workers, seen from the gateway: at the other end of the socket to the front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.gateway.api import (
    ApiError,
    Generation,
    ModelCard,
    Piece,
    Stream,
    TokenLogprob,
)
from coldframe.runtime.gateway.link import FrontLink
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.waiting import Limits, Line

__all__ = ["FrontEngine"]

_ASK_S = 10.0


class FrontEngine:
    """An `api.Engine` whose workers are the front's.

    Args:
        channel: The socket to the front.
        settings: The queue's limits, and the model's name.
        metrics: Gets what happens to requests.
        on_phase: Called with the phase that was and the one that is, when these differ.
        on_end: Called when the front is gone.
    """

    def __init__(
        self,
        channel: Channel,
        settings: GatewaySettings,
        metrics: Metrics,
        on_phase: Callable[[str, str], None],
        on_end: Callable[[], None],
    ) -> None:
        self.state = LoadState()
        self.name = settings.model
        self._on_phase = on_phase
        self._on_end = on_end
        self._card: ModelCard | None = None
        self._known = asyncio.Event()
        self._wait_s = settings.max_wait_s
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._questions = 0
        self._phase_watchers: set[asyncio.Event] = set()
        self._open_questions: dict[str, tuple[int, asyncio.Future[dict[str, Any]]]] = {}
        self._loop = asyncio.get_running_loop()
        self._templates: asyncio.Future[Channel] | None = None
        self._link = FrontLink(channel, self._on_message, self._front_gone)
        limits = Limits(
            settings.max_running,
            settings.max_waiting,
            settings.max_waiting_bytes,
            settings.max_wait_s,
        )
        self.line = Line(limits, self._link.send, metrics, lambda: self.state)

    # -- Engine ----------------------------------------------------------------------------------

    async def card(self, name: str | None) -> ModelCard:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist. This server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        if self._card is None:
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._known.wait()
            except TimeoutError:
                raise self.line.loading("its config is still on the way", "deadline") from None
        if self._card is None:
            raise self._refusal()
        return self._card

    def submit(self, model: str, generations: Sequence[Generation], *, size: int) -> Stream:
        if self.state.phase in ("failed", "draining"):
            raise self._refusal()
        return self.line.enter(model, generations, size)

    # -- what else the front knows ---------------------------------------------------------------

    @property
    def known_card(self) -> ModelCard | None:
        """The model's card, if it is known yet."""
        return self._card

    async def ask(self, what: str) -> dict[str, Any]:
        """Asks the front something, such as `startup` or `stats`.

        Raises:
            ApiError: It does not answer.
        """
        # Everybody who asks meanwhile gets the same answer: the front has other things to do.
        number, answer = self._open_questions.get(what, (0, None))
        if answer is None or answer.done():
            self._questions += 1
            number, answer = self._questions, asyncio.get_running_loop().create_future()
            self._open_questions[what] = number, answer
            self._asked[number] = answer
            self._link.send({"type": "ask", "id": number, "what": what})
        try:
            return await asyncio.wait_for(asyncio.shield(answer), _ASK_S)
        except TimeoutError:
            raise ApiError(
                503, "the front does not answer", kind="server_error", code="replica_error"
            ) from None

    def templates(self) -> Channel:
        """A socket to a process for chat templates that the front starts; blocks another thread.

        Raises:
            TimeoutError: It has started none.
        """
        asked = asyncio.run_coroutine_threadsafe(self._ask_for_templates(), self._loop)
        return asked.result()

    async def _ask_for_templates(self) -> Channel:
        self._templates = self._loop.create_future()
        self._link.send({"type": "templates"})
        try:
            return await asyncio.wait_for(self._templates, _ASK_S)
        finally:
            self._templates = None

    async def until(self, phases: Set[str], seconds: float) -> None:
        """Waits until the replica is in one of some phases.

        Raises:
            ApiError: It has not come to that.
        """
        changed = asyncio.Event()
        self._phase_watchers.add(changed)
        try:
            async with asyncio.timeout(seconds):
                while self.state.phase not in phases:
                    if self.state.phase in ("failed", "draining"):
                        raise self._refusal()
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise ApiError(
                503,
                f"the replica is still {self.state.phase}",
                kind="unavailable_error",
                code="deadline",
                retry_after_s=1.0,
            ) from None
        finally:
            self._phase_watchers.discard(changed)

    def say(self, body: dict[str, Any]) -> None:
        """Tells the front something."""
        self._link.send(body)

    def give_up(self) -> None:
        """Ends the requests that are open: they had their time."""
        self.line.fail_all(self._refusal())

    def _on_message(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "tokens":
                for item in body["items"]:
                    self.line.token(item[0], item, _piece)
            case "failed":
                error = ApiError.of(ColdframeError.from_wire(body["error"]))
                self.line.failed(body["id"], error)
            case "state":
                self._take_state(LoadState.from_wire(body))
            case "model":
                self._card = ModelCard.from_wire(body["card"])
                self._known.set()
                self.line.open_gate()
            case "templates":
                lent = Channel.from_fd(message.fds[0])
                if self._templates is None or self._templates.done():
                    lent.close()  # nobody waits for it any more
                else:
                    self._templates.set_result(lent)
            case "ping":
                self.say({"type": "pong"})
            case "answer":
                waiting = self._asked.pop(body["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(body["body"])

    def _take_state(self, state: LoadState) -> None:
        before, self.state = self.state.phase, state
        if state.phase == before:
            return
        for changed in self._phase_watchers:
            changed.set()
        if state.phase == "failed":
            self._known.set()
            self.line.fail_all(self._refusal())
        self._on_phase(before, state.phase)

    def _front_gone(self) -> None:
        self.state = LoadState(phase="failed", stage=None)
        self._known.set()
        for changed in self._phase_watchers:
            changed.set()
        self.line.fail_all(self._refusal())
        self._on_end()

    def _refusal(self) -> ApiError:
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


def _piece(choice: int, item: Sequence[Any]) -> Piece:
    _, token, text, finish, prompt_tokens, logprob, top, cached_tokens = item
    if logprob is None:
        return Piece(choice, token, text, finish, prompt_tokens, cached_tokens=cached_tokens)
    own, *others = (TokenLogprob(t, p, s.encode("latin-1")) for t, p, s in [logprob, *top])
    return Piece(choice, token, text, finish, prompt_tokens, own, tuple(others), cached_tokens)
