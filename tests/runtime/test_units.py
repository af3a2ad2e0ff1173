"""Sizes and rates, read and written."""

from __future__ import annotations

import argparse
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.units import (
    byte_count,
    byte_count_or_none,
    byte_rate,
    duration,
    human_bytes,
    human_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("1.5k", 1500),
        ("200MB", 200 * 10**6),
        ("200 mb", 200 * 10**6),
        ("4GiB", 4 << 30),
        ("4gi", 4 << 30),
        (".5KiB", 512),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert byte_count(text) == byte_count_or_none(text) == size
    assert byte_rate(text) == size
    assert byte_rate(f"{text}/s") == size


def test_none_is_a_size_where_there_may_be_none() -> None:
    assert byte_count_or_none("0") == byte_count_or_none("0GiB") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        byte_count_or_none("none")


@pytest.mark.parametrize(
    "text", ["", "MB", "1.2.3", "-1", "1e9", "4iB", "5 parsecs", "0", "0.4", "inf", "1_000"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
        byte_count(text)


@pytest.mark.parametrize("text", ["", "fast", "200MB/h", "200MB/", "/s", "200MB/s/s", "0/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no rate|is not above zero"):
        byte_rate(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1000, "1 kB"),
        (426_417_152, "426 MB"),
        (999_600_000, "1 GB"),
        (1.5e12, "1.5 TB"),
        (1.5e16, "15000 TB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(1, 10**15))
def test_bytes_for_people_can_be_read_back(count: int) -> None:
    assert byte_count(human_bytes(count)) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.0874, "87 ms"), (0.9996, "1.00 s"), (2.314, "2.31 s")]
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("2s", 2.0), ("2", 2.0), (" .25 s ", 0.25), ("1.5m", 90.0)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1s", "soon", "1h", "nan", "inf", "9" * 400])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)
