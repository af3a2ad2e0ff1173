"""OpenAI's bodies behind one route, and coldframe's own small `/invoke`.

    {"prompt" | "messages" | "input" | "inputs": ..., "parameters"?: {...}, "stream"?: bool}
    {"output": text or list of texts, "finish_reason": ..., "usage": {...}, "model": ...}

Parameters stand beside the prompt or under `parameters`, by OpenAI's names or Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, OpenAIEvents, Requests, sse
from coldframe.runtime.gateway.platforms.parameters import (
    choice_text,
    mapping,
    messages,
    openai_parameters,
    refused,
    single,
    switch,
)

__all__ = ["InvokeAdapter", "OpenAIAdapter"]

_PROMPTS = ("prompt", "messages", "input", "inputs")


class OpenAIAdapter:
    """Chat and completion bodies at one route, told apart by what is in them."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        if isinstance(body, dict):
            for kind, name in (("chat", "messages"), ("completion", "prompt")):
                if name in body:
                    return Requests(((kind, body),), switch(body, "stream"))
        raise refused('The body must be a JSON object with "messages" or "prompt".')

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        return answers[0]

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, error.to_openai()

    def events(self, requests: Requests) -> Events:
        return OpenAIEvents()


class InvokeAdapter:
    """JSON in, JSON or server-sent events out."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        fields = mapping(body, "The body")
        given = [name for name in _PROMPTS if fields.get(name) is not None]
        if len(given) != 1:
            raise refused(f"The body must have one of {', '.join(_PROMPTS)}.", "prompt")
        name = given[0]
        beside = {key: value for key, value in fields.items() if key not in (name, "parameters")}
        parameters = openai_parameters(
            {**mapping(fields.get("parameters"), "parameters"), **beside}
        )
        if fields.get("model") is not None:
            parameters["model"] = fields["model"]
        chat = name == "messages" or (name != "prompt" and messages(fields[name]))
        kind = "chat" if chat else "completion"
        request = {**parameters, "messages" if chat else "prompt": fields[name]}
        stream = switch(fields, "stream") or sse
        if stream:
            # Where a prompt is a list, only OpenAI's reader knows how many it is.
            single(len(fields[name]) if _many(fields[name]) and not chat else 1, request)
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return Requests(
            ((kind, request),), stream, notes={"many": not chat and _many(fields[name])}
        )

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        answer = answers[0]
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        texts = [choice_text(choice) for choice in choices]
        ends = [choice.get("finish_reason") for choice in choices]
        many = requests.notes["many"] or len(choices) > 1
        return {
            "output": texts if many else texts[0],
            "finish_reason": ends if many else ends[0],
            "usage": answer.get("usage"),
            "model": answer.get("model"),
        }

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, error.to_openai()

    def events(self, requests: Requests) -> Events:
        return _InvokeEvents()


def _many(prompt: object) -> bool:
    """Whether this is a list of prompts, and not one prompt, of text or of token ids."""
    return isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)


class _InvokeEvents(OpenAIEvents):
    """`{"output": text}` for what comes, at the end `finish_reason`, `usage` and `model`."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {"finish_reason": None, "usage": None, "model": None}

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        for name in ("model", "usage"):
            if chunk.get(name):
                self._last[name] = chunk[name]
        text = ""
        for choice in chunk.get("choices", ()):
            text += choice_text(choice)
            if choice.get("finish_reason"):
                self._last["finish_reason"] = choice["finish_reason"]
        return sse({"output": text}) if text else b""

    def done(self) -> bytes:
        return sse({"output": "", **self._last}) + super().done()
