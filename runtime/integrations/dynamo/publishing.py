"""What Dynamo's router is told of a worker: which prompts it has KV of, and how much to do.

It needs neither to be right: what it does not know of costs a prompt computed twice, no more.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from coldframe.runtime.options import BLOCK_TOKENS

__all__ = ["EventPublisher", "KvEvents", "LoadCount", "LoadPublisher"]

_LOAD_S = 0.05
"""How soon a change of the load is told, in seconds: changes are many, and each is a message."""


class EventPublisher(Protocol):
    """Dynamo's `KvEventPublisher`."""

    def publish_stored(
        self,
        token_ids: list[int],
        num_block_tokens: list[int],
        block_hashes: list[int],
        *,
        parent_hash: int | None = None,
    ) -> None: ...

    def publish_removed(self, block_hashes: list[int]) -> None: ...


class LoadPublisher(Protocol):
    """Dynamo's `WorkerMetricsPublisher`."""

    def publish(self, *, kv_used_blocks: int) -> None: ...


class KvEvents:
    """Passes on the events of `coldframe.runtime.replica.kvwatch`.

    Args:
        publisher: Dynamo's.
    """

    def __init__(self, publisher: EventPublisher) -> None:
        self._publisher = publisher
        self.stored = 0
        """Blocks told of so far."""
        self.removed = 0

    def take(self, events: list[list[Any]]) -> None:
        """Tells of what has come and gone."""
        for kind, *rest in events:
            if kind == "stored":
                parent, hashes, tokens = rest
                sizes = [BLOCK_TOKENS] * len(hashes)
                self._publisher.publish_stored(tokens, sizes, hashes, parent_hash=parent)
                self.stored += len(hashes)
            else:
                (hashes,) = rest
                self._publisher.publish_removed(hashes)
                self.removed += len(hashes)


class LoadCount:
    """Counts the KV blocks of the requests that are open, and tells when that changes.

    Args:
        publisher: Dynamo's.
    """

    def __init__(self, publisher: LoadPublisher) -> None:
        self._publisher = publisher
        self._tokens: dict[int, int] = {}
        self._numbers = 0
        self.blocks = 0
        """Of all that are open."""
        self._told = -1
        self._telling: asyncio.TimerHandle | None = None

    def begin(self, prompt_tokens: int) -> int:
        """A sequence has come: a number for it."""
        self._numbers += 1
        self._tokens[self._numbers] = prompt_tokens
        self._change(_blocks(prompt_tokens))
        return self._numbers

    def token(self, number: int) -> None:
        """It has one token more."""
        tokens = self._tokens[number]
        self._tokens[number] = tokens + 1
        self._change(_blocks(tokens + 1) - _blocks(tokens))

    def end(self, number: int) -> None:
        """It is over."""
        self._change(-_blocks(self._tokens.pop(number)))

    def _change(self, blocks: int) -> None:
        self.blocks += blocks
        if self._telling is None and self.blocks != self._told:
            self._telling = asyncio.get_running_loop().call_later(_LOAD_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        if self.blocks != self._told:
            self._told = self.blocks
            self._publisher.publish(kv_used_blocks=self.blocks)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
