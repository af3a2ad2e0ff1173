"""What is wrong with a body, in OpenAI's words: the path of the field, what it takes, what it got.

What a client sent is shown shortened, and never taken apart: it may be megabytes, half a
character, or a number of thousands of digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from coldframe.runtime.gateway.api import ApiError

__all__ = [
    "check_text",
    "dotted",
    "from_pydantic",
    "invalid",
    "missing",
    "out_of_range",
    "wrong_type",
]

_SHOWN = 60
_HUGE_BITS = 128


def invalid(param: str, expected: str, got: object, *, code: str = "invalid_value") -> ApiError:
    """A field with a value that it cannot have.

    Args:
        param: Its dotted path.
        expected: What it takes, as a noun phrase.
        got: The value.
        code: A word for programs.
    """
    return out_of_range(param, expected, _shown(got), code=code)


def out_of_range(
    param: str, expected: object, shown: object, *, code: str = "invalid_value"
) -> ApiError:
    """As `invalid`, with the value as it is to be shown."""
    message = f"Invalid value for '{param}': expected {expected}, but got {shown} instead."
    return ApiError(400, message, param=param, code=code)


def wrong_type(param: str, expected: str, got: object) -> ApiError:
    """A field with a value of another type than it takes."""
    return invalid(param, expected, got, code="invalid_type")


def missing(param: str) -> ApiError:
    """A field that has to be there and is not."""
    return ApiError(
        400,
        f"Missing required parameter: '{param}'.",
        param=param,
        code="missing_required_parameter",
    )


def check_text(param: str, value: object) -> str:
    """A value that is Unicode text.

    Raises:
        ApiError: It is no text, or has half a surrogate pair in it, which JSON can say.
    """
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(param, "Unicode text without lone surrogates", value) from None
    return value


def dotted(path: Sequence[str | int]) -> str:
    """The path of a field as OpenAI writes it: `messages[0].content`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{_short(part)}" if text else _short(part)
    return text


def from_pydantic(error: ValidationError) -> ApiError:
    """The first of the mistakes that pydantic has found."""
    first = error.errors(include_url=False)[0]
    param = dotted(first["loc"])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return missing(param)
    expected = _EXPECTED.get(kind, "another value").format_map(_Shown(context))
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return invalid(param, expected, first["input"], code=code)


_EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "a number of at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "a number of at most {le}",
    "list_type": "an array",
    "model_type": "an object",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "a string",
    "string_unicode": "Unicode text without lone surrogates",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
}
"""What each of pydantic's errors means; those that its models here can have."""


class _Shown(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        huge = value.bit_length() > _HUGE_BITS
        return f"a number of {value.bit_length()} bits" if huge else str(value)
    if isinstance(value, str):
        return json.dumps(_short(value), ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    return "an object" if isinstance(value, dict) else repr(value)[:_SHOWN]


def _short(text: str) -> str:
    cut = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    # Half a surrogate pair could not be sent back as UTF-8.
    return cut.encode("utf-8", "backslashreplace").decode()
