"""JSON from anybody: one reading, and no more memory or time than its bytes let one expect.

Python's parser is lenient where others are not: of a repeated key it keeps the last, it takes
`NaN`, and it lets half a surrogate pair through that no tokenizer can encode. Here all of these are
refused, and so is what would take much more than it seems to: millions of empty lists, lists in
lists without end, numbers of thousands of digits. (`loader.strict_json` reads files, which are
objects and have other rules.)
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from coldframe.runtime.gateway.api import ApiError

__all__ = ["parse"]

_MAX_DEPTH = 64
_MAX_VALUES = 1 << 20
"""A million tokens are a prompt. An empty list is 3 bytes here and 64 in memory."""

# Each matches from its quote to some end, so that no byte is looked at twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


def parse(raw: bytes) -> Any:
    """The value of a JSON document.

    Args:
        raw: UTF-8, with or without a byte order mark.

    Raises:
        ApiError: It is none (400), or takes too much (413).
    """
    if not raw.strip():
        raise _not_json("The body is empty; JSON is expected.")
    _check_shape(raw)
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
        )
        if b"\\ud" in raw or b"\\uD" in raw:
            # Only an escape can make half a surrogate pair, and only an encoder sees it.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _not_json(f"The body is not UTF-8, at byte {error.start}.") from None
    except UnicodeEncodeError:
        raise _not_json(
            "A string holds half of a surrogate pair, which stands for no character."
        ) from None
    except json.JSONDecodeError as error:
        raise _not_json(
            f"The body is not JSON: {error.msg}, at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python's own limit of an integer's digits
        raise _not_json("A number has too many digits.") from None
    return value


def _check_shape(raw: bytes) -> None:
    """Refuses what is small and becomes large or deep; looks closely only where it might be."""
    opens = raw.count(b"[") + raw.count(b"{")
    commas = raw.count(b",")
    if opens <= _MAX_DEPTH and commas <= _MAX_VALUES:
        return
    bare = _STRING.sub(b"", raw)
    opens = bare.count(b"[") + bare.count(b"{")
    if opens + bare.count(b",") > _MAX_VALUES:
        raise ApiError(
            413,
            f"The body holds more than {_MAX_VALUES} values.",
            code="request_too_large",
        )
    if opens > _MAX_DEPTH:
        depth = 0
        for bracket in _BRACKETS.findall(bare):
            depth += 1 if bracket in b"[{" else -1
            if depth > _MAX_DEPTH:
                raise _too_deep()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, _ in pairs:
            if key not in found:
                raise _not_json(f"The body names {_short(key)} twice.")
            del found[key]  # the second time it is gone
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _not_json("A number is too large.")
    return value


def _refuse_constant(name: str) -> float:
    raise _not_json(f"The body is not JSON: it has no {name}.")


def _short(key: str) -> str:
    return repr(key if len(key) <= 64 else key[:64] + "...")


def _not_json(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _too_deep() -> ApiError:
    return _not_json(f"The body is nested more than {_MAX_DEPTH} deep.")
