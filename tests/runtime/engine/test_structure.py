"""The form of an answer: what is checked at once, and what only whoever reads it finds out."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine import structure
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import MAX_SPEC, Structure


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("xml", "x"),
        (1, "x"),
        ("regex", 1),
        ("regex", ""),
        ("json_object", "x"),
        ("json", " " * (MAX_SPEC + 1)),
    ],
)
def test_types_and_sizes(kind: object, spec: object) -> None:
    with pytest.raises(RequestError):
        Structure(cast("Any", kind), cast("Any", spec)).validate()


def test_the_front_reads_no_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(structure, "json")
    SamplingParams(structured=Structure("json", '{"type": "object"}')).validate(100)
    SamplingParams(structured=Structure("choice", '["a"]')).validate(100)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", "{"),
        ("json", "[]"),
        ("json", "[" * 100_000),
        ("choice", "{}"),
        ("choice", "[]"),
        ("choice", '["a", 1]'),
    ],
)
def test_who_reads_it_finds_none(kind: Any, spec: str) -> None:
    Structure(kind, spec).validate()
    with pytest.raises(RequestError):
        Structure(kind, spec).value()


def test_what_is_meant() -> None:
    assert Structure("json", '{"a": 1}').value() == {"a": 1}
    assert Structure("choice", '["a"]').value() == ["a"]
    assert Structure("regex", "a+").value() == "a+"
