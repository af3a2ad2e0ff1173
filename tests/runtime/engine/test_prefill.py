"""Prefill behind a gate that opens stage by stage, against Transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Ids
from itertools import pairwise
from typing import Any

import pytest

from coldframe.loader.errors import SourceChanged
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine import prefill
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

    def __init__(self, pair: Any, ready: int = 0, chunk: int = 512) -> None:
        self.pair = pair
        self.ready = ready
        self.failure: Exception | None = None
        self.recorder = Recorder("prefill-0")
        self.prefiller = Prefiller(pair.model, self.is_ready, self.recorder, chunk)
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


# -- once all weights are in ------------------------------------------------------------------


def order(loading: Loading) -> list[set[str]]:
    """Which requests came to their end together, in the order in which they did."""
    return [set(tokens(group)) for group in loading.go_on()]


def test_a_long_prompt_gives_way_to_shorter_ones(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES)
    found: dict[str, int] = {}
    loading.admit(prompts[300])
    loading.prefiller.advance()
    loading.admit(prompts[64])
    loading.admit(prompts[64])
    loading.prefiller.advance()
    loading.admit(prompts[1])
    ended = loading.go_on()
    # The shortest overtook all; the two behind it fill the device together.
    assert [set(tokens(group)) for group in ended] == [{"r3"}, {"r1", "r2"}, {"r0"}]
    for group in ended:
        found |= tokens(group)
    for row, length in enumerate((300, 64, 64, 1)):
        assert [found[f"r{row}"]] == loading.pair.reference_greedy(prompts[length], 1)


def test_few_tokens_go_together(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    loading = Loading(pair("llama"), STAGES)
    for length in (33, 7, 300, 1, 64):
        loading.admit(prompts[length])
    assert order(loading) == [{"r0", "r1", "r3", "r4"}, {"r2"}]


def test_of_equals_the_first_to_come_is_the_first_to_end(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES)
    for _ in range(3):
        loading.admit(prompts[300])
        loading.prefiller.advance()
    assert order(loading) == [{"r0"}, {"r1"}, {"r2"}]


@pytest.mark.parametrize("chunk", [1, 31, 32, 33, 100, 299, 300])
def test_chunks_change_no_token(pair: MakePair, prompts: dict[int, list[int]], chunk: int) -> None:
    loading = Loading(pair("llama"), STAGES, chunk)
    asked = loading.admit(prompts[300])
    ((sequence, emission),) = loading.go_on()[0]
    assert sequence is asked
    assert [emission.token] == loading.pair.reference_greedy(prompts[300], 1)
    assert sequence.kv_tokens == 300
    assert loading.spans()["prefill[0]"] == -(-300 // chunk)


def test_chunks_of_a_window(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    loading = Loading(pair("mistral"), STAGES, 50)
    loading.admit(prompts[300])
    ((_, emission),) = loading.go_on()[0]
    assert [emission.token] == loading.pair.reference_greedy(prompts[300], 1)


def test_chunks_begin_behind_what_is_in_the_kv(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES, 100)
    loading.admit(prompts[300])
    loading.go_on()
    loading.spans()
    loading.rows = 0  # the blocks that have it already
    again = loading.admit(prompts[300])
    again.kv_tokens = 96
    ((_, emission),) = loading.go_on()[0]
    assert [emission.token] == loading.pair.reference_greedy(prompts[300], 1)
    assert loading.spans()["prefill[0]"] == 3  # 204 tokens


def test_what_is_in_the_kv_is_not_computed_while_the_weights_come(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    before = Loading(pair("llama"), STAGES)
    before.admit(prompts[300])
    before.go_on()
    loading = Loading(before.pair)
    known, other = loading.admit(prompts[300]), loading.admit(prompts[64])
    known.kv_tokens = 288
    ended = []
    for _ in range(STAGES):
        loading.ready += 1
        ended += loading.go_on()
    assert tokens(ended[0]) == {
        "r0": loading.pair.reference_greedy(prompts[300], 1)[0],
        "r1": loading.pair.reference_greedy(prompts[64], 1)[0],
    }
    assert known.kv_tokens == 300
    assert other.kv_tokens == 64


def test_a_long_prompt_is_not_overtaken_for_ever(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES, 32)
    loading.admit(prompts[300])
    overtaken = 0
    ended: set[str] = set()
    while "r0" not in ended:
        loading.rows = 1 + overtaken % 6
        loading.admit(prompts[33])  # there is always a shorter one
        while not (emitted := loading.prefiller.advance()):
            pass
        ended = set(tokens(emitted))
        overtaken += 1
    assert 10 < overtaken < 60


def test_a_request_can_be_taken_back(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    loading = Loading(pair("llama"), STAGES, 100)
    long = loading.admit(prompts[300])
    while not long.kv_tokens:
        assert loading.prefiller.advance() == []
    loading.prefiller.advance()  # in the middle of its second chunk
    assert loading.prefiller.remove("r0") is long
    assert loading.prefiller.idle
    waiting = loading.admit(prompts[7])
    assert loading.prefiller.remove("r1") is waiting
    for length in (7, 33):
        loading.admit(prompts[length])
    loading.prefiller.advance()
    assert loading.prefiller.remove("r2") is None  # together with another
    assert loading.prefiller.remove("unknown") is None
    assert order(loading) == [{"r2", "r3"}]


def test_what_goes_together_is_bounded_by_what_was_measured(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES)
    loading.prefiller.full = 40
    for length in (33, 7, 1, 64):
        loading.admit(prompts[length])
    assert order(loading) == [{"r1", "r2"}, {"r0"}, {"r3"}]


def test_who_would_have_to_wait_is_told(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    loading = Loading(pair("llama"), STAGES)
    prefiller = loading.prefiller

    def has_room_for(length: int) -> bool:
        asking = loading.admit(prompts[length])
        assert prefiller.remove(asking.request) is asking
        loading.rows -= 1
        return prefiller.has_room_for(asking)

    loading.ready = 1
    loading.admit(prompts[300])
    prefiller.advance()
    assert has_room_for(300)  # the weights are still awaited, and nobody else could do better
    loading.ready = STAGES
    prefiller.advance()
    # A longer one that has just begun is overtaken.
    assert has_room_for(64)
    assert not has_room_for(300)
    for _ in range(2):
        loading.admit(prompts[64])
    # As many tokens as fill the device are to go before it, and then one batch more.
    assert has_room_for(33)
    assert not has_room_for(64)
    for _ in range(4):
        loading.admit(prompts[33])
    assert not has_room_for(33)
    assert has_room_for(1)


def test_who_has_waited_long_goes_before_who_comes(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    loading = Loading(pair("llama"), STAGES, 32)
    loading.prefiller.full = 40
    loading.admit(prompts[300])
    loading.prefiller.advance()
    asking = Sequence("asking", 0, tuple(prompts[33]), (), SamplingParams(), Silent(), ())
    rooms = []
    while not loading.prefiller.idle:
        rooms.append(loading.prefiller.has_room_for(asking))
        loading.prefiller.advance()
    # A long prompt is overtaken as long as much of it is left, and only so long.
    assert rooms[0]
    assert [before for before, after in pairwise(rooms) if before != after] == [True]


# -- in either case ---------------------------------------------------------------------------


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


def test_what_would_fill_the_device_waits_for_all_weights(
    pair: MakePair, prompts: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_COLD", 72)
    loading = Loading(pair("llama"), ready=2, chunk=64)
    asked = [loading.admit(prompts[length]) for length in (64, 300, 7)]
    assert loading.go_on() == []
    assert loading.spans() == {"prefill[embedding]": 1, "prefill[0]": 1}
    assert [g.batch.tokens for g in loading.prefiller._groups] == [71]
    loading.ready = STAGES
    ended = [tokens(group) for group in loading.go_on()]
    answers = {request: token for group in ended for request, token in group.items()}
    assert answers == {
        sequence.request: loading.pair.reference_greedy(sequence.prompt_ids, 1)[0]
        for sequence in asked
    }
    assert list(ended[-1]) == [asked[1].request]
