"""RunPod's jobs: the `input` of one, as RunPod's vLLM worker takes it, and its output.

    {"prompt" | "messages": ..., "sampling_params"?: {...}, "model"?, "stream"?,
     "apply_chat_template"?}
    {"choices": [{"tokens": [text, ...]}, ...], "usage": {"input": n, "output": n}}

    {"openai_route": "/v1/chat/completions", "openai_input": {...}}    OpenAI's body and answer

No route of ours takes these: the job handler (integrations/runpod.py) sends what is read here to
the gateway. Source: https://github.com/runpod-workers/worker-vllm, src/utils.py and src/engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, OpenAIEvents, Requests
from coldframe.runtime.gateway.platforms.parameters import (
    choice_text,
    mapping,
    openai_parameters,
    refused,
    switch,
)

__all__ = ["JobAdapter", "tokens"]

_ROUTES = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


class JobAdapter:
    """The input of a job."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        fields = mapping(body, "input")
        if fields.get("openai_route") is not None:
            return _read_openai(fields)
        given = [name for name in ("messages", "prompt") if fields.get(name) is not None]
        if len(given) != 1:
            raise refused("input must have one of messages and prompt, or openai_route.", "prompt")
        value = fields[given[0]]
        if given[0] == "prompt" and not isinstance(value, str):
            raise refused("input.prompt must be a string.", "prompt")
        request = openai_parameters(mapping(fields.get("sampling_params"), "sampling_params"))
        if fields.get("model") is not None:
            request["model"] = fields["model"]
        chat = given[0] == "messages"
        if not chat and switch(fields, "apply_chat_template"):
            chat, value = True, [{"role": "user", "content": value}]
        request["messages" if chat else "prompt"] = value
        stream = switch(fields, "stream")
        if stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return Requests((("chat" if chat else "completion", request),), stream, "native")

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        if requests.shape == "openai":
            return answers[0]
        choices = answers[0]["choices"]
        return tokens({int(choice["index"]): [choice_text(choice)] for choice in choices}, answers)

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, {"error": error.message}

    def events(self, requests: Requests) -> Events:
        return OpenAIEvents()


def tokens(texts: Mapping[int, list[str]], chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worker's own output.

    Args:
        texts: By the index of the choice.
        chunks: Whose last usage is told.
    """
    document: dict[str, Any] = {
        "choices": [{"tokens": texts.get(index, [])} for index in range(max(texts, default=0) + 1)]
    }
    for chunk in chunks:
        if chunk.get("usage"):
            usage = chunk["usage"]
            document["usage"] = {
                "input": usage.get("prompt_tokens"),
                "output": usage.get("completion_tokens"),
            }
    return document


def _read_openai(fields: Mapping[str, Any]) -> Requests:
    route = fields["openai_route"]
    kind = _ROUTES.get(route) if isinstance(route, str) else None
    if kind is None:
        known = ", ".join(_ROUTES)
        raise refused(f"openai_route may be /v1/models, {known}.", "openai_route")
    body = mapping(fields.get("openai_input"), "openai_input")
    return Requests(((kind, body),), switch(body, "stream"), "openai")
