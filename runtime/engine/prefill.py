"""Prefill: while the weights arrive layer by layer, and after that so that nobody waits for long.

While weights arrive, layer i runs as soon as stage i is in. Requests that are there when the first
stage lands go through the layers as one ragged batch, the *leader*. Those that come later start
behind it and use the time in which the leader waits for weights; where they catch up with it they
join it.

Once all weights are in, time is what the prompts share, and the mean wait is least where the one
that is over soonest goes first. So a long prompt goes in chunks, and between any two layers it
gives way to a shorter one. Patience ends: a prompt is overtaken by some times its own length at
most. Prompts go together where one alone would not fill the device; more would only make the
shortest of them wait for the longest.

On a GPU a piece of work is over here when it is queued: nothing waits for it before a group's first
tokens are drawn, or a chunk ends. So while weights arrive a layer is queued the moment its stage is
in, and a span `prefill[i]` says how long that took; the last one has what was left to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.sampling import sample
from coldframe.runtime.engine.sequence import Emission, Sequence

__all__ = ["Prefiller"]


_CHUNK = 512
"""Tokens of a long prompt that go through the layers together, once all weights are in."""
_COLD = 8192
"""Tokens that go through the layers together at most while weights arrive. Longer prompts wait for
the last of them, and then go in chunks: what they hold between two layers would fill a GPU."""
_FULL = 128
"""Tokens in a batch that saturates the device, until that is measured (`engine/saturation.py`)."""
_PATIENCE = 4
"""By how many times its own length in tokens of others a prompt is overtaken, about."""


@dataclass(slots=True)
class _Group:
    """Requests that are at the same layer. `x` is `[tokens, hidden]`, what goes into it."""

    sequences: list[Sequence]
    batch: Batch
    x: torch.Tensor
    layer: int


class Prefiller:
    """Runs prompts through a model whose weights may still be coming.

    Args:
        model: The model.
        is_ready: Whether a stage's weights are in; may raise, if they will never be.
        recorder: Gets a span `prefill[i]` for each layer until the first token.
        chunk: The most tokens of a prompt at once, once all weights are in.

    Attributes:
        full: Tokens in a batch beyond which a token takes as long as in a larger one.
    """

    def __init__(
        self,
        model: Model,
        is_ready: Callable[[int], bool],
        recorder: Recorder | None = None,
        chunk: int = _CHUNK,
    ) -> None:
        self._model = model
        self._layers = model.spec.layers
        self._is_ready = is_ready
        self._recorder = recorder
        self._chunk = chunk
        self.full = _FULL
        self._loaded = False
        self._computed = 0
        """Tokens, so far: the clock by which patience ends."""
        self._born: dict[str, int] = {}
        """By that clock, when each request came."""
        self._waiting: list[Sequence] = []
        self._groups: list[_Group] = []  # while weights arrive, the leader first

    def admit(self, sequence: Sequence) -> None:
        """Takes a request; its blocks have room for all that it has to compute."""
        self._born[sequence.request] = self._computed
        self._waiting.append(sequence)

    def remove(self, request: str) -> Sequence | None:
        """Forgets a request, unless it is being computed together with others."""
        for sequence in self._waiting:
            if sequence.request == request:
                self._waiting.remove(sequence)
                del self._born[request]
                return sequence
        for group in self._groups:
            if [sequence.request for sequence in group.sequences] == [request]:
                self._groups.remove(group)
                del self._born[request]
                return group.sequences[0]
        return None

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._groups

    def has_room_for(self, sequence: Sequence) -> bool:
        """Whether a request would go into the next batch, or weights are still awaited.

        Else it would wait for others: for such as have less left than it has, or have waited long.
        """
        if not self._loaded:
            return True
        rank = self._computed + _PATIENCE * sequence.left
        ahead = sum(other.left for other in self._waiting if self._rank(other) <= rank)
        ahead += sum(
            other.left
            for group in self._groups
            if self._rank_of_group(group) <= rank
            for other in group.sequences
        )
        return ahead + sequence.left <= self.full

    @property
    def blocked_on(self) -> int:
        """The stage that the next piece of work waits for, where `advance` found none."""
        return self._groups[0].layer + 1 if self._groups else 0

    def weights_leave(self) -> None:
        """The weights leave, and come again stage by stage; only while it is `idle`."""
        self._loaded = False

    def advance(self) -> list[tuple[Sequence, Emission]] | None:
        """Does one piece of work: one group through one layer.

        Returns:
            The first tokens of a group that came to its end, nothing while there is more to do,
            or None where all work there is waits for weights.
        """
        # The last of all, as they come in the order of use.
        self._loaded = self._loaded or all(map(self._is_ready, range(self._layers + 2)))
        if self._loaded:
            return self._take_turns()
        if self._waiting and self._is_ready(0) and self._room_for_newcomers():
            sequences = self._newcomers()
            if sequences:
                self._start(sequences, [sequence.chunk() for sequence in sequences])
                self._join()
                return []
        for group in self._groups:
            if self._is_ready(group.layer + 1):
                return self._run(group)
        return None

    # -- while weights arrive --------------------------------------------------------------------

    def _room_for_newcomers(self) -> bool:
        # They run at once where the leader waits; else after it, as one batch of all that came.
        return not self._groups or not self._is_ready(self._groups[0].layer + 1)

    def _newcomers(self) -> list[Sequence]:
        """Takes as many of those that wait as there is room for, the first to come first."""
        room = _COLD - sum(group.batch.tokens for group in self._groups)
        taken: list[Sequence] = []
        waiting, self._waiting = self._waiting, []
        for sequence in waiting:
            if sequence.left <= room:
                room -= sequence.left
                taken.append(sequence)
            else:
                self._waiting.append(sequence)
        return taken

    def _join(self) -> None:
        """Makes one group of neighbours that are at the same layer."""
        joined: list[_Group] = []
        for group in self._groups:
            if joined and joined[-1].layer == group.layer:
                ahead = joined[-1]
                ahead.sequences += group.sequences
                ahead.batch = self._model.batch([*ahead.batch.chunks, *group.batch.chunks])
                ahead.x = torch.cat([ahead.x, group.x])
            else:
                joined.append(group)
        self._groups = joined

    # -- once they are in ------------------------------------------------------------------------

    def _take_turns(self) -> list[tuple[Sequence, Emission]]:
        """Has the group go on that is over soonest, or one start that will be."""
        self._waiting.sort(key=self._rank)
        group = min(self._groups, key=self._rank_of_group, default=None)
        if self._waiting and (
            group is None or self._rank(self._waiting[0]) < self._rank_of_group(group)
        ):
            self._start_next()
            return []
        assert group is not None
        return self._run(group)

    def _start_next(self) -> None:
        """Starts the first one that waits, with those behind it that the device has room for."""
        first = self._waiting.pop(0)
        sequences, chunks = [first], [first.chunk(self._chunk)]
        tokens = len(chunks[0].token_ids)
        while self._waiting and tokens + self._waiting[0].left <= self.full:
            sequences.append(self._waiting.pop(0))
            chunks.append(sequences[-1].chunk())
            tokens += len(chunks[-1].token_ids)
        self._start(sequences, chunks)

    def _rank(self, sequence: Sequence, done: float = 0.0) -> float:
        """Who has the least goes first: when a request came, and what is left of it."""
        return self._born[sequence.request] + _PATIENCE * (sequence.left - done)

    def _rank_of_group(self, group: _Group) -> float:
        done = group.layer / (self._layers + 1)
        return min(
            self._rank(sequence, done * len(chunk.token_ids))
            for sequence, chunk in zip(group.sequences, group.batch.chunks, strict=True)
        )

    # -- the work itself -------------------------------------------------------------------------

    def _start(self, sequences: list[Sequence], chunks: list[Chunk]) -> None:
        started = now()
        batch = self._model.batch(chunks)
        self._groups.append(_Group(sequences, batch, self._model.embed(batch), 0))
        self._record("prefill[embedding]", started)

    def _run(self, group: _Group) -> list[tuple[Sequence, Emission]]:
        """One group through one layer; its first tokens behind the last one."""
        started = now()
        if group.layer < self._layers:
            group.x = self._model.layer(group.layer, group.x, group.batch)
            self._record(f"prefill[{group.layer}]", started)
            group.layer += 1
            if not self._loaded:
                self._join()
            return []
        self._groups.remove(group)
        self._computed += group.batch.tokens
        (first, *_), (chunk, *_) = group.sequences, group.batch.chunks
        if len(chunk.token_ids) < first.left:  # alone, and not at its end
            first.kv_tokens += len(chunk.token_ids)
            # So that a GPU is never more than a chunk behind what is decided here: who comes next
            # would have to wait for all that was queued.
            self._model.settle()
            self._waiting.append(first)
            return []
        logits = self._model.logits(group.x, group.batch)
        sampled = sample(logits, [sequence.sample_input() for sequence in group.sequences])
        self._record("prefill[head]", started)
        for sequence in group.sequences:
            del self._born[sequence.request]
        return [
            (sequence, sequence.accept(token))
            for sequence, token in zip(group.sequences, sampled, strict=True)
        ]

    def _record(self, name: str, started: int) -> None:
        if self._recorder is not None:
            self._recorder.add(name, started)
