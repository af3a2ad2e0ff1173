"""A worker's dealings in KV blocks: what a request gets, what is reused, and what others may read.

A request gets at its start all the blocks that it can come to need. Memory is touched as they
fill, so that costs nothing; and no request can run dry half-way. Of these blocks those that an
earlier request has filled with the same tokens are read only: the first token that is computed
lies in a block of the request's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.worker.prefix import PrefixKeys

if TYPE_CHECKING:
    from coldframe.runtime.engine.sequence import Sequence

__all__ = ["KvPool"]


class KvPool:
    """Gets blocks for sequences, and lets them go.

    Args:
        client: The memory service.
        blocks: All the blocks that there are.
        block_tokens: Tokens in one.
        domain: The device that has them.
        keys: Makes the keys that blocks are found by; None reuses none.
        settle: Waits until all that was begun with blocks is done. On a GPU a step may be over here
            before its kernels have run, and whoever gets a block next must find it written, and
            written to by nobody else.
    """

    def __init__(
        self,
        client: MemoryClient,
        blocks: int,
        block_tokens: int,
        domain: str,
        keys: PrefixKeys | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._domain = domain
        self._keys = keys
        self._settle = settle
        self.comes_later = False
        """Whether what was claimed last is to be claimed again, once something has changed."""

    @property
    def may_take(self) -> bool:
        """Whether it is worth asking for blocks again that were not to be had."""
        return self._client.may_assign

    def take(self, sequence: Sequence) -> bool:
        """Gives a sequence its blocks, with as much of its KV in them as is there already.

        Returns:
            Whether it has them; else ask again once `may_take`.

        Raises:
            RequestError: It needs more than there are.
        """
        needed = self._blocks_of(sequence.most_tokens)
        if needed > self._blocks:
            raise RequestError(
                "the request needs more KV than there is",
                where="prompt",
                expected=f"at most {self._blocks * self._block_tokens} tokens",
                got=f"{sequence.most_tokens} tokens of prompt and answer",
                hint="Ask for fewer tokens or give the replica more KV memory.",
            )
        keys = self.keys(sequence)
        got = self._client.assign(sequence.request, sequence.attempt, needed, keys)
        if got is None:
            return False
        sequence.blocks = got.blocks
        sequence.kv_tokens = got.reused * self._block_tokens
        sequence.cached_tokens = min(sequence.kv_tokens, len(sequence.prompt_ids))
        return True

    def keys(self, sequence: Sequence) -> list[str]:
        """The keys by which blocks of a sequence can be found."""
        # The last token is computed in any case: what follows it is what is asked for.
        return self._keys_of(sequence, sequence.tokens - 1)

    def claim(
        self,
        sequence: Sequence,
        kv_tokens: int,
        domain: str,
        ticket: dict[str, Any] | None = None,
    ) -> bool:
        """Takes over the KV of a sequence that was handed over.

        Args:
            sequence: Whose.
            kv_tokens: How many of its tokens there is KV of.
            domain: The device that has it. From another one it is brought here.
            ticket: For it, where it is in another replica.

        Returns:
            Whether it is here now. Else it is lost, or there are no blocks at the moment to bring
            it to. From another replica it may also be on its way: ask again where it
            `comes_later`.
        """
        self.comes_later = False
        if not kv_tokens:
            return False
        if domain != self._domain:
            return self._bring(sequence, kv_tokens, ticket)
        blocks = self._client.claim(sequence.request, sequence.attempt)
        if blocks is None:
            return False
        sequence.blocks, sequence.kv_tokens = blocks, kv_tokens
        # Of a request without a token, that is what was found there of its prompt.
        sequence.cached_tokens = min(kv_tokens, len(sequence.prompt_ids))
        return True

    def is_on_its_way(self, request: str) -> bool:
        """Whether the KV of a request is being brought from another replica."""
        return self._client.is_on_its_way(request)

    @property
    def lost_why(self) -> ColdframeError | None:
        """Why KV could not be brought from another replica, where that was so last."""
        return self._client.lost_why

    def abandon(self, request: str) -> None:
        """Nobody waits any more for KV that is on its way."""
        self._client.finish(request)

    def _bring(self, sequence: Sequence, kv_tokens: int, ticket: dict[str, Any] | None) -> bool:
        needed = self._blocks_of(sequence.most_tokens)
        if needed > self._blocks:
            return False  # which is said where it asks for blocks to compute it in
        written, keys = self._blocks_of(kv_tokens), self.keys(sequence)
        request, attempt = sequence.request, sequence.attempt
        got = self._client.bring(request, attempt, needed, written, keys, ticket)
        if got is None:
            self.comes_later = ticket is not None and self._client.lost_why is None
            return False
        sequence.blocks = got.blocks
        # Others may have left more of it here than there was over there.
        sequence.kv_tokens = max(kv_tokens, got.reused * self._block_tokens)
        sequence.cached_tokens = min(sequence.kv_tokens, len(sequence.prompt_ids))
        # Who goes on with it should this worker die finds it here.
        self.publish(sequence)
        return True

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def publish(self, sequence: Sequence) -> None:
        """Says that what `kv_tokens` counts is written: whoever claims the blocks finds it there.

        The full ones among them may be read for other requests from now on.
        """
        self._settle()
        self._client.publish(sequence.request, self._keys_of(sequence, sequence.kv_tokens))

    def hand_over(self, sequence: Sequence) -> None:
        """Publishes and lets go: another worker may claim the blocks, until a lease runs out.

        Returns once that is known, so that who is told of the request next can do so.
        """
        self.publish(sequence)
        self._client.drop(sequence.request)

    def finish(self, sequence: Sequence) -> None:
        """Publishes and lets go: the sequence is over."""
        self.publish(sequence)
        self._client.finish(sequence.request)

    def _keys_of(self, sequence: Sequence, tokens: int) -> list[str]:
        """Keys of the full blocks among the first tokens."""
        if self._keys is None:
            return []
        return self._keys.of(sequence.ids(tokens), len(sequence.prompt_ids))
