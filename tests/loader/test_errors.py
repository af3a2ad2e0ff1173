from __future__ import annotations

import json

import pytest

from coldframe.loader import errors
from coldframe.loader.errors import ColdframeError, SourceNotFound

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_to_do(kind: type[ColdframeError]) -> None:
    error = kind("it broke", where="/m", expected=3, got=4)
    assert str(error) == f"it broke, in /m, expected 3, got 4. {kind.default_hint}"
    assert str(kind("it broke", hint="Mend it.")) == "it broke. Mend it."


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel(kind: type[ColdframeError]) -> None:
    error = kind("it broke", where="/m", expected=3, got=4, hint="Mend it.")
    there = ColdframeError.from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(there) is kind
    assert str(there) == str(error)
    assert there.retry_after_s is None
    error.retry_after_s = 2.5
    there = ColdframeError.from_wire(json.loads(json.dumps(error.to_wire())))
    assert there.retry_after_s == 2.5


def test_an_unknown_kind_is_still_an_error() -> None:
    there = ColdframeError.from_wire({**SourceNotFound("gone").to_wire(), "error": "Newer"})
    assert type(there) is ColdframeError
    assert there.what == "gone"
