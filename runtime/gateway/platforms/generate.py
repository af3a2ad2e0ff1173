"""Hugging Face's text generation, at `/` of its endpoints and among others at `/invocations`.

    {"inputs": text or list of texts, "parameters"?: {...}, "stream"?: bool}
    [{"generated_text": text, "details"?: {...}}, ...]

Source: the OpenAPI document of text-generation-inference. Streams are its token events; OpenAI's
chunks do not say which tokens they are, so all of them have the id -1 and the logprob 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, OpenAIEvents, Requests, sse
from coldframe.runtime.gateway.platforms.invoke import OpenAIAdapter
from coldframe.runtime.gateway.platforms.parameters import (
    choice_text,
    mapping,
    messages,
    openai_parameters,
    prompts,
    refused,
    single,
    switch,
)

__all__ = ["HuggingFaceAdapter", "SageMakerAdapter", "read_generate"]

_SHAPES = (
    '{"messages": [...]} (OpenAI chat), {"prompt": ...} (OpenAI completion) or '
    '{"inputs": text or list of texts, "parameters": {...}} (Hugging Face)'
)


def read_generate(body: Mapping[str, Any], *, stream: bool) -> Requests:
    """A body with `inputs`.

    Args:
        body: `inputs`, and maybe `parameters` and `model`.
        stream: Whether the answer is streamed.

    Raises:
        ApiError: It is not such a body.
    """
    given = dict(mapping(body.get("parameters"), "parameters"))
    full, details = switch(given, "return_full_text"), switch(given, "details")
    for name in ("return_full_text", "details"):
        given.pop(name, None)
    parameters = openai_parameters(given, greedy=True)
    if body.get("model") is not None:
        parameters["model"] = body["model"]
    value = body.get("inputs")
    if messages(value):
        if full:
            raise refused("return_full_text needs a text, not messages.", "return_full_text")
        texts: list[str] = []
        items: list[tuple[str, dict[str, Any]]] = [("chat", {**parameters, "messages": value})]
    else:
        texts = prompts(value, "inputs")
        items = [("completion", {**parameters, "prompt": text}) for text in texts]
    if stream:
        single(len(items), parameters)
        for _, item in items:
            item |= {"stream": True, "stream_options": {"include_usage": True}}
    notes = {"before": texts if full else None, "details": details}
    return Requests(tuple(items), stream, "generate", notes)


class SageMakerAdapter:
    """One route for all schemas: each is tried in turn, by what the body has."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        if isinstance(body, dict):
            if "messages" in body or "prompt" in body:
                return OpenAIAdapter().read(body)
            if "inputs" in body:
                return read_generate(body, stream=switch(body, "stream"))
        raise refused(f"The body must be one of: {_SHAPES}.", "inputs")

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        if requests.shape != "generate":
            return answers[0]
        written = []
        for index, ((_, request), answer) in enumerate(zip(requests.items, answers, strict=True)):
            texts = requests.notes["before"]
            before = texts[index] if texts else ""
            for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
                row: dict[str, Any] = {"generated_text": before + choice_text(choice)}
                if requests.notes["details"]:
                    count = (answer.get("usage") or {}).get("completion_tokens")
                    row["details"] = _details(request, choice.get("finish_reason"), count)
                written.append(row)
        return written

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, error.to_openai()

    def events(self, requests: Requests) -> Events:
        return _TokenEvents(requests) if requests.shape == "generate" else OpenAIEvents()


class HuggingFaceAdapter(SageMakerAdapter):
    """The same bodies, with the errors of text-generation-inference."""

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, _error(error)


def _error(error: ApiError) -> dict[str, Any]:
    if error.status == 429:
        kind = "overloaded"
    else:
        kind = "validation" if error.status < 500 else "generation"
    return {"error": error.message, "error_type": kind, **error.more}


def _details(request: Mapping[str, Any], end: object, count: object) -> dict[str, Any]:
    """OpenAI says `stop` for a stop string and the model's own end; only one of them was asked."""
    if end == "stop":
        end = "stop_sequence" if request.get("stop") else "eos_token"
    return {
        "finish_reason": end,
        "generated_tokens": count,
        "seed": request.get("seed"),
        "prefill": [],
        "tokens": [],
    }


class _TokenEvents:
    """`{"index", "token": {...}, "generated_text": null}`; the last has the text and the details.

    There the last one is the last token's. Here it is one without text, as there for the model's
    own end: no token waits until it is known whether another comes.
    """

    def __init__(self, requests: Requests) -> None:
        self._request = requests.items[0][1]
        before = requests.notes["before"]
        self._text = before[0] if before else ""
        self._index = 0
        self._end: object = None
        self._count: object = None

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        self._count = (chunk.get("usage") or {}).get("completion_tokens", self._count)
        frames = b""
        for choice in chunk.get("choices", ()):
            text = choice_text(choice)
            self._end = choice.get("finish_reason") or self._end
            if text:
                self._text += text
                frames += self._event(text)
        return frames

    def done(self) -> bytes:
        details = _details(self._request, self._end, self._count)
        return self._event("", self._text, details)

    def failed(self, error: ApiError) -> bytes:
        return sse(_error(error))

    def _event(
        self, text: str, whole: str | None = None, details: dict[str, Any] | None = None
    ) -> bytes:
        self._index += 1
        token = {"id": -1, "text": text, "logprob": 0.0, "special": whole is not None}
        return sse(
            {"index": self._index, "token": token, "generated_text": whole, "details": details}
        )
