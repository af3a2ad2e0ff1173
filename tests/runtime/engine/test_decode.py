"""Continuous batching: requests join, leave and resume in mid-way, against Transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sequence import Sequence

MakePair = Callable[..., Any]


class Silent:
    """A text stream for requests whose text nobody reads."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> tuple[str, bool]:
        return "", False


def request(
    pair: Any,
    row: int,
    prompt: list[int],
    count: int,
    generated: tuple[int, ...] = (),
    kv_tokens: int = 0,
    eos: tuple[int, ...] = (),
) -> Sequence:
    params = SamplingParams(max_tokens=count)
    sequence = Sequence(f"r{row}", 0, tuple(prompt), generated, params, Silent(), eos)
    sequence.blocks = pair.chunk(prompt, row).blocks
    sequence.kv_tokens = kv_tokens
    return sequence


def test_requests_join_and_leave_a_running_batch(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, beside=300)
    # By step: who joins. Their KV is empty, so a first step is their whole prompt.
    joins = {
        0: request(both, 0, prompts[33], 12),
        2: request(both, 1, prompts[300], 5),
        3: request(both, 2, prompts[1], 9),
        9: request(both, 3, prompts[64], 3),
    }
    answers: dict[str, list[int]] = defaultdict(list)
    sizes = []
    for step in range(12):
        if step in joins:
            decoder.admit(joins[step])
        emitted = decoder.step()
        sizes.append(len(emitted))
        for sequence, emission in emitted:
            assert emission.index == len(answers[sequence.request])
            answers[sequence.request].append(emission.token)
            last = emission.index + 1 == sequence.params.max_tokens
            assert emission.finish == ("length" if last else None)
    assert len(decoder) == 0
    assert sizes == [1, 1, 2, 3, 3, 3, 3, 2, 2, 3, 3, 3]
    for sequence in joins.values():
        count = sequence.params.max_tokens
        assert answers[sequence.request] == both.reference_greedy(sequence.prompt_ids, count)


@pytest.mark.parametrize("kv_tokens", [0, 1, 20, 32, 33, 40, 41])
def test_a_request_resumes_from_what_kv_there_is(
    pair: MakePair, prompts: dict[int, list[int]], kv_tokens: int
) -> None:
    both = pair("llama")
    answer = both.reference_greedy(prompts[33], 15)
    decoder = Decoder(both.model)
    first = request(both, 0, prompts[33], 15)
    decoder.admit(first)
    for _ in range(9):
        decoder.step()
    assert first.kv_tokens == 41
    assert decoder.remove("r0") is first
    assert decoder.remove("r0") is None
    assert len(decoder) == 0
    # The same blocks in another's hands, beside a request that goes on undisturbed.
    decoder.admit(request(both, 0, prompts[33], 15, tuple(answer[:9]), kv_tokens))
    decoder.admit(request(both, 1, prompts[7], 6))
    tokens: dict[str, list[int]] = defaultdict(list)
    while len(decoder):
        for sequence, emission in decoder.step():
            tokens[sequence.request].append(emission.token)
    assert tokens["r0"] == answer[9:]
    assert tokens["r1"] == both.reference_greedy(prompts[7], 6)


def test_an_end_of_text_token_ends_a_request(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    both = pair("llama")
    answer = both.reference_greedy(prompts[7], 8)
    eos = answer[4]
    decoder = Decoder(both.model)
    decoder.admit(request(both, 0, prompts[7], 8, eos=(eos,)))
    emissions = []
    while len(decoder):
        emissions += [emission for _, emission in decoder.step()]
    assert [emission.token for emission in emissions] == answer[: answer.index(eos) + 1]
    assert emissions[-1].finish == "stop"


def test_a_full_batch_makes_the_others_wait(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, most=2)
    for row in range(4):
        decoder.admit(request(both, row, prompts[7], 2 + row))
    answers: dict[str, list[int]] = defaultdict(list)
    while len(decoder):
        emitted = decoder.step()
        assert len(emitted) <= 2
        for sequence, emission in emitted:
            answers[sequence.request].append(emission.token)
    expected = both.reference_greedy(prompts[7], 5)
    assert answers == {f"r{row}": expected[: 2 + row] for row in range(4)}


# -- requests that are behind ------------------------------------------------------------------


def test_who_is_behind_does_not_stop_the_others(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, beside=40)
    running = request(both, 0, prompts[7], 20)
    decoder.admit(running)
    decoder.step()
    late = [request(both, 1, prompts[300], 5), request(both, 2, prompts[64], 5)]
    for sequence in late:
        decoder.admit(sequence)
    left: list[tuple[int, int]] = []
    answers: dict[str, list[int]] = defaultdict(list)
    while len(decoder):
        emitted = decoder.step()
        assert len(decoder) < 3 or running in [sequence for sequence, _ in emitted]
        left.append((late[0].left, late[1].left))
        for sequence, emission in emitted:
            answers[sequence.request].append(emission.token)
    # 40 tokens a step, of the first until it has caught up; what is over goes to the next.
    assert left[:9] == [(300 - 40 * step, 64) for step in range(1, 8)] + [(1, 44), (1, 4)]
    for sequence in late:
        assert answers[sequence.request] == both.reference_greedy(sequence.prompt_ids, 5)
    assert answers["r0"] == both.reference_greedy(prompts[7], 20)[1:]


def test_who_disturbs_nobody_catches_up_at_once(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, beside=1)
    first, second = request(both, 0, prompts[300], 3), request(both, 1, prompts[300], 3)
    decoder.admit(first)
    decoder.admit(second)
    assert (decoder.step(), decoder.step()) == ([], [])  # 128 tokens in each
    ((sequence, emission),) = decoder.step()
    assert sequence is first
    assert [emission.token] == both.reference_greedy(prompts[300], 1)
    # It went together with the first of the other, which is alone with it from now on.
    assert second.left == 300 - (3 * 128 - 300)
    decoder.remove("r0")
    assert decoder.step() == []
    ((sequence, emission),) = decoder.step()
    assert sequence is second
    assert [emission.token] == both.reference_greedy(prompts[300], 1)


@pytest.mark.parametrize("beside", [1, 31, 32, 33])
def test_pieces_of_any_size_give_the_same_tokens(
    pair: MakePair, prompts: dict[int, list[int]], beside: int
) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, beside=beside)
    decoder.admit(request(both, 0, prompts[7], 100))
    decoder.step()
    answer = both.reference_greedy(prompts[64], 12)
    # Half of its prompt is in the KV, and it has said something before.
    decoder.admit(request(both, 1, prompts[64], 12))
    for _ in range(3):
        decoder.step()
    again = decoder.remove("r1")
    assert again is not None
    again.generated_ids[:] = answer[:4]
    decoder.admit(again)
    tokens: list[int] = []
    while len(tokens) < 8:
        tokens += [e.token for sequence, e in decoder.step() if sequence is again]
    assert tokens == answer[4:]


def test_who_is_behind_can_be_taken_back(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    both = pair("llama")
    decoder = Decoder(both.model, beside=40)
    decoder.admit(request(both, 0, prompts[7], 4))
    decoder.step()
    behind = request(both, 1, prompts[300], 5)
    decoder.admit(behind)
    decoder.step()
    assert decoder.remove("r1") is behind
    assert behind.kv_tokens == 40  # and so much of it is there for others
    tokens = [emission.token for _ in range(2) for _, emission in decoder.step()]
    assert tokens == both.reference_greedy(prompts[7], 4)[2:]
