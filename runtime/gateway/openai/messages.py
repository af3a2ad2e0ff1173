"""A chat's messages as chat templates expect them, and the variables that a template gets.

What a message may hold is text: a string, or text parts, which are put together with a line feed
between them as vLLM does. `developer` is the newer name of `system`; templates that do not know it
get `system`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.openai.problems import check_text, invalid, missing, wrong_type
from coldframe.runtime.gateway.openai.refusals import Refusal, unsupported
from coldframe.runtime.gateway.openai.requests import MAX_NAME, ChatRequest
from coldframe.runtime.gateway.openai.tools import MAX_TOOLS

__all__ = ["MAX_KWARGS", "MAX_PARTS", "template_variables"]

MAX_PARTS = 1024
MAX_KWARGS = 32

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FUNCTIONS = Refusal("Function calling", hint="use tools")
_NOT_TEXT = Refusal("A content part other than text")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def template_variables(request: ChatRequest, card: ModelCard, template: str) -> dict[str, Any]:
    """What a chat template gets, by Transformers' names.

    Args:
        request: The chat.
        card: The model, with its special tokens.
        template: The template's source.

    Raises:
        ApiError: A message is wrong or holds what is not supported.
    """
    knows_developer = "developer" in template
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    for message in messages:
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"
    return {
        **_further(request.chat_template_kwargs or {}, card),
        **card.special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": request.add_generation_prompt is not False,
    }


def _message(message: object, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(path, "an object", message)
    role = message.get("role")
    if role is None:
        raise missing(f"{path}.role")
    if role == "function":
        raise unsupported(f"{path}.role", _FUNCTIONS)
    if role not in _ROLES:
        raise invalid(f"{path}.role", f"one of {', '.join(_ROLES)}", role)
    for name, refusal in _MESSAGE_REFUSALS.items():
        if message.get(name):
            raise unsupported(f"{path}.{name}", refusal)
    result: dict[str, Any] = {
        "role": role,
        "content": _content(message, role, f"{path}.content"),
    }
    if message.get("tool_calls"):
        if role != "assistant":
            raise invalid(f"{path}.tool_calls", "calls of the assistant alone", role)
        result["tool_calls"] = _calls(message["tool_calls"], f"{path}.tool_calls")
    if role == "tool":
        if message.get("tool_call_id") is None:
            raise missing(f"{path}.tool_call_id")
        result["tool_call_id"] = _name(message.get("tool_call_id"), f"{path}.tool_call_id")
    if message.get("name") is not None:
        result["name"] = _name(message["name"], f"{path}.name")
    return result


def _calls(calls: object, path: str) -> list[dict[str, Any]]:
    """The calls of an earlier answer, their arguments as objects: so templates expect them."""
    if not isinstance(calls, list):
        raise wrong_type(path, "an array", calls)
    if len(calls) > MAX_TOOLS:
        raise invalid(path, f"at most {MAX_TOOLS} calls", calls)
    found = []
    for place, call in enumerate(calls):
        here = f"{path}[{place}]"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise wrong_type(here, "an object with a function", call)
        if call.get("type", "function") != "function":
            raise invalid(f"{here}.type", "function", call["type"])
        name = _name(call["function"].get("name"), f"{here}.function.name")
        where = f"{here}.function.arguments"
        arguments = _arguments(call["function"].get("arguments"), where)
        entry: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if call.get("id") is not None:
            entry["id"] = _name(call["id"], f"{here}.id")
        found.append(entry)
    return found


def _arguments(given: object, where: str) -> dict[str, Any]:
    if given is None or given == "":  # so some clients say that there are none
        return {}
    try:
        arguments = json.loads(check_text(where, given))
        # The template's process takes Unicode text, and JSON can say what is none.
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(where, "a JSON object as text", given)
    return arguments


_MESSAGE_REFUSALS = {
    "function_call": _FUNCTIONS,
    "audio": Refusal("Audio"),
}


def _name(name: object, path: str) -> str:
    text = check_text(path, name)
    if not 0 < len(text) <= MAX_NAME:
        raise invalid(path, f"1 to {MAX_NAME} characters", text)
    return text


def _content(message: dict[str, Any], role: str, path: str) -> str:
    content = message.get("content")
    if content is None:
        if role == "assistant":
            return ""
        if "content" not in message:
            raise missing(path)
    if isinstance(content, list):
        return _joined(content, path)
    if not isinstance(content, str):
        raise wrong_type(path, "a string or an array of text parts", content)
    return check_text(path, content)


def _joined(parts: Sequence[object], path: str) -> str:
    if not 0 < len(parts) <= MAX_PARTS:
        raise invalid(path, f"1 to {MAX_PARTS} parts", parts)
    texts = []
    for place, part in enumerate(parts):
        here = f"{path}[{place}]"
        if not isinstance(part, dict):
            raise wrong_type(here, "an object", part)
        kind = part.get("type")
        if kind is None:
            raise missing(f"{here}.type")
        if not isinstance(kind, str):
            raise wrong_type(f"{here}.type", "a string", kind)
        if kind != "text":
            raise unsupported(f"{here}.type", _NOT_TEXT)
        if "text" not in part:
            raise missing(f"{here}.text")
        texts.append(check_text(f"{here}.text", part["text"]))
    return "\n".join(texts)


def _further(kwargs: dict[Any, Any], card: ModelCard) -> dict[str, Any]:
    """What the request adds to the variables: plain values, under names that are not taken."""
    path = "chat_template_kwargs"
    if len(kwargs) > MAX_KWARGS:
        raise invalid(path, f"at most {MAX_KWARGS} variables", kwargs)
    for name, value in kwargs.items():
        if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
            raise invalid(path, "names of letters, digits and underscores", name)
        if len(name) > MAX_NAME:
            raise invalid(path, f"names of at most {MAX_NAME} characters", name)
        here = f"{path}.{name}"
        if name in _RESERVED or name in card.special_tokens:
            raise invalid(here, "names other than those that the server gives", name)
        if isinstance(value, str):
            check_text(here, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise invalid(here, "a finite number", value)
        elif value is not None and not isinstance(value, bool | int | float):
            raise wrong_type(here, "a string, number, true, false or null", value)
    return kwargs
