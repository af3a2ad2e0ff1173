"""Prefill behind a gate that opens stage by stage, against Transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Any

import pytest

from coldframe.loader.errors import SourceChanged
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.sequence import Emission, Sequence

STAGES = 4  # the embedding, two layers, the head
MakePair = Callable[..., Any]


class Silent:
    """A text stream for requests whose text nobody reads."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> tuple[str, bool]:
        return "", False


class Loading:
    """A prefiller over weights that come in one stage at a time."""

    def __init__(self, pair: Any, ready: int = 0) -> None:
        self.pair = pair
        self.ready = ready
        self.failure: Exception | None = None
        self.recorder = Recorder("prefill-0")
        self.prefiller = Prefiller(pair.model, self.is_ready, self.recorder)
        self.rows = 0

    def is_ready(self, stage: int) -> bool:
        if self.failure is not None and stage >= self.ready:
            raise self.failure
        return stage < self.ready

    def admit(self, ids: Ids[int], generated: Ids[int] = ()) -> Sequence:
        sequence = Sequence(
            f"r{self.rows}", 0, tuple(ids), tuple(generated), SamplingParams(), Silent(), ()
        )
        sequence.blocks = self.pair.chunk(ids, self.rows).blocks
        self.rows += 1
        self.prefiller.admit(sequence)
        return sequence

    def go_on(self) -> list[list[tuple[Sequence, Emission]]]:
        """Runs as far as the weights allow: the groups that came to their end, in order."""
        ended = []
        while not self.prefiller.idle:
            emitted = self.prefiller.advance()
            if emitted is None:
                break
            if emitted:
                ended.append(emitted)
        return ended

    def spans(self) -> Counter[str]:
        """How often each layer was run."""
        return Counter(span.name for span in self.recorder.drain())


def tokens(group: list[tuple[Sequence, Emission]]) -> dict[str, int]:
    return {sequence.request: emission.token for sequence, emission in group}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_that_wait_for_the_first_stage_are_one_batch(
    pair: MakePair, prompts: dict[int, list[int]], family: str
) -> None:
    loading = Loading(pair(family))
    asked = [loading.admit(prompts[length]) for length in (1, 7, 64, 300)]
    ended = []
    for stage in range(STAGES):
        assert loading.prefiller.blocked_on == stage
        assert loading.prefiller.advance() is None
        loading.ready += 1
        ended += loading.go_on()
    (group,) = ended
    assert loading.prefiller.idle
    assert [sequence for sequence, _ in group] == asked
    for sequence, emission in group:
        (first,) = loading.pair.reference_greedy(sequence.prompt_ids, 1)
        assert emission.token == first
        assert emission.index == 0
        assert sequence.kv_tokens == len(sequence.prompt_ids)
    names = ("prefill[embedding]", "prefill[0]", "prefill[1]", "prefill[head]")
    assert loading.spans() == dict.fromkeys(names, 1)


@pytest.mark.parametrize("ready", [1, 2, 3])
def test_late_arrivals_catch_up_and_join(
    pair: MakePair, prompts: dict[int, list[int]], ready: int
) -> None:
    loading = Loading(pair("llama"), ready)
    loading.admit(prompts[64])
    assert loading.go_on() == []
    loading.admit(prompts[33])
    assert loading.go_on() == []
    loading.admit(prompts[7])
    assert loading.go_on() == []
    early = loading.spans()
    # Each went through what was there by itself ...
    assert early == dict.fromkeys(
        ["prefill[embedding]", *(f"prefill[{i}]" for i in range(ready - 1))], 3
    )
    assert loading.prefiller.blocked_on == ready
    loading.ready = STAGES
    (group,) = loading.go_on()
    # ... and all of them together through the rest.
    assert set(loading.spans().values()) == {1}
    assert tokens(group) == {
        f"r{row}": loading.pair.reference_greedy(prompts[length], 1)[0]
        for row, length in enumerate((64, 33, 7))
    }


def test_once_loaded_the_first_to_come_is_the_first_to_end(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES)
    loading.admit(prompts[300])
    assert loading.prefiller.advance() == []
    loading.admit(prompts[7])
    assert loading.prefiller.advance() == []
    loading.admit(prompts[1])
    groups = [tokens(group) for group in loading.go_on()]
    # Those that came while the first was computed go together after it.
    assert [set(group) for group in groups] == [{"r0"}, {"r1", "r2"}]
    for row, length in enumerate((300, 7, 1)):
        found = next(group[f"r{row}"] for group in groups if f"r{row}" in group)
        assert [found] == loading.pair.reference_greedy(prompts[length], 1)


def test_what_was_generated_before_is_computed_with_the_prompt(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES)
    answer = loading.pair.reference_greedy(prompts[33], 6)
    loading.admit(prompts[33], answer[:5])
    ((_, emission),) = loading.go_on()[0]
    assert (emission.index, emission.token) == (5, answer[5])


def test_weights_that_will_not_come_are_an_error(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), 2)
    loading.admit(prompts[7])
    loading.go_on()
    loading.failure = SourceChanged("the file shrank")
    with pytest.raises(SourceChanged):
        loading.prefiller.advance()
