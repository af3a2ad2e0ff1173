"""The tools that a chat offers to the model, and how an answer is to use them.

A model that may choose (`auto`) is told of them by the chat template, and its answer is read for
calls in the format that the template teaches. One that has to call is held to it by a schema, which
takes vLLM.

Source: OpenAI's API reference for `tools`, `tool_choice` and `parallel_tool_calls`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coldframe.runtime.engine.structure import MAX_SPEC, Structure
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.openai.bounds import check_schema
from coldframe.runtime.gateway.openai.problems import check_text, invalid, missing, wrong_type
from coldframe.runtime.gateway.openai.refusals import Refusal, unsupported

__all__ = ["CLOSE", "MAX_TOOLS", "OPEN", "TOOL_CHOICES", "Format", "ToolUse", "tool_use"]

MAX_TOOLS = 128
OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""What a call stands between."""
_OTHER_FORMATS = ("<function=", "<arg_key>")
"""What templates have that teach other calls between the same tags: Qwen3-Coder's, GLM-4.5's."""
TOOL_CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""A schema's keywords for schemas by name."""
_VALUES = ("const", "default", "enum", "examples")
"""Those for values, in which nothing is a reference."""
_FORMS = "none, auto, required, or an object that names a function"

Format = Literal["hermes", "named", "array"]
"""How calls stand in an answer: `hermes` between tags and beside text, `named` as the arguments of
the one function alone, `array` as a JSON array of names and parameters."""

_NO_FORMAT = Refusal(
    "Tool calling with this model's chat template",
    hint="it teaches no format of calls that is known here: JSON between <tool_call> tags",
)
_NO_VLLM = Refusal(
    "Having the model call a tool", hint="the vLLM engine can: start with --decode native,vllm"
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a chat's answer may be besides text.

    Args:
        tools: For the chat template, as the client sent them.
        format: How calls stand in the answer.
        name: The function that is to be called, where that is said.
        structure: What form the answer must have for it.
        stop: The text that ends the answer, where a first call is to be the last.
    """

    tools: tuple[dict[str, Any], ...]
    format: Format
    name: str | None = None
    structure: Structure | None = None
    stop: str | None = None


def tool_use(body: Mapping[str, Any], card: ModelCard) -> ToolUse | None:
    """The tools of a chat; None where the model is to know of none.

    Args:
        body: The request.
        card: The model.

    Raises:
        ApiError: They are none, or cannot be used with this model.
    """
    tools, choice = body.get("tools"), body.get("tool_choice")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise wrong_type("parallel_tool_calls", "true or false", parallel)
    if tools is None or tools == []:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tools beside it", choice)
        return None
    functions = _functions(tools)
    wanted = _choice(choice, functions)
    if wanted == "none":
        return None
    if wanted == "auto":
        if not _teaches_calls(card.chat_template or ""):
            raise unsupported("tools", _NO_FORMAT)
        return ToolUse(tuple(tools), "hermes", stop=CLOSE if parallel is False else None)
    if not card.vllm:
        raise unsupported("tool_choice", _NO_VLLM)
    schemas = functions if wanted == "required" else {wanted: functions[wanted]}
    check_schema(list(schemas.values()), "tools")
    if wanted == "required":
        return ToolUse(tuple(tools), "array", None, _structure(_any_of(functions, parallel)))
    return ToolUse(tuple(tools), "named", wanted, _structure(functions[wanted]))


def _teaches_calls(template: str) -> bool:
    return OPEN in template and not any(other in template for other in _OTHER_FORMATS)


def _functions(tools: object) -> dict[str, dict[str, Any]]:
    """The schemas of the functions' parameters, by their names."""
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array", tools)
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"at most {MAX_TOOLS} tools", tools)
    found: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        if not isinstance(tool, dict):
            raise wrong_type(where, "an object", tool)
        if tool.get("type") != "function":
            raise invalid(f"{where}.type", "function", tool.get("type"))
        function = tool.get("function")
        if not isinstance(function, dict):
            raise wrong_type(f"{where}.function", "an object", function)
        name = check_text(f"{where}.function.name", function.get("name"))
        if not _NAME.fullmatch(name) or name in found:
            expected = "1 to 64 letters, digits and _.-, and each once"
            raise invalid(f"{where}.function.name", expected, name)
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, dict):
            raise wrong_type(f"{where}.function.parameters", "an object", schema)
        found[name] = schema or {"type": "object", "properties": {}}
    try:  # they go to the template as they are
        text = json.dumps(tools, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        raise invalid(
            "tools", "Unicode text and finite numbers, not nested deeply", tools
        ) from None
    if len(text) > MAX_SPEC:
        raise invalid("tools", f"at most {MAX_SPEC} characters of JSON", tools)
    return found


def _choice(choice: object, functions: Mapping[str, Any]) -> str:
    """`none`, `auto`, `required`, or a function's name."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in TOOL_CHOICES:
            raise invalid("tool_choice", _FORMS, choice)
        return choice
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", _FORMS, choice)
    if choice.get("type") != "function":
        raise invalid("tool_choice.type", "function", choice.get("type"))
    function = choice.get("function")
    if not isinstance(function, dict):
        raise missing("tool_choice.function")
    name = function.get("name")
    if not isinstance(name, str) or name not in functions:
        raise invalid("tool_choice.function.name", "the name of one of the tools", name)
    return name


def _any_of(functions: Mapping[str, dict[str, Any]], parallel: bool | None) -> dict[str, Any]:
    """An array of calls. What a function's schema refers to is counted from its own top, so each
    is whole under the root's `$defs`, and its references go there."""
    places = {name: f"f{place}" for place, name in enumerate(functions)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{place}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, place in places.items()
    ]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    moved = {place: _moved(functions[name], f"#/$defs/{place}") for name, place in places.items()}
    return schema | ({"maxItems": 1} if parallel is False else {}) | {"$defs": moved}


def _moved(schema: Any, to: str) -> Any:
    """A schema, or a list of such, to stand at another place of a document than its root."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):  # the names are anybody's
            found[key] = {name: _moved(each, to) for name, each in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value == "#" or value[:2] == "#/"):
            found[key] = to + value[1:]
        elif key == "$id":  # references would be counted from there
            continue
        else:
            found[key] = value if key in _VALUES else _moved(value, to)
    return found


def _structure(schema: dict[str, Any]) -> Structure:
    return Structure("json", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
