"""What form a request asks the answer to have, in each of the ways in which clients say so.

Whether a schema or a grammar makes sense is found out by the engine that has to keep to it.

Sources: OpenAI's API reference for `response_format`; vLLM's server for `structured_outputs`, and
for `guided_json` and the like, its older names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.structure import MAX_SPEC, Structure
from coldframe.runtime.gateway.openai.bounds import check_grammar, check_regex, check_schema
from coldframe.runtime.gateway.openai.problems import (
    check_text,
    invalid,
    missing,
    out_of_range,
    wrong_type,
)
from coldframe.runtime.gateway.openai.refusals import Refusal, unsupported

__all__ = ["FIELDS", "KINDS", "MAX_CHOICES", "structure_of"]

MAX_CHOICES = 1024
"""Texts of which the answer is to be one."""
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""What `structured_outputs` has one of."""
FIELDS = ("response_format", "structured_outputs", *_GUIDED)
_OTHER = Refusal("This way of structuring output", hint="use json, regex, choice or grammar")


def structure_of(body: Mapping[str, Any]) -> Structure | None:
    """The form that a request's answer must have; None for any.

    Args:
        body: The request.

    Raises:
        ApiError: It says none that there is, or several.
    """
    found: dict[str, Structure] = {}
    for name in FIELDS:
        value = body.get(name)
        if value is None:
            continue
        if name == "response_format":
            structure = _response_format(value)
        elif name == "structured_outputs":
            structure = _structured_outputs(value)
        else:
            structure = _of_kind(_GUIDED[name], value, name)
        if structure is not None:
            found[name] = structure
    if not found:
        return None
    (name, structure), *others = found.items()
    for other, _ in others:
        raise invalid(other, f"nothing beside {name}", body[other])
    try:
        structure.validate()
    except RequestError as error:
        raise out_of_range(name, error.expected, error.got) from None
    return structure


def _response_format(value: object) -> Structure | None:
    where = "response_format"
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    kind = value.get("type")
    if kind is None:
        raise missing(f"{where}.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("json_object")
    if kind != "json_schema":
        raise invalid(f"{where}.type", "text, json_object or json_schema", kind)
    where += ".json_schema"
    told = value.get("json_schema")
    if told is None:
        raise missing(where)
    if not isinstance(told, dict):
        raise wrong_type(where, "an object", told)
    if told.get("schema") is None:  # to OpenAI a schema that allows any object
        return Structure("json_object")
    return _of_kind("json", told["schema"], f"{where}.schema")


def _structured_outputs(value: object) -> Structure | None:
    where = "structured_outputs"
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    given = {name: each for name, each in value.items() if each is not None and each is not False}
    for name in given:
        if name not in KINDS:
            raise unsupported(f"{where}.{str(name)[:60]}", _OTHER)
    if len(given) != 1:
        raise invalid(where, f"one of {', '.join(KINDS)}", value)
    ((kind, each),) = given.items()
    return _of_kind(kind, each, f"{where}.{kind}")


def _of_kind(kind: str, value: object, where: str) -> Structure:
    match kind:
        case "json_object":
            if value is not True:
                raise wrong_type(where, "true or false", value)
            return Structure("json_object")
        case "json":
            return Structure("json", _schema(value, where))
        case "choice":
            if not isinstance(value, list):
                raise wrong_type(where, "an array of strings", value)
            if not 0 < len(value) <= MAX_CHOICES:
                raise invalid(where, f"1 to {MAX_CHOICES} strings", value)
            texts = [_text(each, f"{where}[{i}]") for i, each in enumerate(value)]
            return Structure("choice", json.dumps(texts))
        case "regex":
            expression = _text(value, where)
            check_regex(expression, where)
            return Structure("regex", expression)
        case "grammar":
            grammar = _text(value, where)
            check_grammar(grammar, where)
            return Structure("grammar", grammar)
    raise AssertionError(kind)


def _schema(value: object, where: str) -> str:
    """A schema as JSON; some clients send it as a text."""
    if isinstance(value, str):
        try:
            value = json.loads(check_text(where, value))
        except (ValueError, RecursionError):
            raise invalid(where, "a JSON schema", value) from None
    if not isinstance(value, dict):
        raise wrong_type(where, "an object, which is a JSON schema", value)
    check_schema(value, where)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise invalid(where, "a JSON schema without endless numbers or depths", value) from None
    return _text(text, where)


def _text(value: object, where: str) -> str:
    text = check_text(where, value)
    if not 0 < len(text) <= MAX_SPEC:
        raise invalid(where, f"1 to {MAX_SPEC} characters", text)
    return text
