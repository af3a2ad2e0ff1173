"""Answers the requests of Dynamo's request plane: each role its part of them.

    aggregated   all of it
    prefill      the first token, with what a decode worker has to know of it
    decode       that token, at once, and then the others; all of it where there was no prefill

Requests stand in the gateway's line, beside those that come over HTTP: they wait for a start there,
and for a place. What ends with this worker alone is an error that Dynamo takes to another one, with
the tokens that the client has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from coldframe.runtime.gateway.api import ApiError, Engine, Generation, Piece, Stream
from coldframe.runtime.integrations.dynamo.chunks import Chunk, Counts, cancelled, chunk_of
from coldframe.runtime.integrations.dynamo.first_token import FirstToken, first_token_of
from coldframe.runtime.integrations.dynamo.requests import generations_of
from coldframe.runtime.integrations.dynamo.settings import Role

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Context", "Handler", "Load"]

_GO_ON = 2
"""Tokens that an answer is to have at least, for another worker to go on with it."""
_TOKEN_BYTES = 8
"""What a token of a request that waits takes, about."""


class Context(Protocol):
    """What Dynamo says of a request beside it."""

    def is_stopped(self) -> bool: ...

    async def async_killed_or_stopped(self) -> bool: ...


class Load(Protocol):
    """Who is told of what there is to do."""

    def begin(self, prompt_tokens: int) -> int:
        """A sequence has come: a number for it."""
        ...

    def token(self, number: int) -> None: ...

    def end(self, number: int) -> None: ...


class Handler:
    """One worker's requests.

    Args:
        role: Its part.
        model: As clients call the model.
        engine: Answers.
        load: Is told of what there is to do.
        error: Makes the exception that Dynamo understands of an error.
    """

    def __init__(
        self,
        role: Role,
        model: str,
        engine: Engine,
        load: Load,
        error: Callable[[ApiError], Exception],
    ) -> None:
        self._role = role
        self._model = model
        self._engine = engine
        self._load = load
        self._error = error
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Requests that have no answer yet."""
        return self._open

    async def until_idle(self) -> None:
        """Waits until there is none."""
        await self._idle.wait()

    async def generate(
        self, request: Mapping[str, Any], context: Context | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """A request's answer, chunk by chunk.

        Raises:
            Exception: What Dynamo makes an error of, where there is none.
        """
        self._open += 1
        self._idle.clear()
        loop = asyncio.get_running_loop()
        try:
            async with aclosing(self._answer(request, context)) as answer:
                async for chunk in answer:
                    yield chunk
        except ApiError as error:
            raise self._error(error) from None  # Dynamo logs it with all that is behind it
        finally:
            _on(loop, self._ended)

    def _ended(self) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()

    async def _answer(
        self, request: Mapping[str, Any], context: Context | None
    ) -> AsyncGenerator[Chunk, None]:
        card = await self._engine.card(self._model)
        generations = generations_of(request, card)
        prompt_tokens = len(request["token_ids"])
        counts = Counts(prompt_tokens)
        if self._role == "prefill":
            async with aclosing(self._prefill(generations[0], counts, context)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        if self._role == "decode" and len(generations) == 1:
            first = first_token_of(request)
            if first is not None:
                piece = _as_asked(first.piece, generations[0])
                yield chunk_of(piece, counts)
                if piece.finish is not None:
                    return
                generations = (_behind(first, generations[0], request),)
        async with aclosing(self._pieces(generations, context)) as pieces:
            async for piece in pieces:
                yield chunk_of(piece, counts)
        if context is not None and context.is_stopped():
            yield cancelled(counts)

    async def _prefill(
        self, generation: Generation, counts: Counts, context: Context | None
    ) -> AsyncGenerator[Chunk, None]:
        params = generation.params.with_seed()
        assert params.seed is not None
        # Dynamo asks for one token; whether the answer goes on behind it is not known here, and its
        # KV is kept for that.
        asked = replace(generation, params=replace(params, max_tokens=_GO_ON), give=True)
        given: list[Mapping[str, Any] | None] = []
        chunk: Chunk | None = None
        async with aclosing(self._pieces((asked,), context, given.append)) as pieces:
            async for piece in pieces:
                finish = "stop" if piece.finish == "stop" else None
                first = FirstToken(replace(piece, finish=finish), params.seed, piece.prompt_tokens)
                chunk = chunk_of(piece, counts)
                chunk["disaggregated_params"] = {"kv_transfer_params": first.to_params()}
        if chunk is not None:
            chunk["disaggregated_params"]["kv_transfer_params"] |= given[0] or {}
            yield chunk

    async def _pieces(
        self,
        generations: tuple[Generation, ...],
        context: Context | None,
        given: Callable[[Mapping[str, Any] | None], None] = lambda _: None,
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer; none from the moment on that nobody wants them any more.

        Args:
            generations: The sequences.
            context: Says when nobody wants them.
            given: Told at the end what another replica is to know that goes on with it.
        """
        size = _TOKEN_BYTES * sum(len(generation.prompt) for generation in generations)
        stream = self._engine.submit(self._model, generations, size=size)
        numbers = [self._load.begin(len(generation.prompt)) for generation in generations]
        loop = asyncio.get_running_loop()

        def end() -> None:
            stream.cancel()
            for number in numbers:
                self._load.end(number)

        try:
            with _cancelled_with(context, stream):
                async for piece in stream:
                    self._load.token(numbers[piece.choice])
                    yield piece
            given(stream.given)
        finally:
            _on(loop, end)


def _on(loop: asyncio.AbstractEventLoop, do: Callable[[], object]) -> None:
    """Does something on the loop: at once, where this is it.

    Dynamo lets go of an answer in a thread of its own, without a loop, where nobody reads it any
    more; what is behind a generator's last `yield` is run there then.
    """
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        do()
    else:
        with suppress(RuntimeError):  # all is over
            loop.call_soon_threadsafe(do)


def _as_asked(piece: Piece, generation: Generation) -> Piece:
    """The first token as the whole request has it, which may ask for no other."""
    if piece.finish is None and generation.params.max_tokens == 1:
        return replace(piece, finish="length")
    return piece


def _behind(first: FirstToken, generation: Generation, request: Mapping[str, Any]) -> Generation:
    """What is left of a request when its first token is there; with its KV where that is kept."""
    kv = request["prefill_result"]["disaggregated_params"]["kv_transfer_params"]
    params = generation.params
    if params.seed is None:
        params = replace(params, seed=first.seed, drawn=True)
    return replace(generation, params=params, generated=(first.piece.token,), kv=kv)


@contextmanager
def _cancelled_with(context: Context | None, stream: Stream) -> Iterator[None]:
    """Cancels an answer when its request is: the workers compute nothing more of it."""
    if context is None:
        yield
        return

    async def follow() -> None:
        await context.async_killed_or_stopped()
        stream.cancel()

    following, loop = asyncio.ensure_future(follow()), asyncio.get_running_loop()
    try:
        yield
    finally:
        _on(loop, following.cancel)
