"""One request inside a worker: its token ids, its KV blocks and the text made so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sampling import Sampled, SampleInput

__all__ = ["Emission", "Sequence", "TextStream"]


class TextStream(Protocol):
    """Turns token ids into text as they come."""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is safe to send now, and whether a stop string has ended the answer."""
        ...

    def flush(self) -> tuple[str, bool]:
        """The text held back, at the end, and whether a stop string was in it."""
        ...

    def spell(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        ...


@dataclass(frozen=True, slots=True)
class Emission:
    """A token on its way to the client.

    Args:
        request: Whose.
        attempt: By which attempt.
        index: Its place among the generated tokens, from 0.
        token: Its id.
        text: What it adds to the answer; may be empty, or hold what earlier tokens held back.
        finish: `stop` or `length` with the last token, else None.
        logprob: Natural log-probability, where asked for.
        top: The likeliest tokens with theirs.
        prompt_tokens: Of the request's prompt.
        spellings: Where log-probabilities were asked for, the bytes that the token stands for,
            then those of the likeliest ones.
        cached_tokens: How many tokens of the prompt were found in the KV instead of computed;
            known of the first token alone.
    """

    request: str
    attempt: int
    index: int
    token: int
    text: str
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_tokens: int = 0
    spellings: tuple[bytes, ...] = ()
    cached_tokens: int = 0

    def to_wire(self) -> list[Any]:
        return [
            self.request,
            self.attempt,
            self.index,
            self.token,
            self.text,
            self.finish,
            self.logprob,
            self.top,
            self.prompt_tokens,
            # Bytes as characters of the same number: JSON has no bytes.
            [spelling.decode("latin-1") for spelling in self.spellings],
            self.cached_tokens,
        ]


class Sequence:
    """A request that a worker computes.

    Args:
        request: Its id.
        attempt: Which try at it this is.
        prompt_ids: The prompt.
        generated_ids: What has been generated before; its text has been sent already.
        params: Sampling.
        text: Makes its text; this replays what was generated before into it.
        eos_ids: The model's own end-of-text tokens.
    """

    def __init__(
        self,
        request: str,
        attempt: int,
        prompt_ids: tuple[int, ...],
        generated_ids: tuple[int, ...],
        params: SamplingParams,
        text: TextStream,
        eos_ids: tuple[int, ...],
    ) -> None:
        self.request = request
        self.attempt = attempt
        self.prompt_ids = prompt_ids
        self.generated_ids = list(generated_ids)
        self.params = params
        self.blocks: list[int] = []
        self.kv_tokens = 0
        """Tokens whose keys and values are in the blocks."""
        self.cached_tokens = 0
        """Tokens of the prompt that were there before this request."""
        self._text = text
        self._ends = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_ids)
        )
        for token in generated_ids:
            text.push(token)

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def most_tokens(self) -> int:
        """Tokens that can come to lie in the KV: the last one generated never does."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def max_tokens(self) -> int:
        """Tokens to generate at most; whoever tokenised the prompt has put a number there."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens

    def ids(self, end: int, start: int = 0) -> list[int]:
        """The tokens of prompt and answer from one position up to another."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.generated_ids[start - prompt : end - prompt]
        return [*self.prompt_ids[start:end], *self.generated_ids[: max(0, end - prompt)]]

    @property
    def left(self) -> int:
        """Tokens that are to be computed before the next one is known."""
        return self.tokens - self.kv_tokens

    def chunk(self, most: int | None = None) -> Chunk:
        """What is not in the KV yet, or the first tokens of it, as the next thing to compute."""
        start = self.kv_tokens
        end = self.tokens if most is None else min(self.tokens, start + most)
        return Chunk(self.ids(end, start), start, len(self.prompt_ids), self.blocks)

    def sample_input(self) -> SampleInput:
        return SampleInput(self.params, self.prompt_ids, self.generated_ids, self.tokens)

    def accept(self, sampled: Sampled) -> Emission:
        """Takes the token that follows what was just computed."""
        self.kv_tokens = self.tokens
        self.generated_ids.append(sampled.token)
        text, finish = "", None
        if sampled.token in self._ends:
            text, finish = self._text.flush()[0], "stop"
        else:
            text, stopped = self._text.push(sampled.token)
            if stopped:
                finish = "stop"
            elif len(self.generated_ids) >= self.max_tokens:
                rest, stopped = self._text.flush()
                text, finish = text + rest, "stop" if stopped else "length"
        spellings: tuple[bytes, ...] = ()
        if sampled.logprob is not None:
            tokens = (sampled.token, *(token for token, _ in sampled.top))
            spellings = tuple(self._text.spell(token) for token in tokens)
        return Emission(
            self.request,
            self.attempt,
            len(self.generated_ids) - 1,
            sampled.token,
            text,
            finish,
            sampled.logprob,
            sampled.top,
            len(self.prompt_ids),
            spellings,
            self.cached_tokens if len(self.generated_ids) == 1 else 0,
        )
