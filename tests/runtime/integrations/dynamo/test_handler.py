"""A worker's part of a request by its role, without Dynamo: what goes out, and what is freed."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from coldframe.runtime.gateway.api import ApiError, Generation, ModelCard, Piece, TokenLogprob
from coldframe.runtime.integrations.dynamo.first_token import FirstToken, first_token_of
from coldframe.runtime.integrations.dynamo.handler import Handler
from coldframe.runtime.integrations.dynamo.publishing import KvEvents, LoadCount
from coldframe.runtime.integrations.dynamo.settings import Role
from tests.runtime.integrations.dynamo.test_requests import CARD, request

EOS = 2
GIVEN = {"ticket": "of the KV"}


def at_once(test: Any) -> Any:
    """Runs a test in an event loop, for ten seconds at most."""

    @functools.wraps(test)
    def run(*args: Any, **given: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **given), 10))

    return run


class Said(Exception):
    """What Dynamo would have been told."""


class Stream:
    """Counts up from the last token of the prompt, as fast as it is read, or gives that away."""

    def __init__(self, generations: Sequence[Generation], gate: asyncio.Event | None) -> None:
        self.generations = generations
        self.gone = False
        self.given: Mapping[str, Any] | None = None
        self._gate = gate
        self._cancelled = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for choice, generation in enumerate(self.generations):
            ids = [*generation.prompt, *generation.generated]
            most = generation.params.max_tokens or 1
            for count in range(len(generation.generated), most):
                if self._gate is not None:
                    waits = [asyncio.create_task(e.wait()) for e in (self._gate, self._cancelled)]
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for wait in waits:
                        wait.cancel()
                if self._cancelled.is_set():
                    return
                token = int(ids[-1]) + 1
                ids.append(token)
                ends = "stop" if token == EOS else "length" if count == most - 1 else None
                own = TokenLogprob(token, -0.5, b"x") if generation.params.logprobs else None
                top = () if own is None else (own, TokenLogprob(9, -1.5, b"\xff"))
                yield Piece(choice, token, "t", ends, len(generation.prompt), own, top, 2)
                if ends == "stop":
                    break
                if generation.give:
                    self.given = GIVEN
                    break

    def cancel(self) -> None:
        self.gone = True
        self._cancelled.set()

    def timing(self) -> dict[str, float]:
        return {}


class Engine:
    """Answers, or refuses."""

    def __init__(self) -> None:
        self.refusal: ApiError | None = None
        self.gate: asyncio.Event | None = None
        self.streams: list[Stream] = []

    async def card(self, name: str | None, *, size: int = 0) -> ModelCard:
        assert name == "m"
        return CARD

    def submit(self, model: str, generations: Sequence[Generation], *, size: int) -> Stream:
        assert size > 0
        if self.refusal is not None:
            raise self.refusal
        self.streams.append(Stream(generations, self.gate))
        return self.streams[-1]


class Context:
    def __init__(self) -> None:
        self.stopped = asyncio.Event()

    def is_stopped(self) -> bool:
        return self.stopped.is_set()

    async def async_killed_or_stopped(self) -> bool:
        return await self.stopped.wait()


class Published:
    """What a publisher was told last."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def publish(self, *, kv_used_blocks: int) -> None:
        self.calls.append(kv_used_blocks)

    def publish_stored(self, *args: Any, parent_hash: int | None = None) -> None:
        self.calls.append(("stored", *args, parent_hash))

    def publish_removed(self, *args: Any) -> None:
        self.calls.append(("removed", *args))


class Bench:
    """A handler, and all that is around it."""

    def __init__(self, role: Role = "aggregated") -> None:
        self.engine = Engine()
        self.published = Published()
        self.load = LoadCount(self.published)
        self.handler = Handler(role, "m", self.engine, self.load, lambda e: Said(e.status))

    async def answer(self, context: Context | None = None, **parts: Any) -> list[dict[str, Any]]:
        asked = request(**parts)
        return [chunk async for chunk in self.handler.generate(asked, context)]

    def check_nothing_left(self) -> None:
        assert self.handler.open == 0
        assert self.load.blocks == 0
        assert all(stream.gone for stream in self.engine.streams)


