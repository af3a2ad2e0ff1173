"""JSON objects from files that are not trusted: one reading, or a CheckpointError.

Python's parser is lenient where others are not: of a repeated key it keeps the last, it takes
`NaN`, and it lets a lone surrogate through that no file name can hold. A checkpoint that two
programs read differently is a wrong checkpoint, so all of these are refused.
"""

from __future__ import annotations

import json
from typing import Any

from coldframe.loader.errors import CheckpointError

__all__ = ["describe", "parse_object"]

# The longest 64-bit integer has 20 characters.
_MAX_INTEGER_CHARS = 20


def parse_object(
    raw: bytes, *, where: str, hint: str, allow_constants: bool = False
) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: The document, UTF-8.
        where: The file that it comes from, for the error.
        hint: What to do about a bad one, for the error.
        allow_constants: Take `NaN` and `Infinity`, as Python's own writer leaves them.

    Raises:
        CheckpointError: It is not UTF-8, not JSON, not an object, nested too deeply, or repeats
            a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            for key, _ in pairs:
                if key not in found:
                    raise CheckpointError(
                        "a key appears twice", where=where, got=describe(key), hint=hint
                    )
                del found[key]  # the second time it is gone
        return found

    def constant(name: str) -> float:
        if allow_constants:
            return float(name)
        raise ValueError(f"{name} is not JSON")

    try:
        parsed = json.loads(
            raw.decode(), object_pairs_hook=unique, parse_constant=constant, parse_int=_integer
        )
        if b"\\u" in raw:
            # Only an escape can make a lone surrogate. It has no UTF-8, hence no file name.
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError("the JSON is nested too deeply", where=where, hint=hint) from None
    except ValueError as error:
        raise CheckpointError("this is not JSON", where=where, got=error, hint=hint) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(
            "this is not a JSON object",
            where=where,
            expected="an object",
            got=describe(parsed),
            hint=hint,
        )
    return parsed


def describe(value: object) -> str:
    """A value for an error message, short whatever it is and however deep."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        if len(value) > 8 or any(isinstance(item, list | dict) for item in value):
            return f"a list of {len(value)}"
        return "[" + ", ".join(describe(item) for item in value) + "]"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _integer(text: str) -> int | float:
    # `-0` is a float in other parsers, since no integer is written so. Digits without end take
    # quadratic time to convert; as a float they fail the type check of whoever reads them.
    if len(text) > _MAX_INTEGER_CHARS or text == "-0":
        return float(text)
    return int(text)
