"""Vertex AI's prediction bodies.

    {"instances": [...], "parameters"?: {...}}  ->  {"predictions": [...]}, in their order

An instance is a text, or an object with `prompt`, `messages` or `inputs`. One that says
`"@requestFormat": "chatCompletions"` is a whole chat body, as Vertex's own vLLM container takes
it; its prediction is OpenAI's document, and where it is alone it is not in a list, as there.
A raw prediction (`rawPredict`) comes without `instances`: OpenAI's bodies pass through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, OpenAIEvents, Requests
from coldframe.runtime.gateway.platforms.invoke import OpenAIAdapter
from coldframe.runtime.gateway.platforms.parameters import (
    MAX_PROMPTS,
    choice_text,
    mapping,
    openai_parameters,
    refused,
    single,
    switch,
)

__all__ = ["VertexAdapter"]

_FORMAT = "@requestFormat"
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


class VertexAdapter:
    """Instances to predictions."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        fields = mapping(body, "The body")
        if "instances" not in fields and ("messages" in fields or "prompt" in fields):
            raw = OpenAIAdapter().read(fields)
            return Requests(raw.items, raw.stream, "raw")
        instances = fields.get("instances")
        if not isinstance(instances, list) or not 0 < len(instances) <= MAX_PROMPTS:
            raise refused(f"instances must be a list of 1 to {MAX_PROMPTS} instances.", "instances")
        shared = mapping(fields.get("parameters"), "parameters")
        items, whole, stream = [], [], False
        for index, instance in enumerate(instances):
            where = f"instances[{index}]"
            one = {"prompt": instance} if isinstance(instance, str) else instance
            kind, request = _read(mapping(one, where), shared, where)
            items.append((kind, request))
            whole.append(_FORMAT in one)
            stream = stream or switch(one, "stream")
        if stream:
            single(len(items), items[0][1])
            items[0][1]["stream"] = True
        return Requests(tuple(items), stream, "instances", {"whole": whole})

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        if requests.shape == "raw":
            return answers[0]
        predictions: list[object] = []
        for whole, answer in zip(requests.notes["whole"], answers, strict=True):
            texts = [choice_text(choice) for choice in answer["choices"]]
            predictions.append(answer if whole else texts[0] if len(texts) == 1 else texts)
        if requests.notes["whole"] == [True]:
            return {"predictions": predictions[0]}
        return {"predictions": predictions}

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, {
            "error": {
                "code": error.status,
                "message": error.message,
                "status": _STATUS.get(error.status, "INTERNAL"),
                **error.more,
            }
        }

    def events(self, requests: Requests) -> Events:
        return OpenAIEvents()


def _read(
    instance: Mapping[str, Any], shared: Mapping[str, Any], where: str
) -> tuple[str, dict[str, Any]]:
    wanted = instance.get(_FORMAT, "chatCompletions")
    if wanted != "chatCompletions":
        raise refused(f"{where}: {_FORMAT} may only be chatCompletions.", where)
    given = [name for name in ("prompt", "messages", "inputs") if instance.get(name) is not None]
    if len(given) != 1 or (_FORMAT in instance and given != ["messages"]):
        names = "messages" if _FORMAT in instance else "one of prompt, messages and inputs"
        raise refused(f"{where} must be a text, or an object with {names}.", where)
    name = given[0]
    value = instance[name]
    if name != "messages" and not isinstance(value, str):
        raise refused(f"{where}: {name} must be a string.", where)
    beside = {
        key: item for key, item in instance.items() if key not in (name, "parameters", _FORMAT)
    }
    nested = mapping(instance.get("parameters"), f"{where}.parameters")
    greedy = name == "inputs"  # text-generation-inference's instances, with its defaults
    request = openai_parameters({**shared, **nested, **beside}, greedy=greedy)
    if instance.get("model") is not None:
        request["model"] = instance["model"]
    if name == "messages":
        return "chat", {**request, "messages": value}
    return "completion", {**request, "prompt": value}
