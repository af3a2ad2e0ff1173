"""openai-python against `coldframe serve`: the answers are Transformers', cold or warm."""

from __future__ import annotations

import asyncio
import functools
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError, OpenAI

from tests.runtime.helpers import expected, prompt_of, reference
from tests.runtime.serving import Server, greedy, ids_of, request, served, together, tokenizer
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPT = "def main():\n    return"
EMOJI = "naïve 東京 🦉 — ₿"


@functools.cache
def chat_ids(model: Path, *contents: str) -> tuple[int, ...]:
    """The prompt of a chat, whose speakers take turns, as Transformers makes it."""
    from transformers import AutoTokenizer

    messages = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    rendered = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(rendered)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.heavy)])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(demo_model: Make, family: str) -> Path:
    return demo_model(family, "float32")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with served(model, "--model-name", "demo") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai(max_retries=0) as client:
        yield client


# -- the same text as Transformers' ---------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_completion_is_what_transformers_says(client: OpenAI, model: Path, stream: bool) -> None:
    want = greedy(model, ids_of(model, PROMPT), 40)
    if stream:
        chunks = list(
            client.completions.create(
                model="demo", prompt=PROMPT, max_tokens=40, stream=True, **GREEDY
            )
        )
        assert len(chunks) > 20  # it came in pieces
        text = "".join(chunk.choices[0].text for chunk in chunks)
        ends = [chunk.choices[0].finish_reason for chunk in chunks]
        assert ends == [None] * (len(ends) - 1) + ["length"]
    else:
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, **GREEDY)
        text = answer.choices[0].text
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids_of(model, PROMPT))
        assert answer.usage.completion_tokens == 40
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40
    assert text == want


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_chat_is_what_transformers_says(client: OpenAI, model: Path, stream: bool) -> None:
    contents = ("Who are you?", "An owl.", "Say it in Greek.")
    prompt = chat_ids(model, *contents)
    messages: Any = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    asked: dict[str, Any] = {"model": "demo", "messages": messages, "max_completion_tokens": 24}
    if stream:
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(**asked, stream=True, stream_options=options, **GREEDY)
        )
        *parts, last = chunks
        assert parts[0].choices[0].delta.role == "assistant"
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert parts[-1].choices[0].finish_reason == "length"
        assert all(part.usage is None for part in parts)
        assert last.choices == []
        usage = last.usage
    else:
        answer = client.chat.completions.create(**asked, **GREEDY)
        text, usage = answer.choices[0].message.content or "", answer.usage
        assert answer.choices[0].message.role == "assistant"
    assert text == greedy(model, prompt, 24)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 24)


def test_unicode_comes_whole(client: OpenAI, model: Path) -> None:
    prompt = ids_of(model, EMOJI)
    assert tokenizer(model).decode(list(prompt)) == EMOJI
    chunks = client.completions.create(
        model="demo", prompt=EMOJI, max_tokens=30, stream=True, **GREEDY
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == greedy(model, prompt, 30)


def test_many_at_once_have_the_answers_that_they_have_alone(server: Server, model: Path) -> None:
    prompts = [prompt_of(5 + 3 * i, seed=i) for i in range(8)]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def streamed(prompt: list[int]) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=8, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(streamed(prompt) for prompt in prompts))

    texts = asyncio.run(ask())
    assert texts == [greedy(model, tuple(prompt), 8) for prompt in prompts]


# -- prompts --------------------------------------------------------------------------------------


def test_prompts_of_every_form(client: OpenAI, model: Path) -> None:
    texts = [PROMPT, "import os"]
    ids = [list(ids_of(model, text)) for text in texts]
    want = [greedy(model, tuple(prompt), 8) for prompt in ids]
    for prompt, answers in (
        (texts[0], want[:1]),
        (texts, want),
        (ids[0], want[:1]),
        (ids, want),
    ):
        answer = client.completions.create(
            model="demo",
            prompt=prompt,  # type: ignore[arg-type]
            max_tokens=8,
            **GREEDY,
        )
        assert [choice.text for choice in answer.choices] == answers
        assert [choice.index for choice in answer.choices] == list(range(len(answers)))
        assert answer.usage is not None
        count = sum(len(each) for each in ids[: len(answers)])
        assert answer.usage.prompt_tokens == count
        assert answer.usage.completion_tokens == 8 * len(answers)


