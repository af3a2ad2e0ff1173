"""Prompts being computed, so that another one that begins alike can wait for their KV.

Eight choices of one prompt, or a crowd behind one system prompt, come at the same moment, when none
of it is in KV yet. One of them computes it; the others come after that and find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["Underway"]


class _Computed(Protocol):
    @property
    def request(self) -> str: ...

    @property
    def left(self) -> int: ...


Waiting = TypeVar("Waiting")


class Underway(Generic[Waiting]):
    """Who computes what, and who waits for it.

    Args:
        block_tokens: Tokens in a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._computing: dict[str, _Computed] = {}
        self._keys: dict[str, list[str]] = {}
        self._behind: dict[str, list[Waiting]] = {}

    def begin(self, sequence: _Computed, keys: Sequence[str]) -> None:
        """A sequence is being computed; these keys are there once it is."""
        own = [key for key in keys if key not in self._computing]
        self._computing |= dict.fromkeys(own, sequence)
        self._keys[sequence.request] = own

    def end(self, request: str) -> list[Waiting]:
        """It is over, or goes no further. Those that waited for it go on, in their order."""
        for key in self._keys.pop(request, []):
            del self._computing[key]
        return self._behind.pop(request, [])

    def wait(self, waiting: Waiting, keys: Sequence[str]) -> bool:
        """Has somebody wait for the KV of such keys, where that is sooner than to compute it.

        Returns:
            Whether it waits; `end` gives it back.
        """
        known = [key for key in keys if key in self._computing]
        if not known:
            return False
        ahead = self._computing[known[-1]]
        # About as much as it would have to compute itself; waiting leaves the device to others.
        if 2 * len(known) * self._block_tokens < ahead.left:
            return False
        self._behind.setdefault(ahead.request, []).append(waiting)
        return True
