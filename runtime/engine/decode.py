"""Decode with continuous batching: all running requests, one token each, step by step.

A request whose KV is not complete (its former worker died) needs no path of its own: what is
missing is simply more than one token of its first step.
"""

from __future__ import annotations

from coldframe.runtime.engine.batch import Batch
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.sampling import sample
from coldframe.runtime.engine.sequence import Emission, Sequence

__all__ = ["Decoder"]


class Decoder:
    """The requests that a worker decodes.

    Args:
        model: The model, all its weights in.
        most: The largest batch; more requests wait their turn.
    """

    def __init__(self, model: Model, most: int = 64) -> None:
        self._model = model
        self._most = most
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
        """The next token of each running request. Those that have finished are gone after it."""
        sequences = list(self._running.values())[: self._most]
        batch = Batch.build(
            [sequence.chunk() for sequence in sequences], block_tokens=self._model.kv.block_tokens
        )
        logits = self._model.forward(batch)
        sampled = sample(logits, [sequence.sample_input() for sequence in sequences])
        emitted = []
        for sequence, token in zip(sequences, sampled, strict=True):
            emission = sequence.accept(token)
            if emission.finish is not None:
                del self._running[sequence.request]
            emitted.append((sequence, emission))
        return emitted
