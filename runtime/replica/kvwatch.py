"""Which prompts a replica has KV of, told as they come and go: for a router in front of several.

The memory service says which keys it has, and knows no tokens; the front sees the tokens of
requests, and knows the keys that they make. What both speak of is an event. A block is told behind
the one that it continues, since whoever builds a tree of them has nowhere else to put it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.replica.answers import Listener, TokenEvent
from coldframe.runtime.transport.base import Given, Taken
from coldframe.runtime.worker.prefix import PrefixKeys

__all__ = ["KvWatch", "block_hash"]

_MOST_PENDING = 1 << 14
"""So many blocks are remembered with their tokens, until the memory service has them, too."""


def block_hash(key: str) -> int:
    """A block's key as the signed 64 bits that others name blocks by."""
    return int.from_bytes(bytes.fromhex(key[:16]), "big", signed=True)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A block that a request has, and nobody has been told of."""

    parent: str | None
    tokens: tuple[int, ...]


class KvWatch:
    """One model's.

    `take` gives events, as JSON values: `["stored", parent, hashes, tokens]` for blocks that follow
    one another, the first of them behind the block `parent` (None for the beginning of a prompt),
    and `["removed", hashes]`.
    """

    def __init__(self) -> None:
        self._keys: Callable[[], PrefixKeys | None] = lambda: None
        self._here: set[str] = set()
        """The keys that the memory service has."""
        self._told: dict[str, None] = {}
        """Those that are told, in the order in which they were."""
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._events: list[list[Any]] = []
        self._last: str | None = None
        """The key that the last event ends with, where another block may be added to it."""

    # -- the replica -----------------------------------------------------------------------------

    def begin(self, keys: Callable[[], PrefixKeys | None]) -> None:
        """A replica starts, with no KV yet.

        Args:
            keys: Gives what makes its keys, once that is known.
        """
        self.lost()
        self._keys = keys

    def changed(self, stored: Sequence[str], removed: Sequence[str]) -> None:
        """The memory service has some keys from now on, and others no more."""
        self._here.update(stored)
        for key in stored:
            self._tell(key)
        self._here.difference_update(removed)
        self._remove(key for key in removed if key in self._told)

    def lost(self) -> None:
        """The replica has gone, and its KV with it."""
        self._remove(list(self._told))
        self._here.clear()
        self._pending.clear()
        self._keys = lambda: None

    # -- requests --------------------------------------------------------------------------------

    def follow(
        self, prompt_ids: tuple[int, ...], generated_ids: tuple[int, ...], listener: Listener
    ) -> Listener:
        """A listener in the place of a request's own, which sees its tokens go by.

        Args:
            prompt_ids: The prompt.
            generated_ids: Tokens of the answer that are there already.
            listener: Who asked.
        """
        return _Follower(self, prompt_ids, [*prompt_ids, *generated_ids], listener)

    def learn(self, token_ids: Sequence[int], prompt_tokens: int) -> None:
        """A request is of these tokens: whatever is in KV of them can be told.

        Args:
            token_ids: From its first token on.
            prompt_tokens: How many of them are the prompt.
        """
        keys = self._keys()
        if keys is None:
            return
        chain = keys.of(token_ids, prompt_tokens)
        for place, key in enumerate(chain):
            if key not in self._told:
                start = place * BLOCK_TOKENS
                tokens = tuple(token_ids[start : start + BLOCK_TOKENS])
                self._pending[key] = _Pending(chain[place - 1] if place else None, tokens)
                self._pending.move_to_end(key)
        while len(self._pending) > _MOST_PENDING:
            self._pending.popitem(last=False)
        for key in chain:
            self._tell(key)

    # -- whoever tells ---------------------------------------------------------------------------

    def take(self) -> list[list[Any]]:
        """The events since the last time."""
        events, self._events, self._last = self._events, [], None
        return events

    def forget(self) -> None:
        """Who was told knows nothing any more; it hears of what is asked for again."""
        self._told.clear()
        self._events, self._last = [], None

    def _tell(self, key: str) -> None:
        pending = self._pending.get(key)
        if pending is None or key not in self._here or key in self._told:
            return
        if pending.parent is not None and pending.parent not in self._told:
            return
        del self._pending[key]
        self._told[key] = None
        if self._last is not None and self._last == pending.parent:
            _, _, hashes, tokens = self._events[-1]
            hashes.append(block_hash(key))
            tokens.extend(pending.tokens)
        else:
            parent = None if pending.parent is None else block_hash(pending.parent)
            self._events.append(["stored", parent, [block_hash(key)], list(pending.tokens)])
        self._last = key

    def _remove(self, keys: Iterable[str]) -> None:
        gone = list(keys)
        for key in gone:
            del self._told[key]
        if gone:
            self._events.append(["removed", [block_hash(key) for key in gone]])
            self._last = None


class _Follower:
    """Who asked, and the watch beside."""

    __slots__ = ("_begun", "_ids", "_listener", "_prompt_tokens", "_watch")

    def __init__(
        self, watch: KvWatch, prompt_ids: Sequence[int], ids: list[int], listener: Listener
    ) -> None:
        self._watch = watch
        self._prompt_tokens = len(prompt_ids)
        self._ids = ids
        self._listener = listener
        self._begun = False

    def on_token(self, event: TokenEvent) -> None:
        self._listener.on_token(event)
        if not self._begun:
            self._begun = True
            self._watch.learn(self._ids, self._prompt_tokens)
        self._ids.append(event.token)
        if event.finish is not None:
            self._watch.learn(self._ids, self._prompt_tokens)

    def on_error(self, error: ColdframeError) -> None:
        self._listener.on_error(error)

    def on_given(self, given: Given) -> None:
        cast("Taken", self._listener).on_given(given)
