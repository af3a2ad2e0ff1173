"""Typed reading of a parsed config: a value of the wrong kind is an error that names its key.

JSON has one number and no schema. A config that says "hidden_size": "4096" or -1 must end in a
clear error here, not in a strange one a thousand lines later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import CheckpointError

__all__ = ["Fields"]

_LIMIT = 2**31
"""No count in any real config comes near it; beyond it sizes stop being believable."""

_LEAST, _MOST = 1e-30, 1e30
"""As for numbers; between them a product of two stays finite in float64, their own in float32."""


class Fields:
    """A mapping whose values are read with their type.

    A key with the value null reads as missing, as in Transformers.

    Args:
        values: The parsed JSON object.
        where: What errors call it, the file or `file: key`.
    """

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError("not a JSON object", where=where, got=type(values).__name__)
        self.values: Mapping[str, Any] = values
        self.where = where

    def error(self, key: str, expected: object, got: object) -> CheckpointError:
        """The error that says what `key` should have held."""
        return CheckpointError(
            "the config holds a bad value" if key in self.values else "the config lacks a key",
            where=f"{self.where}: {key}",
            expected=expected,
            got=repr(got) if isinstance(got, str) else got,
        )

    def get(self, key: str, default: object = None) -> Any:
        """The raw value."""
        return self.values.get(key, default)

    def positive(self, key: str, *, default: int | None = None) -> int:
        """An integer of at least 1."""
        return self._integer(key, 1, default)

    def count(self, key: str, *, default: int | None = None) -> int:
        """An integer of at least 0."""
        return self._integer(key, 0, default)

    def number(
        self, key: str, *, default: float | None = None, least: float = _LEAST, most: float = _MOST
    ) -> float:
        """A number above 0, of a size to compute with."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        expected = f"a number from {least:g} to {most:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, expected, value)
        if not least <= value <= most:
            raise self.error(key, expected, value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above 0, or None where there is none."""
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; missing reads as empty."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings", value)
        return tuple(value)

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """One token id, or None where there is none."""
        if self.values.get(key) is None:
            return None
        value = self.count(key)
        if value >= vocab_size:
            raise self.error(key, f"a token id below vocab_size {vocab_size}", value)
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; missing reads as empty."""
        value = self.values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise self.error(key, f"token ids below vocab_size {vocab_size}", value)
        return tuple(items)

    def _integer(self, key: str, least: int, default: int | None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LIMIT:
            raise self.error(key, f"an integer of at least {least}", value)
        return value
