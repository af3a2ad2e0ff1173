"""The workers of all models, seen from the gateway: at the other end of the socket to the front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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
from coldframe.runtime.gateway.exchange import CURRENT
from coldframe.runtime.gateway.link import FrontLink
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.questions import Questions
from coldframe.runtime.gateway.served import ServedModel
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.waiting import Hall

__all__ = ["FrontEngine"]

_TEMPLATES_S = 10.0

_MOST_NAMES = 16
"""So many names are told to who asks for a model that there is not."""


class FrontEngine:
    """An `api.Engine` whose workers are the front's.

    Args:
        channel: The socket to the front.
        settings: The models' names, and their lines' limits.
        metrics: Gets what happens to requests.
        on_phase: Called with a model, the phase that was and the one that is, when these differ.
        on_end: Called when the front is gone.
    """

    def __init__(
        self,
        channel: Channel,
        settings: GatewaySettings,
        metrics: Metrics,
        on_phase: Callable[[ServedModel, str, str], None],
        on_end: Callable[[], None],
    ) -> None:
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._templates: asyncio.Future[Channel] | None = None
        self.on_kv_events: Callable[[list[list[Any]]], None] = lambda _: None
        """Gets which KV has come and gone, where somebody wants to know."""
        self.on_leave: Callable[[], None] = lambda: None
        """Called when it is to leave whoever sends it requests beside HTTP."""
        self._link = FrontLink(channel, self._on_message, self._front_gone)
        send = self._link.send
        self._hall = Hall(settings.max_waiting_bytes)
        self._questions = Questions(send)
        self.models = {
            name: ServedModel(name, settings, self._hall, send, self._questions, metrics, on_phase)
            for name in settings.models
        }
        """By name; the first is meant where none is named."""
        self.default = self.models[settings.models[0]]

    # -- Engine ----------------------------------------------------------------------------------

    async def card(self, name: str | None, *, size: int = 0) -> ModelCard:
        model = self.pick(name)
        exchange = CURRENT.get()
        if exchange is not None:
            exchange.about(model.name)
        return await model.card(size=size)

    def submit(self, model: str, generations: Sequence[Generation], *, size: int) -> Stream:
        return self.models[model].submit(generations, size=size)

    # -- the models ------------------------------------------------------------------------------

    def pick(self, name: str | None) -> ServedModel:
        """The model of that name, or the first one.

        Raises:
            ApiError: There is none of that name (404).
        """
        if name is None:
            return self.default
        found = self.models.get(name)
        if found is None:
            some = [repr(known) for known in self.models][:_MOST_NAMES]
            if len(self.models) > _MOST_NAMES:
                some.append(f"{len(self.models) - _MOST_NAMES} more")
            told = " and ".join([", ".join(some[:-1]), some[-1]] if len(some) > 1 else some)
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist. This server has {told}.",
                param="model",
                code="model_not_found",
            )
        return found

    @property
    def ready(self) -> bool:
        """Whether requests should come here: one model is open, and none starts for the first time.

        A model that is started by the first request for it, rests, or starts again holds up nobody.
        """
        models = self.models.values()
        return any(m.state.open for m in models) and not any(m.starts_first for m in models)

    @property
    def health(self) -> str:
        """What a platform's probe is told of all models together; see `LoadState.health`."""
        if self.ready:
            return "ready"
        each = [model.state.health for model in self.models.values()]
        for word in ("draining", "starting"):
            if word in each:
                return word
        return each[0]

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
            return await asyncio.wait_for(self._templates, _TEMPLATES_S)
        finally:
            self._templates = None

    def give_up(self) -> None:
        """Ends the requests that are open: they had their time."""
        for model in self.models.values():
            model.give_up()

    # -- the front -------------------------------------------------------------------------------

    def say(self, body: dict[str, Any]) -> None:
        """Tells the front something."""
        self._link.send(body)

    def _on_message(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "tokens":
                for item in body["items"]:
                    line = self._hall.line_of(item[0])
                    if line is not None:  # else its request has gone meanwhile
                        line.token(item[0], item, _piece)
            case "given":
                line = self._hall.line_of(body["id"])
                if line is not None:
                    line.given(body["id"], body["params"])
            case "failed":
                line = self._hall.line_of(body["id"])
                if line is not None:
                    error = ApiError.of(ColdframeError.from_wire(body["error"]))
                    line.failed(body["id"], error)
            case "state":
                self.models[body["model"]].take_state(LoadState.from_wire(body))
            case "model":
                self.models[body["model"]].take_card(ModelCard.from_wire(body["card"]))
            case "templates":
                lent = Channel.from_fd(message.fds[0])
                if self._templates is None or self._templates.done():
                    lent.close()  # nobody waits for it any more
                else:
                    self._templates.set_result(lent)
            case "kv_events":
                self.on_kv_events(body["events"])
            case "leave":
                self.on_leave()
            case "ping":
                self.say({"type": "pong"})
            case "answer":
                self._questions.answered(body["id"], body["body"])

    def _front_gone(self) -> None:
        for model in self.models.values():
            model.take_state(LoadState(phase="failed", stage=None))
        self._on_end()


def _piece(choice: int, item: Sequence[Any]) -> Piece:
    _, token, text, finish, prompt_tokens, logprob, top, cached_tokens = item
    if logprob is None:
        return Piece(choice, token, text, finish, prompt_tokens, cached_tokens=cached_tokens)
    own, *others = (TokenLogprob(t, p, s.encode("latin-1")) for t, p, s in [logprob, *top])
    return Piece(choice, token, text, finish, prompt_tokens, own, tuple(others), cached_tokens)
