"""How large a schema, an expression or a grammar may be, so that no request's holds up an engine.

The engine that has to keep to it compiles it in the process that decodes for everybody, and takes
what is nested by recursion: what would cost it seconds, or its stack, is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from coldframe.runtime.gateway.openai.problems import invalid

__all__ = ["MAX_DEPTH", "MAX_NODES", "MAX_REPEATS", "check_grammar", "check_regex", "check_schema"]

MAX_DEPTH = 64
"""Of objects and arrays in a schema, and of brackets in an expression or a grammar."""
MAX_NODES = 5000
"""Objects, and values in arrays, of a schema."""
MAX_REPEATS = 10_000
"""What a schema's counts and an expression's `{m,n}` may say."""

_COUNTS = frozenset(
    f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties")
)
_TOO_LONG = f"repeats of at most {MAX_REPEATS}"
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_schema(schema: object, where: str) -> None:
    """Refuse a schema that is too large, too deep, or counts too far.

    Args:
        schema: As parsed from JSON.
        where: The field's dotted path.

    Raises:
        ApiError: It is; the message has the bound.
    """
    nodes, open_ = 0, [(schema, 1)]
    while open_:
        value, depth = open_.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise invalid(where, f"a schema of at most {MAX_NODES} parts", schema)
        if depth > MAX_DEPTH:
            raise invalid(where, f"a schema at most {MAX_DEPTH} deep", schema)
        if isinstance(value, list):
            open_.extend((each, depth + 1) for each in value)
        elif isinstance(value, dict):
            _check_keywords(value, where)
            open_.extend((v, depth + 1) for v in value.values() if isinstance(v, dict | list))


def _check_keywords(schema: dict[str, Any], where: str) -> None:
    for name, value in schema.items():
        # A property may have such a name, too, but its value is a schema.
        if name in _COUNTS and isinstance(value, int | float) and value > MAX_REPEATS:
            raise invalid(where, f"{name} of at most {MAX_REPEATS}", value)
    if isinstance(pattern := schema.get("pattern"), str):
        check_regex(pattern, where)
    if isinstance(patterns := schema.get("patternProperties"), dict):
        for pattern in patterns:
            check_regex(pattern, where)


def check_regex(text: str, where: str) -> None:
    """Refuse an expression that is nested too deeply, or repeats too often.

    Raises:
        ApiError: It does; the message has the bound.
    """
    _check(text, where, quotes="")


def check_grammar(text: str, where: str) -> None:
    """Refuse a grammar that is nested too deeply, or repeats too often.

    Raises:
        ApiError: It does; the message has the bound.
    """
    _check(text, where, quotes="\"'")


def _check(text: str, where: str, quotes: str) -> None:
    depth = 0
    for place, char in _bare(text, quotes):
        if char == "(":
            depth += 1
            if depth > MAX_DEPTH:
                raise invalid(where, f"brackets at most {MAX_DEPTH} deep", text)
        elif char == ")":
            depth = max(0, depth - 1)
        elif char == "{" and (found := _REPEAT.match(text, place)):
            for number in found.groups():
                # Not `int` first: it may have thousands of digits.
                digits = (number or "").lstrip("0")
                if len(digits) > len(str(MAX_REPEATS)) or int(digits or 0) > MAX_REPEATS:
                    raise invalid(where, _TOO_LONG, found.group())


def _bare(text: str, quotes: str) -> Iterator[tuple[int, str]]:
    """The characters that are neither escaped, nor in a class, nor in quotes, with their places."""
    closing, place = "", 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1
        elif closing:
            closing = "" if char == closing else closing
        elif char == "[":
            closing = "]"
        elif char in quotes:
            closing = char
        else:
            yield place, char
        place += 1
