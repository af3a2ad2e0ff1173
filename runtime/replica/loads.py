"""How much work a request is: for prefill by its prompt's tokens, for decode by its KV.

The front has no tokenizer. How many tokens a text has is guessed from its length until a worker
has told; the guess learns from those texts that have been tokenised, since a language or a
tokenizer may have half or four times the usual.
"""

from __future__ import annotations

from coldframe.runtime.options import BLOCK_TOKENS

__all__ = ["TextGauge", "blocks_of"]

_CHARACTERS = 4.0
"""In a token, as tokenizers have it for English prose."""
_DOUBT = 250.0
"""Tokens whose evidence outweighs that."""
_MEMORY = 100_000.0
"""Tokens behind which what came earlier counts half."""


class TextGauge:
    """Guesses how many tokens a text has."""

    def __init__(self) -> None:
        self._tokens = _DOUBT
        self._characters = _DOUBT * _CHARACTERS

    def guess(self, text: str) -> int:
        """About so many tokens, at least one."""
        return max(1, round(len(text) * self._tokens / self._characters))

    def learn(self, text: str, tokens: int) -> None:
        """A text has turned out to have so many."""
        self._tokens += tokens
        self._characters += len(text)
        if self._tokens > _MEMORY:
            self._tokens /= 2
            self._characters /= 2


def blocks_of(tokens: int) -> int:
    """KV blocks that so many tokens lie in: each is read whole, however few are in it."""
    return -(-tokens // BLOCK_TOKENS)