def tokens(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for token in chunk["token_ids"]]


@at_once
async def test_an_answer_comes_token_by_token() -> None:
    bench = Bench()
    chunks = await bench.answer()
    assert tokens(chunks) == list(range(8, 17))
    assert [len(chunk["token_ids"]) for chunk in chunks] == [1] * 9
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * 8 + ["length"]
    usage = chunks[-1]["completion_usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 9, 12)
    bench.check_nothing_left()


@at_once
async def test_choices_have_numbers() -> None:
    chunks = await Bench().answer(sampling_options={"n": 2}, stop_conditions={"max_tokens": 2})
    assert [(chunk["index"], chunk["token_ids"]) for chunk in chunks] == [
        (0, [8]),
        (0, [9]),
        (1, [8]),
        (1, [9]),
    ]


@at_once
async def test_log_probabilities_are_beside_their_tokens() -> None:
    chunks = await Bench().answer(output_options={"logprobs": 2})
    for chunk in chunks:
        (token,) = chunk["token_ids"]
        assert chunk["log_probs"] == [-0.5]
        first, second = chunk["top_logprobs"][0]
        assert (first["rank"], first["token_id"], first["token"]) == (1, token, "x")
        assert (second["rank"], second["logprob"], second["bytes"]) == (2, -1.5, [255])


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
@at_once
async def test_an_error_is_told_as_dynamo_knows_it(status: int) -> None:
    bench = Bench()
    bench.engine.refusal = ApiError(status, "no")
    with pytest.raises(Said, match=str(status)):
        await bench.answer()
    bench.check_nothing_left()


@at_once
async def test_a_cancelled_request_is_freed_at_once() -> None:
    bench = Bench()
    bench.engine.gate = asyncio.Event()
    context = Context()
    answering = asyncio.create_task(bench.answer(context))
    while not bench.engine.streams:
        await asyncio.sleep(0)
    assert bench.handler.open == 1
    assert bench.load.blocks == 1
    context.stopped.set()
    (chunk,) = await answering
    assert (chunk["token_ids"], chunk["finish_reason"]) == ([], "cancelled")
    await bench.handler.until_idle()
    bench.check_nothing_left()


@at_once
async def test_who_reads_no_further_frees_it() -> None:
    bench = Bench()
    answer = bench.handler.generate(request(), Context())
    assert (await anext(answer))["token_ids"] == [8]
    await answer.aclose()  # type: ignore[attr-defined]
    bench.check_nothing_left()


@at_once
async def test_what_is_let_go_of_in_another_thread_is_freed_on_the_loop() -> None:
    """As Dynamo does it: its threads have no loop, and there is nobody who closes a generator."""
    bench = Bench()
    answers = [bench.handler.generate(request(), Context())]
    # What is asked for first in a thread without a loop is not the loop's to close.
    step = await asyncio.to_thread(lambda: answers[0].__anext__())
    assert (await step)["token_ids"] == [8]
    del step
    while bench.published.calls != [1]:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(answers.clear)
    await bench.handler.until_idle()
    await asyncio.sleep(0)
    bench.check_nothing_left()


@at_once
async def test_the_load_is_the_blocks_of_what_is_open() -> None:
    bench = Bench()
    bench.engine.gate = asyncio.Event()
    ids = list(range(10, 41))
    stops = {"max_tokens": 3}
    answering = asyncio.create_task(bench.answer(token_ids=ids, stop_conditions=stops))
    while bench.published.calls != [1]:
        await asyncio.sleep(0.01)
    bench.engine.gate.set()
    await answering
    while bench.published.calls[-1] != 0:
        await asyncio.sleep(0.01)
    bench.check_nothing_left()


@at_once
async def test_events_are_passed_on() -> None:
    published = Published()
    events = KvEvents(published)
    events.take([["stored", None, [1, 2], [5] * 64], ["stored", 2, [3], [6] * 32]])
    events.take([["removed", [3, 2]]])
    assert published.calls == [
        ("stored", [5] * 64, [32, 32], [1, 2], None),
        ("stored", [6] * 32, [32], [3], 2),
        ("removed", [3, 2]),
    ]
    assert (events.stored, events.removed) == (3, 2)


# -- prefill and decode apart ---------------------------------------------------------------------


async def handed_over(**parts: Any) -> dict[str, Any]:
    """What a decode worker gets behind a prefill worker."""
    (chunk,) = await Bench("prefill").answer(**parts)
    assert chunk["token_ids"] != []
    assert chunk["disaggregated_params"].keys() == {"kv_transfer_params"}
    return {**parts, "prefill_result": {"disaggregated_params": chunk["disaggregated_params"]}}


@pytest.mark.parametrize("logprobs", [None, 2])
@at_once
async def test_two_workers_answer_as_one(logprobs: int | None) -> None:
    parts = {"output_options": {"logprobs": logprobs}}
    whole = await Bench().answer(**parts)
    bench = Bench("decode")
    assert await bench.answer(**await handed_over(**parts)) == whole
    (stream,) = bench.engine.streams
    (generation,) = stream.generations
    assert generation.generated == (8,)
    assert generation.kv is not None
    assert generation.kv.items() >= GIVEN.items()
    bench.check_nothing_left()


@at_once
async def test_whoever_prefills_makes_one_token_whatever_is_asked() -> None:
    bench = Bench("prefill")
    (chunk,) = await bench.answer(sampling_options={"n": 3}, stop_conditions={"max_tokens": 9})
    assert chunk["token_ids"] == [8]
    bench.check_nothing_left()


@at_once
async def test_both_draw_with_the_same_seed() -> None:
    for given in (None, 7):
        parts = {"sampling_options": {"seed": given, "temperature": 1.0}}
        asked = await handed_over(**parts)
        first = first_token_of(request(**asked))
        assert first is not None
        bench = Bench("decode")
        await bench.answer(**asked)
        (generation,) = bench.engine.streams[0].generations
        assert generation.params.seed == first.seed
        assert generation.params.drawn == (given is None)
        assert given in (None, first.seed)


@at_once
async def test_an_answer_that_ends_with_its_first_token_is_not_gone_on_with() -> None:
    asked = await handed_over(token_ids=[EOS - 1])
    bench = Bench("decode")
    (chunk,) = await bench.answer(**asked)
    assert (chunk["token_ids"], chunk["finish_reason"]) == ([EOS], "stop")
    assert bench.engine.streams == []
    asked = await handed_over(stop_conditions={"max_tokens": 1})
    (chunk,) = await bench.answer(**asked)
    assert (chunk["token_ids"], chunk["finish_reason"]) == ([8], "length")
    assert bench.engine.streams == []


@at_once
async def test_without_a_first_token_all_is_computed() -> None:
    whole = await Bench().answer()
    bench = Bench("decode")
    for result in (None, {}, {"disaggregated_params": {"kv_transfer_params": {"do_remote": 1}}}):
        assert await bench.answer(prefill_result=result) == whole


@at_once
async def test_a_first_token_of_another_prompt_is_none() -> None:
    asked = await handed_over()
    longer = {**asked, "token_ids": [5, 6, 7, 8]}
    chunks = await Bench("decode").answer(**longer)
    assert tokens(chunks)[0] == 9


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"token": "8"},
        {"finish": "later"},
        {"logprob": [1]},
        {"top": None},
        {"seed": None},
    ],
)
@at_once
async def test_what_cannot_be_understood_is_refused(change: dict[str, Any]) -> None:
    asked = await handed_over()
    params = asked["prefill_result"]["disaggregated_params"]["kv_transfer_params"]
    (told,) = (value for name, value in params.items() if name not in GIVEN)
    told.update(change)
    with pytest.raises(Said, match="400"):
        await Bench("decode").answer(**asked)


def test_a_first_token_survives_its_way() -> None:
    piece = Piece(
        0, 8, "", None, 3, TokenLogprob(8, -0.1, b"\xf0"), (TokenLogprob(8, -0.1, b"\xf0"),), 1
    )
    first = FirstToken(piece, -5, 3)
    asked = request(
        prefill_result={"disaggregated_params": {"kv_transfer_params": first.to_params()}}
    )
    assert first_token_of(asked) == replace(first)
