"""The stop matcher against a search of the whole text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coldframe.runtime.worker.stops import StopMatcher

TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text in front of the stop string that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(place for place in places if place < len(text))})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


@given(text=TEXT, stops=STOPS, places=st.lists(st.integers(1, 30)))
@example(text="aabaaab", stops=["aaab"], places=[5])
@example(text="abcd", stops=["abcde", "bc"], places=[])
def test_it_finds_what_a_search_finds(text: str, stops: list[str], places: list[int]) -> None:
    expected, expected_stop = naive(text, stops)
    matcher = StopMatcher(stops)
    sent, finished, read = "", False, ""
    for piece in cut(text, places):
        safe, finished = matcher.push(piece)
        sent, read = sent + safe, read + piece
        if finished:
            break
        # As little as possible is held back: what could still become a stop string.
        longest = max(
            (n for stop in stops for n in range(len(stop)) if read.endswith(stop[:n])), default=0
        )
        assert read == sent + read[len(read) - longest :]
    assert finished == expected_stop
    assert sent + matcher.flush() == expected


def test_nothing_comes_behind_a_stop() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("\ntwo") == ("", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


def test_of_two_that_end_together_the_longer_counts() -> None:
    assert StopMatcher(["END", "THE END"]).push("It is THE END.") == ("It is ", True)


def test_what_was_held_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.push("a </ans") == ("a ", False)
    assert matcher.flush() == "</ans"
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[], ["never"]])
def test_without_a_stop_everything_passes(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("a b c") == ("a b c", False)
    assert matcher.push("") == ("", False)
