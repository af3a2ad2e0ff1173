"""JSON objects read field by field: what is wrong with one is an error that names the field.

What travels through a store has been written by another process, on another machine, perhaps by
another version. It is taken as a whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from coldframe.loader.errors import CheckpointError, SnapshotError
from coldframe.loader.strict_json import describe, parse_object

__all__ = ["Fields", "Refusal", "is_integer", "parse"]

_HINT = "Remove the image; a new one is made in its place."

_MOST = (1 << 64) - 1


class Refusal(NamedTuple):
    """Why an image does not fit.

    Attributes:
        field: What does not match.
        expected: What the image asks for.
        got: What there is.
    """

    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


class Fields:
    """The fields of one JSON object, each of which is taken once.

    Args:
        value: The object.
        where: What it is part of, for errors.
        path: Its own place in that.

    Raises:
        SnapshotError: It is not an object.
    """

    def __init__(self, value: object, where: str, path: str = "") -> None:
        self.where = where
        self._path = path
        if not isinstance(value, dict):
            raise self.wrong("", "an object", describe(value))
        self._left: dict[str, Any] = dict(value)

    @staticmethod
    def of(value: object, where: str) -> Fields:
        """The fields of an object, or those that are given."""
        return value if isinstance(value, Fields) else Fields(value, where)

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        """A string; with a pattern, one that matches as a whole."""
        value = self._take(name)
        if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
            raise self.wrong(
                name, "a text" if pattern is None else f"a text like {pattern.pattern}", value
            )
        return value

    def integer(self, name: str, least: int = 0) -> int:
        """An integer that is not less than `least`."""
        value = self._take(name)
        if not is_integer(value) or value < least:
            raise self.wrong(name, f"an integer of at least {least}", value)
        return int(value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._take(name)
        if not is_integer(value) and type(value) is not float:
            raise self.wrong(name, "a number", value)
        found: float = value
        return found

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self._take(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "a list of texts", values)
        return tuple(values)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers that are not negative."""
        values = self.items(name)
        if not all(is_integer(value) and value >= 0 for value in values):
            raise self.wrong(name, "a list of integers", values)
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.items(name)
        if not all(is_integer(value) or type(value) is float for value in values):
            raise self.wrong(name, "a list of numbers", values)
        return tuple(values)

    def child(self, name: str) -> Fields:
        """An object."""
        return Fields(self._take(name), self.where, self._named(name))

    def children(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        for number, value in enumerate(self.items(name)):
            yield Fields(value, self.where, f"{self._named(name)}[{number}]")

    def absent(self, name: str) -> bool:
        """Whether a field is there and null; it is taken where it is."""
        if name not in self._left:
            raise self.wrong(name, "a value or null", "nothing")
        if self._left[name] is None:
            del self._left[name]
            return True
        return False

    def end(self) -> None:
        """That there were no other fields."""
        for name in self._left:
            raise self.wrong(name, "no such field", "one")

    def wrong(self, name: str, expected: str, got: object) -> SnapshotError:
        """The error for a field."""
        return SnapshotError(
            "a field of an image's manifest is wrong",
            where=f"{self.where}, {self._named(name) or 'the whole'}",
            expected=expected,
            got=got if isinstance(got, str) else describe(got),
            hint=_HINT,
        )

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise self.wrong(name, "a value", "nothing")
        return self._left.pop(name)

    def _named(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path and name else self._path or name


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object.

    Raises:
        SnapshotError: It is none, or may be read in two ways.
    """
    try:
        return parse_object(raw, where=where, hint=_HINT)
    except CheckpointError as error:
        raise SnapshotError(
            error.what, where=where, expected=error.expected, got=error.got, hint=_HINT
        ) from None


def is_integer(value: object) -> bool:
    """Whether it is one that a file may have, as it is read; see `loader.strict_json`."""
    # A bool is an int to isinstance.
    return type(value) is int and -(1 << 63) <= value <= _MOST
