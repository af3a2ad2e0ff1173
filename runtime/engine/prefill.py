"""Prefill while the weights arrive: layer i runs as soon as stage i is in.

Requests that are there when the first stage lands go through the layers as one ragged batch, the
*leader*. Those that come later start behind it and use the time in which the leader waits for
weights; where they catch up with it they join it. Once all weights are in nobody waits, and
groups run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.batch import Batch
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.sampling import sample
from coldframe.runtime.engine.sequence import Emission, Sequence

__all__ = ["Prefiller"]


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
    """

    def __init__(
        self, model: Model, is_ready: Callable[[int], bool], recorder: Recorder | None = None
    ) -> None:
        self._model = model
        self._layers = model.spec.layers
        self._is_ready = is_ready
        self._recorder = recorder
        self._waiting: list[Sequence] = []
        self._groups: list[_Group] = []  # the leader first

    def admit(self, sequence: Sequence) -> None:
        """Takes a request; its blocks have room for all that it has to compute."""
        self._waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._groups

    @property
    def blocked_on(self) -> int:
        """The stage that the next piece of work waits for, where `advance` found none."""
        return self._groups[0].layer + 1 if self._groups else 0

    def advance(self) -> list[tuple[Sequence, Emission]] | None:
        """Does one piece of work: one group through one layer.

        Returns:
            The first tokens of a group that came to its end, nothing while there is more to do,
            or None where all work there is waits for weights.
        """
        if self._waiting and self._is_ready(0) and self._room_for_newcomers():
            self._start()
            return []
        for group in self._groups:
            if self._is_ready(group.layer + 1):
                return self._run(group)
        return None

    def _room_for_newcomers(self) -> bool:
        # They run at once where the leader waits; else after it, as one batch of all that came.
        return not self._groups or not self._is_ready(self._groups[0].layer + 1)

    def _start(self) -> None:
        sequences, self._waiting = self._waiting, []
        started = now()
        batch = Batch.build(
            [sequence.chunk() for sequence in sequences], block_tokens=self._model.kv.block_tokens
        )
        self._groups.append(_Group(sequences, batch, self._model.embed(batch), 0))
        self._record("prefill[embedding]", started)
        self._join()

    def _run(self, group: _Group) -> list[tuple[Sequence, Emission]]:
        started = now()
        if group.layer < self._layers:
            group.x = self._model.layer(group.layer, group.x, group.batch)
            self._record(f"prefill[{group.layer}]", started)
            group.layer += 1
            self._join()
            return []
        logits = self._model.logits(group.x, group.batch)
        sampled = sample(logits, [sequence.sample_input() for sequence in group.sequences])
        self._groups.remove(group)
        self._record("prefill[head]", started)
        return [
            (sequence, sequence.accept(token))
            for sequence, token in zip(group.sequences, sampled, strict=True)
        ]

    def _join(self) -> None:
        """Makes one group of neighbours that are at the same layer."""
        joined: list[_Group] = []
        for group in self._groups:
            if joined and joined[-1].layer == group.layer:
                ahead = joined[-1]
                ahead.sequences += group.sequences
                ahead.batch = Batch.concat([ahead.batch, group.batch])
                ahead.x = torch.cat([ahead.x, group.x])
            else:
                joined.append(group)
        self._groups = joined

    def _record(self, name: str, started: int) -> None:
        if self._recorder is not None:
            self._recorder.add(name, started)