@pytest.mark.heavy
def test_a_long_answer_fills_the_context(client: OpenAI, model: Path) -> None:
    prompt = prompt_of(24)
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=1000, **GREEDY)
    assert answer.choices[0].finish_reason == "length"
    # The rest is as right as this: Transformers would take a minute for it.
    assert answer.choices[0].text.startswith(greedy(model, tuple(prompt), 200))
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model="demo", prompt=prompt, max_tokens=1001, **GREEDY)
    assert caught.value.code == "context_length_exceeded"


# -- log-probabilities ----------------------------------------------------------------------------


@functools.cache
def log_softmax(model: Path, prompt: tuple[int, ...], count: int) -> Any:
    """Transformers' log-probabilities of each of its greedy tokens' rivals: [count, vocabulary]."""
    import torch

    answer = expected(model, prompt, count)
    with torch.inference_mode():
        logits = reference(model)(torch.tensor([[*prompt, *answer]])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]


def test_logprobs_of_a_completion(client: OpenAI, model: Path) -> None:
    prompt = ids_of(model, PROMPT)
    logprobs = log_softmax(model, prompt, 12)
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, logprobs=3, **GREEDY
    )
    got = answer.choices[0].logprobs
    assert got is not None
    assert got.token_logprobs is not None
    assert got.tokens is not None
    assert got.text_offset is not None
    assert got.top_logprobs is not None
    chosen = [float(logprobs[i, token]) for i, token in enumerate(expected(model, prompt, 12))]
    assert got.token_logprobs == pytest.approx(chosen, abs=2e-3)
    assert "".join(got.tokens) == answer.choices[0].text
    for place, (offset, token) in enumerate(zip(got.text_offset, got.tokens, strict=True)):
        assert answer.choices[0].text[offset:].startswith(token)
        best = logprobs[place].topk(3).values.tolist()
        assert sorted(got.top_logprobs[place].values(), reverse=True) == pytest.approx(
            best, abs=2e-3
        )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_logprobs_of_a_chat(client: OpenAI, model: Path, stream: bool) -> None:
    prompt = chat_ids(model, "Hello!")
    logprobs = log_softmax(model, prompt, 10)
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
        **GREEDY,
    }
    entries: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            found = chunk.choices[0].logprobs
            entries += (found.content or []) if found else []
    else:
        found = client.chat.completions.create(**asked).choices[0].logprobs
        assert found is not None
        entries = list(found.content or [])
    tokens = expected(model, prompt, 10)
    assert [entry.logprob for entry in entries] == pytest.approx(
        [float(logprobs[i, token]) for i, token in enumerate(tokens)], abs=2e-3
    )
    spelled = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelled.decode() == greedy(model, prompt, 10)
    for place, entry in enumerate(entries):
        best = logprobs[place].topk(2).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=2e-3)


# -- what shapes an answer ------------------------------------------------------------------------


