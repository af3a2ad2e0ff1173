"""Stop strings in a stream: what may be sent, what must be held back, and where to cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and holds back what may be one.

    The first is the one that is complete first; of those complete at the same character, the
    longest. So the outcome does not depend on where the pieces were cut.

    One Knuth-Morris-Pratt automaton for each stop string: the work for a character does not grow
    with the strings' length, and the longest partial match is what must be held back.

    Args:
        stops: Non-empty strings.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._finished = False

    def push(self, delta: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that is safe to send, and whether a stop string has come. That string and
            everything behind it are dropped, and so is all that is pushed later.
        """
        if self._finished:
            return "", True
        if not self._stops:
            return delta, False
        text = self._held + delta
        for place, character in enumerate(delta, len(self._held)):
            whole = self._advance(character)
            if whole:
                self._held, self._finished = "", True
                return text[: place + 1 - whole], True
        safe = len(text) - max(self._matched)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """At the end, the text held back: it has become no stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Step every automaton; returns the length of the longest stop that is now complete."""
        whole = 0
        for index, (stop, failures) in enumerate(self._stops):
            length = _step(stop, failures, self._matched[index], character)
            self._matched[index] = length
            if length == len(stop):
                whole = max(whole, length)
        return whole


def _failures(stop: str) -> list[int]:
    """For each prefix of a string, the length of its longest proper suffix that is a prefix too."""
    failures = [0]
    for character in stop[1:]:
        failures.append(_step(stop, failures, failures[-1], character))
    return failures


def _step(stop: str, failures: Sequence[int], matched: int, character: str) -> int:
    """Of the text read, the longest suffix that is a prefix of the string, one character on."""
    while matched and stop[matched] != character:
        matched = failures[matched - 1]
    return matched + (stop[matched] == character)
