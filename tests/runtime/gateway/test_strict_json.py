"""JSON from anybody: what has two readings, or none, or becomes larger than it looks."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.strict_json import parse


def refused(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(raw)
    json.dumps(caught.value.to_openai(), ensure_ascii=False).encode()  # it can be sent
    return caught.value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b" \r\n", "empty"),
        (b"{", "line 1, column 2"),
        (b"{}\n{}", "line 2, column 1"),
        (b"a=b", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'"a\nb"', "not JSON"),
        (b'{"a": "\xff"}', "byte 7"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b'[{"b": {"a": 1, "\\u0061": 3}}]', "'a' twice"),
        (b'{"\\ud800": 1, "\\ud800": 1}', "twice"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "Infinity"),
        (b"1e999", "too large"),
        (b"1" * 5000, "digits"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDC00": 1}', "surrogate"),
        (b"[" * 100_000, "deep"),
        (b"[" * 100 + b"]" * 100, "deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deep"),
    ],
)
def test_what_is_no_json_is_400(raw: bytes, words: str) -> None:
    error = refused(raw)
    assert error.status == 400
    assert words in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("unit", [b"[]", b"{}", b"0", b'{"a":0}', b"[[[]]]"])
def test_millions_of_values_are_413(unit: bytes) -> None:
    assert refused(b"[" + b",".join([unit] * 1_100_000) + b"]").status == 413


def test_text_may_look_like_millions_of_values() -> None:
    text = '[{,"\\' * 300_000
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_million_tokens_are_a_prompt() -> None:
    assert len(parse(json.dumps({"prompt": [1] * 1_000_000}).encode())["prompt"]) == 1_000_000


@pytest.mark.parametrize("raw", [b'"' * 4_000_000, b'"\\' * 2_000_000, b'["\\"' * 1_000_000])
def test_quotes_without_end_are_looked_at_once(raw: bytes) -> None:
    assert refused(raw + b"[" * 70).status == 400  # if each were, this would take hours


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
        max_leaves=50,
    ),
    st.booleans(),
)
def test_what_json_writes_is_read(value: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0dD189aeE+-. \n', max_size=60))
def test_anything_else_is_refused_or_means_what_python_reads(raw: bytes | str) -> None:
    if isinstance(raw, str):
        raw = raw.encode()
    with suppress(ApiError):
        assert parse(raw) == json.loads(raw.decode("utf-8-sig"))
