"""The front's end of the socket to the gateway: its requests go to the workers, tokens go back.

What the gateway says is checked like a stranger's words: it is the process that talks to clients,
and runs as nobody. The worst that it can do is to ask for answers, as many at once as it may. One
that says anything else is not the gateway that was started, and is ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.transport.base import Given

__all__ = ["FrontDesk"]

_SEND_S = 10
_START_S = 300.0
"""How long a gateway may take to say its first word, in seconds."""
_SILENCE_S = 30.0
"""How long it may leave a ping unanswered from then on: its loop does nothing that takes long."""
_PING_S = 5.0


class FrontDesk:
    """One gateway's requests.

    Args:
        channel: The socket to it.
        fleet: Has requests answered.
        answers: What it may ask for by `ask`, by name; each gets a model's name.
        most: Requests that it may have open.
        on_other: Gets the messages that are not about requests.
        on_wrong: Told what was no message of a gateway, before that is ended.
        on_end: Called when the gateway is gone. Its requests have been cancelled then.
    """

    def __init__(
        self,
        channel: Channel,
        fleet: Fleet,
        answers: dict[str, Callable[[str], dict[str, Any]]],
        most: int,
        on_other: Callable[[Message], None],
        on_wrong: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._fleet = fleet
        self._answers = answers
        self._most = most
        self._on_other = on_other
        self._on_wrong = on_wrong
        self._on_end = on_end
        self._requests: dict[int, tuple[Supervisor, str]] = {}
        """Whose they are, and what they are called there."""
        self._tokens: list[list[Any]] = []
        self._ended = False
        self._clock = AwakeClock()
        self._heard = self._pinged = self._clock()
        self._spoke = False
        channel.set_send_timeout(_SEND_S)
        fleet.loop.watch(channel.fileno(), self._read)

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Tells the gateway something."""
        if self._ended:
            return
        try:
            self._channel.send(body, fds)
        except ReplicaError:
            self._end()  # dead, or as good as that: it does not read

    def flush(self) -> None:
        """Sends the tokens that have come since the last time; to be called after each poll."""
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            self.send({"type": "tokens", "items": tokens})

    def watch(self) -> None:
        """Hangs up on a gateway that hangs; to be called about once a second."""
        if self._ended:
            return
        moment = self._clock()
        if moment - self._heard > (_SILENCE_S if self._spoke else _START_S):
            self._on_wrong("nothing, and that for too long")
            self._end()
        elif self._spoke and moment - self._pinged > _PING_S:
            self._pinged = moment
            self.send({"type": "ping"})

    def close(self) -> None:
        """Hangs up; what it had asked for is cancelled."""
        if self._ended:
            return
        self._ended = True
        self._fleet.loop.unwatch(self._channel.fileno())
        self._channel.close()
        requests, self._requests = self._requests, {}
        for model, request in requests.values():
            model.cancel(request)

    def _read(self) -> None:
        messages, ended = self._channel.receive_ready()
        self._heard, self._spoke = self._clock(), True
        for message in messages:
            for fd in message.fds:
                os.close(fd)  # none is asked for
            if self._ended:
                return  # it does not read any more
            try:
                self._take(message)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self._on_wrong(f"{message.kind[:40]!r}: {type(error).__name__}: {error}"[:200])
                ended = True
        if ended:
            self._end()

    def _take(self, message: Message) -> None:
        """Does what a message says.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: It is none of the protocol's.
        """
        body = message.body
        match message.kind:
            case "submit":
                self._submit(body)
            case "cancel":
                found = self._requests.pop(_number(body["id"]), None)
                if found is not None:
                    model, request = found
                    model.cancel(request)
            case "ask":
                self._answer(body)
            case "pong":
                pass  # that something came is what counts
            case _:
                self._on_other(message)

    def _end(self) -> None:
        if not self._ended:
            self.close()
            self._on_end()

    def _submit(self, body: dict[str, Any]) -> None:
        number, text, ids = _number(body["id"]), body["prompt"], body["prompt_ids"]
        if (text is None) == (ids is None) or number in self._requests:
            raise ValueError("neither a text nor ids, or both, or it is open already")
        if len(self._requests) >= self._most:
            raise ValueError("more requests than it may have open")
        if text is not None and not isinstance(text, str):
            raise TypeError("the text is none")
        model = self._fleet[body["model"]]
        try:
            params = SamplingParams.from_wire(body["params"])
            params.validate(model.model.spec.vocab_size)
            if params.needs == "vllm" and not model.has_vllm:
                raise _no_vllm()
            listener = _Listener(self, number)
            request = model.submit(
                params,
                listener,
                prompt=text,
                prompt_ids=None if ids is None else tuple(_number(i) for i in ids),
                add_special=body["add_special"] is True,
                generated_ids=tuple(_number(i) for i in body.get("generated_ids", ())),
                give=body.get("give") is True,
                kv=Given.from_params(body.get("kv")),
            )
            self._requests[number] = model, request
        except ColdframeError as error:
            self.refuse(number, error)

    def _answer(self, body: dict[str, Any]) -> None:
        told = self._answers[str(body["what"])](body["model"])
        self.send({"type": "answer", "id": _number(body["id"]), "body": told})

    def token(self, number: int, event: TokenEvent) -> None:
        """A token for one of its requests."""
        if event.finish is not None:
            self._requests.pop(number, None)
        own, top = None, []
        if event.logprob is not None:
            spelled = [spelling.decode("latin-1") for spelling in event.spellings]
            own = [event.token, event.logprob, spelled[0]]
            top = [[t, p, s] for (t, p), s in zip(event.top, spelled[1:], strict=True)]
        self._tokens.append(
            [
                *(number, event.token, event.text, event.finish),
                *(event.prompt_tokens, own, top, event.cached_tokens),
            ]
        )

    def given(self, number: int, given: Given) -> None:
        """Another replica is to go on with one of its requests."""
        self._requests.pop(number, None)
        self.flush()
        self.send({"type": "given", "id": number, "params": given.to_params()})

    def refuse(self, number: int, error: ColdframeError) -> None:
        """One of its requests has failed."""
        self._requests.pop(number, None)
        self.flush()
        self.send({"type": "failed", "id": number, "error": error.to_wire()})


def _no_vllm() -> RequestError:
    return RequestError(
        "only vLLM can serve this, and the replica has none",
        where="structured",
        hint="Start the server with --decode native,vllm.",
    )


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError("a whole number was expected")
    return value


class _Listener:
    """Who asked, behind the gateway."""

    __slots__ = ("_desk", "_number")

    def __init__(self, desk: FrontDesk, number: int) -> None:
        self._desk = desk
        self._number = number

    def on_token(self, event: TokenEvent) -> None:
        self._desk.token(self._number, event)

    def on_given(self, given: Given) -> None:
        self._desk.given(self._number, given)

    def on_error(self, error: ColdframeError) -> None:
        self._desk.refuse(self._number, error)
