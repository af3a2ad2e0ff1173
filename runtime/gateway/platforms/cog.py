"""Cog's predictions: `{"input": {...}}` in, `{"status", "output", "metrics", ...}` out.

The input has `prompt`, maybe with `system_prompt`, or `messages`, and `model` where one of several
is meant; what else is in it is a parameter. Nothing is fetched and nobody is called back: `webhook`
and `output_file_prefix` are refused. `Prefer: respond-async` is a preference, and answered when the
prediction is done.
Source: https://github.com/replicate/cog/blob/main/docs/http.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, Requests, sse
from coldframe.runtime.gateway.platforms.parameters import (
    choice_text,
    mapping,
    openai_parameters,
    refused,
    single,
)

__all__ = ["CogAdapter"]

_CALLS_OUT = ("webhook", "output_file_prefix")
_LONGEST_ID = 256


class CogAdapter:
    """Predictions, with a client's own id or without."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        fields = mapping(body, "The body")
        for name in _CALLS_OUT:
            if fields.get(name) is not None:
                raise refused(f"{name} is not supported: nothing is sent elsewhere.", name)
        ours = (path or {}).get("prediction_id", fields.get("id"))
        if ours is not None and not (isinstance(ours, str) and len(ours) <= _LONGEST_ID):
            raise refused(f"id must be a string of at most {_LONGEST_ID} characters.", "id")
        given = dict(mapping(fields.get("input"), "input"))
        prompt, chat = given.pop("prompt", None), given.pop("messages", None)
        system = given.pop("system_prompt", None)
        if (prompt is None) == (chat is None):
            raise refused("input must have prompt or messages.", "input.prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise refused("input.prompt must be a string.", "input.prompt")
        if system is not None and not isinstance(system, str):
            raise refused("input.system_prompt must be a string.", "input.system_prompt")
        if isinstance(given.get("stop_sequences"), str):
            # Cog's inputs are scalars: a list of stops is one string with commas.
            stops = given["stop_sequences"].split(",")
            given["stop_sequences"] = [stop for stop in stops if stop] or None
        request = openai_parameters(given)
        if given.get("model") is not None:
            request["model"] = given["model"]
        if system and prompt is not None:
            chat = [
                {"role": "system", "content": system},
                {"role": "user", "content": prompt},
            ]
        elif system:
            raise refused("system_prompt goes with prompt.", "input.system_prompt")
        kind, value = ("completion", prompt) if chat is None else ("chat", chat)
        request["prompt" if chat is None else "messages"] = value
        if sse:
            single(1, request)
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return Requests(((kind, request),), sse, notes={"id": ours, "started": monotonic()})

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        texts = [choice_text(choice) for choice in answers[0]["choices"]]
        output = texts[0] if len(texts) == 1 else texts
        return _succeeded(requests, output, answers[0].get("usage"))

    def error(self, error: ApiError) -> tuple[int, object]:
        if error.status != 400:
            return error.status, {"detail": error.message, **error.more}
        place = ["body", *(error.param or "").split(".")] if error.param else ["body"]
        detail = {"loc": place, "msg": error.message, "type": "value_error"}
        return 422, {"detail": [detail]}

    def events(self, requests: Requests) -> Events:
        return _PredictionEvents(requests)


def _succeeded(requests: Requests, output: object, usage: object) -> dict[str, Any]:
    counts = usage if isinstance(usage, Mapping) else {}
    metrics = {
        "predict_time": round(monotonic() - requests.notes["started"], 6),
        "input_token_count": counts.get("prompt_tokens"),
        "output_token_count": counts.get("completion_tokens"),
    }
    document = {
        "status": "succeeded",
        "output": output,
        "error": None,
        "logs": "",
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }
    return _named(requests, document)


def _named(requests: Requests, document: dict[str, Any]) -> dict[str, Any]:
    name = requests.notes["id"]
    return document if name is None else {"id": name, **document}


class _PredictionEvents:
    """`start`, `output` for each piece, `completed` with all of them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._started = False
        self._pieces: list[str] = []
        self._usage: object = None

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        frames = self._start()
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            text = choice_text(choice)
            if text:
                frames += sse({"chunk": text, "index": len(self._pieces)}, "output")
                self._pieces.append(text)
        return frames

    def done(self) -> bytes:
        document = _succeeded(self._requests, self._pieces, self._usage)
        return self._start() + sse(document, "completed")

    def failed(self, error: ApiError) -> bytes:
        document = {"status": "failed", "output": self._pieces, "error": error.message}
        return self._start() + sse(_named(self._requests, document), "completed")

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        return sse(_named(self._requests, {"status": "processing"}), "start")
