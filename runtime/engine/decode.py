"""Decode with continuous batching: all running requests, one token each, step by step.

A request of which more is missing in the KV than its last token needs no path of its own: what is
missing is simply more than one token of a step. That is so where its former worker died and the KV
with it, and where the prefill workers left the rest of its prompt to this one. But a token of each
request waits for the whole step, so little of such a request goes into one beside others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.sampling import sample
from coldframe.runtime.engine.sequence import Emission, Sequence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BESIDE", "MOST", "Decoder", "Steps"]

MOST = 64
"""Requests in the largest batch."""
BESIDE = 32
"""Tokens that are computed beside the next ones of running requests: a step takes about twice as
long with them."""
_ALONE = 128
"""Tokens that are computed in a step for which no other request waits: more would take no less time
a token, and a step is not interrupted."""


class Steps(Protocol):
    """What computes decode steps in the model's place."""

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits `[S, vocab_size]`, float32; as `Model.forward` of the chunks' batch."""
        ...


class Decoder:
    """The requests that a worker decodes.

    Args:
        model: The model, all its weights in.
        most: The largest batch; more requests wait their turn.
        beside: Tokens in a step, beside one of each running request, of those that are behind.
        graphs: What computes the steps; None is the model itself.
    """

    def __init__(
        self,
        model: Model,
        most: int = MOST,
        beside: int = BESIDE,
        graphs: Steps | None = None,
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._most = most
        self._beside = beside
        self._running: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, sequence: Sequence) -> None:
        """Takes a request; its blocks have room for all its tokens."""
        self._running[sequence.request] = sequence

    def remove(self, request: str) -> Sequence | None:
        """Forgets a request, where it is here."""
        return self._running.pop(request, None)

    def step(self) -> list[tuple[Sequence, Emission]]:
        """The next token of each request that is not behind. Those that have finished are gone."""
        sequences, chunks = self._next()
        logits = self._forward(chunks)
        if len(chunks[-1].token_ids) < sequences[-1].left:
            sequences.pop().kv_tokens += len(chunks[-1].token_ids)
        if not sequences:
            self._model.settle()  # or what is queued would grow ever longer, with nobody to wait
            return []
        sampled = sample(
            logits[: len(sequences)], [sequence.sample_input() for sequence in sequences]
        )
        emitted = []
        for sequence, token in zip(sequences, sampled, strict=True):
            emission = sequence.accept(token)
            if emission.finish is not None:
                del self._running[sequence.request]
            emitted.append((sequence, emission))
        return emitted

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        if self._graphs is not None:
            return self._graphs.forward(chunks)
        return self._model.forward(self._model.batch(chunks))

    def _next(self) -> tuple[list[Sequence], list[Chunk]]:
        """What goes into the next step, and last of it a request that stays behind.

        Of those that are behind the first to come goes first.
        """
        running = list(self._running.values())[: self._most]
        room = self._beside if any(sequence.left == 1 for sequence in running) else _ALONE
        whole: list[tuple[Sequence, Chunk]] = []
        in_part: list[tuple[Sequence, Chunk]] = []  # one at most: it takes all the room there is
        for sequence in running:
            if sequence.left > 1 and not room:
                continue
            chunk = sequence.chunk(room if sequence.left > 1 else None)
            if sequence.left > 1:
                room -= len(chunk.token_ids)
            (whole if len(chunk.token_ids) == sequence.left else in_part).append((sequence, chunk))
        both = whole + in_part
        return [sequence for sequence, _ in both], [chunk for _, chunk in both]