def test_stop_strings_end_an_answer(client: OpenAI, model: Path) -> None:
    whole = greedy(model, ids_of(model, PROMPT), 40)
    # In the middle of the answer, and across tokens as they may fall.
    stop = whole[30:36]
    want = whole[: whole.index(stop)]
    for given in (stop, ["never ever", stop]):
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=40, stop=given, **GREEDY
        )
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want, "stop")
        chunks = list(
            client.completions.create(
                model="demo", prompt=PROMPT, max_tokens=40, stop=given, stream=True, **GREEDY
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == want
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_was_not_computed_is_told(client: OpenAI, model: Path, stream: bool) -> None:
    prompt = prompt_of(90, seed=77 + stream)
    found = []
    for _ in range(2):
        if stream:
            *_, last = client.completions.create(
                model="demo",
                prompt=prompt,
                max_tokens=3,
                stream=True,
                stream_options={"include_usage": True},
                **GREEDY,
            )
            usage = last.usage
        else:
            usage = client.completions.create(
                model="demo", prompt=prompt, max_tokens=3, **GREEDY
            ).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        found.append(usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 64]


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def ask(seed: int | None, n: int = 3) -> list[str]:
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=12, n=n, seed=seed, temperature=1
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert len(set(first)) == 3
    assert ask(7) == first
    assert ask(7, n=1) == first[:1]
    assert ask(8) != first
    assert ask(None) != ask(None)


def test_choices_of_a_stream_are_told_apart(client: OpenAI) -> None:
    texts = ["", ""]
    ends = []
    for chunk in client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=12,
        n=2,
        seed=5,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends.append(choice.index)
    assert sorted(ends) == [0, 1]
    again = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=12,
        n=2,
        seed=5,
        extra_body={"ignore_eos": True},
    )
    assert [choice.message.content for choice in again.choices] == texts
    assert texts[0] != texts[1]


def test_a_bias_forces_a_token(client: OpenAI, model: Path) -> None:
    (token,) = tokenizer(model).encode(" self", add_special_tokens=False).ids
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=4, logit_bias={str(token): 100}, **GREEDY
    )
    assert answer.choices[0].text == " self" * 4


def test_the_models_own_end_is_a_stop(client: OpenAI, model: Path) -> None:
    end = tokenizer(model).token_to_id("<|endoftext|>")
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(end): 100}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


# -- the rest of the surface ----------------------------------------------------------------------


def test_the_model_is_listed(client: OpenAI) -> None:
    (only,) = client.models.list().data
    assert only.id == "demo"
    assert client.models.retrieve("demo") == only
    for name in ("other", "org/other"):
        with pytest.raises(NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"


def test_mistakes_are_told_with_the_field(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="Hi")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    messages: Any = [{"role": "user", "content": "Hi"}]
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for wrong, param in (
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_p": "high"}, "top_p"),
        ({"stop": [1]}, "stop[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [tool]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
    ):
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(**{"model": "demo", "messages": messages, **wrong})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


# -- clients that come while it is cold -----------------------------------------------------------


def test_who_asks_a_cold_server_is_answered_without_knowing(demo_model: Make) -> None:
    model = demo_model("llama", "float32")
    want = greedy(model, ids_of(model, PROMPT), 8)
    with served(model, "--model-name", "demo") as server, server.openai(max_retries=0) as client:
        # The port is bound before anything else is there, so nobody has slept here.
        asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, **GREEDY}
        whole, streamed, listed = together(
            [
                lambda: client.completions.create(**asked),
                lambda: list(client.completions.create(**asked, stream=True)),
                client.models.list,
            ]
        )
        assert whole.choices[0].text == want
        assert "".join(chunk.choices[0].text for chunk in streamed) == want
        assert [each.id for each in listed.data] == ["demo"]
        spans = server.get("/startup").json()["timeline"]["stages"]
        ends = [s["end_s"] for s in spans if (s["name"], s["process"]) == ("listen", "front")]
        starts = [s["start_s"] for s in spans if s["name"] == "process_spawn"]
        assert len(starts) >= 4
        assert min(starts) >= ends[0]


@pytest.mark.heavy
def test_who_is_told_to_come_again_does_and_is_answered(demo_model: Make) -> None:
    model = demo_model("llama", "float32")
    # 4 MB of weights; there is one place with the workers and one in the line.
    narrow = ("--throttle", "3MB/s", "--max-running", 1, "--max-waiting", 1)
    with served(model, "--model-name", "demo", *narrow) as server:
        asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, **GREEDY}
        with server.openai(max_retries=0) as impatient, server.openai(max_retries=9) as patient:

            def come(seed: int) -> Any:
                try:
                    return impatient.completions.create(**asked, seed=seed)
                except InternalServerError as error:
                    return error

            answers = together(
                [functools.partial(come, i) for i in range(5)]
                + [lambda: patient.completions.create(**asked)]
            )
        refused = [each for each in answers if isinstance(each, InternalServerError)]
        assert len(refused) in (3, 4)  # the patient one may have been among the first two
        for error in refused:
            assert (error.status_code, error.code) == (503, "queue_full")
            assert 0 < float(error.response.headers["retry-after"]) <= 120
        texts = [each.choices[0].text for each in answers if each not in refused]
        assert texts == [greedy(model, ids_of(model, PROMPT), 4)] * (6 - len(refused))


