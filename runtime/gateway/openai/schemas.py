"""JSON schemas of the fields that pydantic cannot derive, and of the answers; for OpenAPI alone.

Whatever a schema forbids is refused by the code, and a test holds them against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.runtime.engine.params import MAX_STOP_LENGTH, MAX_STOPS
from coldframe.runtime.engine.structure import MAX_SPEC
from coldframe.runtime.gateway.openai.forms import MAX_CHOICES
from coldframe.runtime.gateway.openai.messages import MAX_KWARGS, MAX_PARTS
from coldframe.runtime.gateway.openai.refusals import REFUSALS
from coldframe.runtime.gateway.openai.requests import MAX_BIASES, MAX_NAME, MAX_SEQUENCES
from coldframe.runtime.gateway.openai.tools import MAX_TOOLS, TOOL_CHOICES

__all__ = ["CHAT_ANSWER", "COMPLETION_ANSWER", "ERROR", "MODEL", "MODELS", "complete"]

_Schema = Mapping[str, Any]
_TEXT = {"type": "string"}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}
_ID = {"type": "integer", "minimum": 0}
_NULL = {"type": "null"}


def _array(items: _Schema, most: int | None = None, *, least: int = 1) -> dict[str, Any]:
    schema = {"type": "array", "items": items, "minItems": least}
    return schema if most is None else {**schema, "maxItems": most}


def _or_null(schema: _Schema) -> dict[str, Any]:
    return {"anyOf": [schema, _NULL]}


def _object(required: _Schema, optional: _Schema | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_PART = _object({"type": {"const": "text"}, "text": _TEXT})
_CONTENT = [_TEXT, _array(_PART, MAX_PARTS)]
_NAME = {"name": _or_null({"type": "string", "minLength": 1, "maxLength": MAX_NAME})}

_JSON_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string", "minLength": 1}]}
_SPEC = {"type": "string", "minLength": 1, "maxLength": MAX_SPEC}
_STRUCTURES: Mapping[str, Any] = {
    "json": _JSON_SCHEMA,
    "regex": _SPEC,
    "choice": _array(_SPEC, MAX_CHOICES),
    "grammar": _SPEC,
}
_FORMS: Mapping[str, Any] = {
    "response_format": {
        "anyOf": [
            _object({"type": {"enum": ["text", "json_object"]}}),
            _object(
                {
                    "type": {"const": "json_schema"},
                    "json_schema": _object({}, {"schema": _or_null(_JSON_SCHEMA)}),
                }
            ),
        ]
    },
    "structured_outputs": {
        "type": "object",
        "properties": {
            **{
                name: {"anyOf": [schema, {"enum": [None, False]}]}
                for name, schema in _STRUCTURES.items()
            },
            "json_object": _or_null({"type": "boolean"}),
        },
        "additionalProperties": {"enum": [None, False]},
    },
    **{f"guided_{name}": schema for name, schema in _STRUCTURES.items()},
}
"""What is served where there is a vLLM engine."""

_FUNCTION = _object(
    {"name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}},
    {"parameters": _or_null({"type": "object"})},
)
_TOOLS: Mapping[str, Any] = {
    "tools": _array(
        _object({"type": {"const": "function"}, "function": _FUNCTION}), MAX_TOOLS, least=0
    ),
    "tool_choice": {
        "anyOf": [
            {"enum": list(TOOL_CHOICES)},
            _object({"type": {"const": "function"}, "function": _object({"name": _TEXT})}),
        ]
    },
    "parallel_tool_calls": {"type": "boolean"},
}
"""Of a chat. Having the model call a tool takes a vLLM engine, offering it some does not."""
_CALL = _object(
    {"function": _object({"name": _TEXT, "arguments": _TEXT})},
    {"type": {"const": "function"}, "id": _or_null(_TEXT)},
)

_FIELDS: Mapping[str, Any] = {
    "prompt": {
        "anyOf": [
            _TEXT,
            _array(_TEXT, MAX_SEQUENCES),
            _array(_ID),
            _array(_array(_ID), MAX_SEQUENCES),
        ]
    },
    "stop": {"anyOf": [_STOP, _array(_STOP, MAX_STOPS, least=0), _NULL]},
    "logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
    "messages": _array(
        {
            "anyOf": [
                _object(
                    {
                        "role": {"enum": ["system", "developer", "user"]},
                        "content": {"anyOf": _CONTENT},
                    },
                    _NAME,
                ),
                _object(
                    {"role": {"const": "assistant"}},
                    {
                        "content": {"anyOf": [*_CONTENT, _NULL]},
                        "tool_calls": {
                            "anyOf": [
                                _array(_CALL, MAX_TOOLS, least=0),
                                # Which ask for nothing.
                                {"enum": [None, False, 0, "", {}]},
                            ]
                        },
                        **_NAME,
                    },
                ),
                _object(
                    {
                        "role": {"const": "tool"},
                        "content": {"anyOf": _CONTENT},
                        "tool_call_id": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
                    },
                    _NAME,
                ),
            ]
        }
    ),
    "stream_options": _or_null(_object({}, {"include_usage": _or_null({"type": "boolean"})})),
    "chat_template_kwargs": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "maxLength": MAX_NAME},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            "maxProperties": MAX_KWARGS,
        }
    ),
}

_EXAMPLES: Mapping[bool, Any] = {
    False: {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0},
    True: {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "seed": 7},
}


_WHERE_VLLM = "Served where the model's replica has a vLLM engine, and refused where it has none."


def complete(schema: dict[str, Any], *, chat: bool) -> None:
    """Put into a request's schema what pydantic has left out.

    Args:
        schema: As pydantic has derived it.
        chat: Of a chat request, else of a completion.
    """
    fields = schema["properties"]
    for name, content in _FIELDS.items():
        if name in fields:
            keep = {key: fields[name][key] for key in ("description",) if key in fields[name]}
            bounds = {key: fields[name][key] for key in ("maxItems",) if key in fields[name]}
            fields[name] = {**content, **bounds, **keep}
    for name, refusal in REFUSALS.items():
        if name in _FORMS:
            fields[name] = {**_or_null(_FORMS[name]), "description": _WHERE_VLLM}
            continue
        if chat and name in _TOOLS:
            continue
        fields[name] = {
            "enum": [None, *refusal.harmless],
            "description": refusal.sentence(),
        }
    if chat:
        fields.update({name: _or_null(each) for name, each in _TOOLS.items()})
    schema["examples"] = [_EXAMPLES[chat]]


_USAGE = _object(
    {
        "prompt_tokens": _ID,
        "prompt_tokens_details": _object({"cached_tokens": _ID}),
        "completion_tokens": _ID,
        "total_tokens": _ID,
    },
)
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_LIKELY = {
    "token": _TEXT,
    "logprob": _NUMBER,
    "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
}


def _answer(kind: str, choice: _Schema) -> dict[str, Any]:
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _INTEGER,
            "model": _TEXT,
            "choices": _array(
                _object(
                    {"index": _ID, "finish_reason": _FINISH, **choice},
                    {"token_ids": _array(_ID, least=0)},
                ),
                MAX_SEQUENCES,
            ),
            "usage": _USAGE,
        },
        {"system_fingerprint": _TEXT},
    )


COMPLETION_ANSWER = _answer(
    "text_completion",
    {
        "text": _TEXT,
        "logprobs": _or_null(
            _object(
                {
                    "tokens": _array(_TEXT),
                    "token_logprobs": _array(_NUMBER),
                    "top_logprobs": _array({"type": "object", "additionalProperties": _NUMBER}),
                    "text_offset": _array(_ID),
                }
            )
        ),
    },
)

CHAT_ANSWER = _answer(
    "chat.completion",
    {
        "message": _object(
            {"role": {"const": "assistant"}, "content": _or_null(_TEXT), "refusal": _NULL},
            {
                "tool_calls": _array(
                    _object({"id": _TEXT, "type": {"const": "function"}, **_CALL["properties"]})
                )
            },
        ),
        "logprobs": _or_null(
            _object(
                {
                    "content": _array(
                        _object(
                            {**_LIKELY, "top_logprobs": _array(_object(_LIKELY), least=0)},
                        )
                    ),
                    "refusal": _NULL,
                }
            )
        ),
    },
)

MODEL = _object(
    {"id": _TEXT, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _TEXT},
    {"max_model_len": _INTEGER},
)
MODELS = _object({"object": {"const": "list"}, "data": _array(MODEL)})

ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": _or_null(_TEXT),
                "code": _or_null({"type": ["string", "integer"]}),
            }
        )
    }
)
