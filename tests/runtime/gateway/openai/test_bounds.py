"""Schemas, expressions and grammars that would hold up an engine are refused, others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coldframe.runtime.gateway.openai.bounds import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_REPEATS,
    check_grammar,
    check_regex,
    check_schema,
)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def brackets(depth: int) -> str:
    return "(" * depth + "a" + ")" * depth


@pytest.mark.parametrize(
    ("check", "value", "bound"),
    [
        (check_schema, nested(MAX_DEPTH + 1), MAX_DEPTH),
        (check_schema, nested(100_000), MAX_DEPTH),
        (check_schema, {"enum": ["x"] * MAX_NODES}, MAX_NODES),
        (check_schema, {"properties": {str(i): {} for i in range(MAX_NODES)}}, MAX_NODES),
        (check_schema, {"items": {"maxLength": MAX_REPEATS + 1}}, MAX_REPEATS),
        (check_schema, {"minItems": 1e300}, MAX_REPEATS),
        (check_schema, {"properties": {"a": {"pattern": "x{99999}"}}}, MAX_REPEATS),
        (check_schema, {"patternProperties": {brackets(65): {}}}, MAX_DEPTH),
        (check_regex, brackets(MAX_DEPTH + 1), MAX_DEPTH),
        (check_regex, f"a{{{MAX_REPEATS + 1}}}", MAX_REPEATS),
        (check_regex, "a{1,20000}", MAX_REPEATS),
        (check_regex, "a{20000,}", MAX_REPEATS),
        (check_regex, "a{" + "9" * 10_000 + "}", MAX_REPEATS),
        (check_grammar, f"root ::= {brackets(MAX_DEPTH + 1)}", MAX_DEPTH),
        (check_grammar, 'root ::= "a"{1,20000}', MAX_REPEATS),
    ],
)
def test_what_is_too_much(
    refusal: Any, check: Callable[[Any, str], None], value: Any, bound: int
) -> None:
    error = refusal(lambda: check(value, "here"))
    assert (error.status, error.param) == (400, "here")
    assert str(bound) in error.message


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (check_schema, nested(MAX_DEPTH)),
        (check_schema, {"enum": ["x"] * (MAX_NODES - 2)}),
        (check_schema, {"maximum": 10**9, "maxLength": MAX_REPEATS, "minLength": None}),
        (check_schema, {"properties": {"maxItems": {"type": "integer"}, "pattern": {}}}),
        (check_schema, {"const": 10**9, "description": "x{99999}"}),
        (check_regex, brackets(MAX_DEPTH) * 3),
        (check_regex, r"\(" * 100 + "[(]" * 100 + r"\{99999}[{99999}]"),
        (check_regex, r"[\](]" * 100),
        (check_regex, "a{10000}b{0010000}{x}{}"),
        (check_grammar, 'root ::= "' + "(" * 100 + '" "\\"("' + r' "{99999}"'),
    ],
)
def test_what_is_not(check: Callable[[Any, str], None], value: Any) -> None:
    check(value, "here")