# -- clients that go ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight(demo_model: Make) -> Iterator[Server]:
    """One request at a time, and KV for no more than one that fills the context."""
    model = demo_model("llama", "float32")
    flags = ("--max-running", 1, "--kv-memory", "2MiB")
    with served(model, "--model-name", "demo", *flags) as server:
        yield server


WHOLE = {"model": "demo", "prompt": [5] * 24, "max_tokens": 1000, **GREEDY}
"""It takes all the KV that there is."""


def nothing_is_open(server: Server) -> bool:
    metrics = server.metrics()
    return not any(metrics[f"coldframe_num_requests_{where}"] for where in ("running", "waiting"))


def test_who_goes_in_mid_stream_frees_place_and_kv(tight: Server) -> None:
    with tight.openai(max_retries=0) as client:
        for _ in range(3):
            stream = client.completions.create(**WHOLE, stream=True)
            next(iter(stream))
            stream.close()
        # Were one of them still there, this one would wait for its KV for seconds.
        last = client.completions.create(**WHOLE, stream=True)
        next(iter(last))
        assert tight.metrics()["coldframe_num_requests_running"] == 1
        last.close()
        eventually(lambda: nothing_is_open(tight))


def test_who_goes_before_the_answer_frees_its_place_in_the_line(tight: Server) -> None:
    with tight.openai(max_retries=0) as client:
        stream = client.completions.create(**WHOLE, stream=True)
        next(iter(stream))
        socks = []
        for _ in range(4):
            sock = tight.connect()
            sock.sendall(request("/v1/completions", b'{"prompt": "a", "max_tokens": 900}'))
            socks.append(sock)
        eventually(lambda: tight.metrics()["coldframe_num_requests_waiting"] == 4)
        # One goes without a word, one says that it is done, one is reset, and one waits.
        socks[0].close()
        socks[1].shutdown(socket.SHUT_WR)
        socks[2].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        socks[2].close()
        eventually(lambda: tight.metrics()["coldframe_num_requests_waiting"] == 1)
        stream.close()
        socks[3].close()
        socks[1].close()
        eventually(lambda: nothing_is_open(tight))


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_of_clients_that_go_whenever_they_like(tight: Server, seed: int) -> None:
    chance = random.Random(seed)

    async def come_and_go(client: AsyncOpenAI, count: int, patience: float) -> None:
        asked: dict[str, Any] = {
            "model": "demo",
            "prompt": prompt_of(count, seed=count),
            "max_tokens": 40 * count,
            "n": chance.choice([1, 2]),
            **GREEDY,
        }
        try:
            async with asyncio.timeout(patience):
                if count % 2:
                    async for _ in await client.completions.create(**asked, stream=True):
                        pass
                else:
                    await client.completions.create(**asked)
        except TimeoutError:
            pass

    async def all_of_them() -> None:
        async with AsyncOpenAI(base_url=f"{tight.url}/v1", api_key="none", max_retries=0) as client:
            jobs = [
                come_and_go(client, chance.randint(1, 24), chance.expovariate(2)) for _ in range(50)
            ]
            await asyncio.gather(*jobs)

    asyncio.run(all_of_them())
    eventually(lambda: nothing_is_open(tight))
    eventually(lambda: tight.metrics()["coldframe_kv_blocks{used}"] == 0)
    assert tight.complete(**{name: WHOLE[name] for name in ("prompt", "max_tokens")})
