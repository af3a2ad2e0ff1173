"""A request's text as it comes: detokenised, and cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from coldframe.runtime.worker.text import Detokenizer, StopMatcher, Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Token ids in, text that is safe to send out.

    It depends on the token ids alone, so that another worker that is given the same ids goes on
    where this one stopped.

    Args:
        tokenizer: The model's.
        prompt_ids: What the answer follows.
        stop: Texts that end it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._matcher = StopMatcher(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """Takes the next token: the text to send now, and whether a stop string has come."""
        return self._matcher.push(self._detokenizer.push(token))

    def flush(self) -> tuple[str, bool]:
        """The text held back, at the end, and whether a stop string was in it."""
        text, stopped = self._matcher.push(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._matcher.flush(), False)

    def spell(self, token: int) -> bytes:
        """The bytes that a token stands for, also where they are no whole character."""
        return self._tokenizer.spell(token)
