"""A worker's pocket of KV blocks: granted by the memory service in chunks, given to requests."""

from __future__ import annotations

from coldframe.loader.client import MemoryClient
from coldframe.loader.errors import RequestError

__all__ = ["KvPool"]

_CHUNK = 64
"""Blocks asked for at a time, so that most requests cost no question of their own."""


class KvPool:
    """Hands out blocks to requests.

    A request gets at its start all the blocks that it can come to need. Memory is touched as
    they fill, so that costs nothing; and no request can run dry half-way.

    Args:
        client: The memory service.
        blocks: All the blocks that there are.
        block_tokens: Tokens in one.
    """

    def __init__(self, client: MemoryClient, blocks: int, block_tokens: int) -> None:
        self._client = client
        self._blocks = blocks
        self._block_tokens = block_tokens
        # A pocket must not hold back what another worker could use, where there are few.
        self._chunk = max(1, min(_CHUNK, blocks // 8))
        self._pocket: list[int] = []

    def take(self, request: str, attempt: int, tokens: int) -> list[int] | None:
        """Blocks for a request, assigned to it in the ledger and held by this worker.

        Returns:
            The blocks, or None where it cannot have them at the moment: there are not enough, or
            the memory service has not heard yet that the request was opened, or that its former
            worker is dead. Ask again until it works or the request is cancelled.

        Raises:
            RequestError: It needs more than there are.
        """
        blocks = self.reserve(request, tokens)
        if blocks is None or self._client.assign(request, attempt, blocks):
            return blocks
        self.put_back(blocks)
        return None

    def reserve(self, request: str, tokens: int) -> list[int] | None:
        """Blocks of the worker's own, for a request that they are not assigned to yet.

        They come back with `put_back`, or become the request's with `MemoryClient.assign`.

        Returns:
            The blocks, or None where there are not enough at the moment.

        Raises:
            RequestError: It needs more than there are.
        """
        needed = -(-tokens // self._block_tokens)
        if needed > self._blocks:
            raise RequestError(
                "the request needs more KV than there is",
                where="prompt",
                expected=f"at most {self._blocks * self._block_tokens} tokens",
                got=f"{tokens} tokens of prompt and answer",
                hint="Ask for fewer tokens or give the replica more KV memory.",
            )
        if not self._refill(needed):
            # Two workers that each kept what the other lacks would wait for each other.
            self.trim()
            return None
        taken = self._pocket[:needed]
        del self._pocket[:needed]
        return taken

    def put_back(self, blocks: list[int]) -> None:
        """Takes back blocks that were reserved."""
        self._pocket += blocks

    def trim(self) -> None:
        """Gives back what is left over; for a worker that has nothing to do."""
        if self._pocket:
            self._client.give_back(self._pocket)
            self._pocket = []

    def _refill(self, needed: int) -> bool:
        missing = needed - len(self._pocket)
        if missing > 0:
            for count in (max(missing, self._chunk), missing):
                granted = self._client.grant(count)
                if granted:
                    self._pocket += granted
                    break
        return len(self._pocket) >= needed
