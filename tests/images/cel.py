"""The Common Expression Language as the API server has it, by the implementation of its makers.

Numbers, strings, lists and maps are those of JSON; an object has the fields that it has, and
`has()` tells of the others. Strings have Kubernetes' further functions, such as `lowerAscii`.
"""

from __future__ import annotations

import functools
from typing import Any

from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

__all__ = ["holds"]


def holds(rule: str, value: Any) -> bool:
    """Whether a value keeps a rule.

    Args:
        rule: In CEL; `self` is the value.
        value: As JSON has it.

    Raises:
        ValueError: The rule is none, or says neither yes nor no of this value, as where it asks
            for a field that is not there.
    """
    said = _compiled(rule).eval(data={"self": value}).plain_value()
    if not isinstance(said, bool):
        raise ValueError(f"{rule}: {said}")
    return said


@functools.cache
def _compiled(rule: str) -> Any:
    try:
        return _environment().compile(rule)
    except Exception as error:
        raise ValueError(f"{rule}: {error}") from error


@functools.cache
def _environment() -> Any:
    return cel.NewEnv(variables={"self": cel.Type.DYN}, extensions=[ext_strings.ExtStrings()])
