"""The OpenAPI document: what can be asked here, with which bodies, and what may come back.

Imported and put together by the first GET /openapi.json alone: none of it is on the way of a cold
start. The schemas of OpenAI's bodies are those that the bodies are read by. Those of a platform are
the platform's own business, and said here to be JSON and no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from coldframe.runtime.gateway.loadstate import PHASES
from coldframe.runtime.gateway.openai.requests import ChatRequest, CompletionRequest, Request
from coldframe.runtime.gateway.openai.schemas import (
    CHAT_ANSWER,
    COMPLETION_ANSWER,
    ERROR,
    MODEL,
    MODELS,
)
from coldframe.runtime.gateway.platforms.kserve import VERSION
from coldframe.runtime.gateway.platforms.profile import Route
from coldframe.runtime.gateway.platforms.table import COMMON, by_name
from coldframe.runtime.gateway.settings import GatewaySettings

__all__ = ["openapi"]

_Schema = Mapping[str, Any]
_Operations = Mapping[tuple[str, str], dict[str, Any]]
"""By method and path."""

_ANY: _Schema = {}
_TEXT: _Schema = {"type": "string"}
_REFUSALS = {
    400: "The request is wrong.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body says that it is not JSON.",
    429: "All places are taken.",
    500: "The model has failed.",
    503: "The model cannot answer now: it still loads and as many requests wait as may, or it "
    "ends.",
}
_WAIT = {
    "Retry-After": {
        "description": "When to come again, in seconds.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def openapi(settings: GatewaySettings, environ: Mapping[str, str]) -> dict[str, Any]:
    """The document of a gateway.

    Args:
        settings: Its model's name, its platform, and whether it asks for keys.
        environ: May move a platform's routes.
    """
    guarded = bool(settings.keys)
    paths: dict[str, dict[str, Any]] = {}
    names = list(settings.models)
    only = {"type": "string", "enum": names}
    known = {"name": only, "model": only, "version": {"type": "string", "enum": [VERSION]}}

    def add(method: str, path: str, operation: dict[str, Any]) -> None:
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": known.get(name, _TEXT)}
            for name in re.findall(r"{(\w+)}", path)
        ]
        if parameters:
            operation["parameters"] = [*parameters, *operation.get("parameters", ())]
        # Where a platform has a route that all have, its own stands.
        paths.setdefault(path, {}).setdefault(method.lower(), operation)

    for (method, path), operation in _openai(guarded).items():
        add(method, path, operation)
    for route in [*by_name(settings.platform).routes_for(environ), *COMMON]:
        operation = _predict(route, guarded) if route.kind == "predict" else _document(route)
        add(route.method, route.path, operation)
    for (method, path), operation in _state(guarded, settings.open_metrics, only).items():
        add(method, path, operation)
    components: dict[str, Any] = {
        "schemas": {
            "CompletionRequest": _request(CompletionRequest, names),
            "ChatRequest": _request(ChatRequest, names),
            "InvokeRequest": _invoke(names),
            "CompletionAnswer": COMPLETION_ANSWER,
            "ChatAnswer": CHAT_ANSWER,
            "Model": MODEL,
            "Models": MODELS,
            "Error": ERROR,
        }
    }
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "coldframe",
            "version": version("coldframe"),
            "description": _description(names),
        },
        "paths": paths,
        "components": components,
    }


def _openai(guarded: bool) -> _Operations:
    return {
        ("POST", "/v1/completions"): _operation(
            "Go on with a text.",
            _answer(_ref("CompletionAnswer"), streams=True),
            body=_ref("CompletionRequest"),
            refusals=_REFUSALS,
            guarded=guarded,
        ),
        ("POST", "/v1/chat/completions"): _operation(
            "Answer in a conversation.",
            _answer(_ref("ChatAnswer"), streams=True),
            body=_ref("ChatRequest"),
            refusals=_REFUSALS,
            guarded=guarded,
        ),
        ("GET", "/v1/models"): _operation(
            "The models that are served.",
            _answer(_ref("Models")),
            refusals=_some(500, 503),
            guarded=guarded,
        ),
        ("GET", "/v1/models/{name}"): _operation(
            "A model, by its name.",
            _answer(_ref("Model")),
            refusals=_some(404, 500, 503),
            guarded=guarded,
        ),
    }


def _description(models: Sequence[str]) -> str:
    if len(models) > 1:
        return (
            "Large language models. Requests that come while theirs still loads are held until it "
            f"answers. Their names are {', '.join(models)}; the first is meant where none is named."
        )
    return (
        "A large language model. Requests that come while it still loads are held until it "
        f"answers. Its name is {models[0]}."
    )


def _request(body: type[Request], models: Sequence[str]) -> dict[str, Any]:
    schema = body.model_json_schema()
    schema["properties"]["model"] |= _one_of(models)
    return schema


def _invoke(models: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": "Parameters stand beside the prompt or under `parameters`, by OpenAI's "
        "names.",
        "properties": {
            "model": _one_of(models),
            "prompt": {"$ref": "#/components/schemas/CompletionRequest/properties/prompt"},
            "messages": {"$ref": "#/components/schemas/ChatRequest/properties/messages"},
            "parameters": {"type": ["object", "null"]},
            "stream": {"type": ["boolean", "null"]},
        },
        "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
        "examples": [{"prompt": "Once upon a time", "parameters": {"max_tokens": 16}}],
    }


def _one_of(models: Sequence[str]) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(models)}, {"type": "null"}]}


def _predict(route: Route, guarded: bool) -> dict[str, Any]:
    """A platform's way to ask; its errors have the platform's shape."""
    return _operation(
        f"Ask the model, in the words of {route.adapter}.",
        _answer(_ANY, streams=True),
        body=_ref("InvokeRequest") if route.adapter == "invoke" else {"type": "object"},
        # Cog says 422 to what is 400 elsewhere.
        refusals={**_REFUSALS, 422: _REFUSALS[400]},
        error=_ANY,
        guarded=guarded,
    )


def _document(route: Route) -> dict[str, Any]:
    operation = _operation("How far the model is.", _answer(_ANY), guarded=False)
    responses = operation["responses"]
    responses["503"] = {"description": "It does not answer yet.", **_json(_ANY)}
    if route.loading == 204:
        responses["204"] = {"description": "It still loads."}
    if "{" in route.path:
        responses["404"] = {"description": "There is no such model.", **_json(_ANY)}
    return operation


def _state(guarded: bool, open_metrics: bool, name: _Schema) -> _Operations:
    status = {"type": "object", "properties": {"status": _TEXT}}
    far = {
        "type": "object",
        "properties": {"state": {"enum": list(PHASES)}},
        "required": ["state", "model", "stage", "bytes_done", "bytes_total", "queue"],
    }
    ready = _operation("Whether a token has been made.", _answer(status), guarded=False)
    ready["responses"]["503"] = {"description": "None has been made yet.", **_json(far)}
    text = {"description": "Numbers.", "content": {"text/plain": {"schema": _TEXT}}}
    startup = _operation(
        "How far a model is, and the timeline of its last cold start.",
        _answer(far),
        refusals=_some(404, 503),
        guarded=guarded,
    )
    startup["parameters"] = [
        {
            "name": "model",
            "in": "query",
            "required": False,
            "schema": name,
            "description": "Which model; the first by default.",
        }
    ]
    return {
        ("GET", "/healthz"): _operation(
            "Whether the server is alive.", _answer(status), guarded=False
        ),
        ("GET", "/readyz"): ready,
        ("GET", "/startup"): startup,
        ("GET", "/metrics"): _operation(
            "Numbers for Prometheus.", text, guarded=guarded and not open_metrics
        ),
    }


def _operation(
    summary: str,
    answer: _Schema,
    *,
    body: _Schema | None = None,
    refusals: Mapping[int, str] | None = None,
    error: _Schema | None = None,
    guarded: bool,
) -> dict[str, Any]:
    shape = _ref("Error") if error is None else error
    responses: dict[str, Any] = {"200": answer}
    for status, words in (refusals or {}).items():
        responses[str(status)] = {"description": words, **_json(shape)}
        if status in (429, 503):
            responses[str(status)]["headers"] = _WAIT
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, **_json(body)}
    if guarded:
        operation["security"] = [{"key": []}]
        responses["401"] = {"description": "The API key is missing or wrong.", **_json(_ANY)}
    return operation


def _answer(schema: _Schema, *, streams: bool = False) -> dict[str, Any]:
    answer = {"description": "The answer.", **_json(schema)}
    if streams:
        # One event for each piece, and `[DONE]`, where `stream` is true.
        answer["content"]["text/event-stream"] = {}
    return answer


def _json(schema: _Schema) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _some(*statuses: int) -> dict[int, str]:
    return {status: _REFUSALS[status] for status in statuses}
