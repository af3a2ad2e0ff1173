"""Captured decode steps, replayed from what ATen was asked for once; see `recording`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from coldframe.loader.errors import DeviceError, DeviceLost, RequestError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.fixed import FixedSteps
from coldframe.runtime.engine.graphs import StepGraphs
from coldframe.runtime.engine.model import Chunk
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.engine.trial import Stopwatch
from coldframe.runtime.engine.varlen import WAYS, Varlen, Way
from tests.runtime.engine.conftest import Pair, make_pair, make_reference, small_config
from tests.runtime.engine.recording import Recording, RecordingCapturer
from tests.runtime.engine.test_decode import Silent
from tests.runtime.engine.test_varlen import kernel

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "biases and a tied head": ("qwen2", {"attention_bias": True, "tie_word_embeddings": True}),
    "layers that slide": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "dynamic RoPE and a window": (
        "mistral",
        {
            "sliding_window": 20,
            "rope_scaling": {"rope_type": "dynamic", "factor": 8.0},
            "max_position_embeddings": 48,
        },
    ),
}
NEAR = {"rtol": 0.0, "atol": 1e-4}
Make = Callable[..., Pair]


@pytest.fixture(scope="module")
def make(references: dict[str, Any]) -> Make:
    """Makes a pair, its weights as a GPU has them, and with KV of its own each time."""

    def made(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Pair:
        key = repr((family, dtype, sorted(changes.items())))
        config = small_config(family, **changes)
        if key not in references:
            references[key] = make_reference(config, dtype)
        return make_pair(references[key], config, dtype, "aligned")

    return made


@dataclass
class Talk:
    """Requests that are decoded greedily: their prompts are in the KV."""

    pair: Pair
    prompts: list[list[int]]
    ids: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for row, prompt in enumerate(self.prompts):
            batch = self.pair.model.batch([self.pair.chunk(prompt, row)])
            first = int(self.pair.model.forward(batch)[0].argmax())
            self.ids.append([*prompt, first])

    def chunks(self, rows: list[int]) -> list[Chunk]:
        """The next token of some of them."""
        return [
            self.pair.chunk(self.ids[row], row, len(self.ids[row]) - 1, len(self.prompts[row]))
            for row in rows
        ]

    def take(self, rows: list[int], logits: Tensor) -> None:
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            self.ids[row].append(token)

    def check(self) -> None:
        """The answers are those of Transformers."""
        for prompt, ids in zip(self.prompts, self.ids, strict=True):
            answer = ids[len(prompt) :]
            assert answer == self.pair.reference_greedy(prompt, len(answer))


def talk(pair: Pair, *lengths: int) -> Talk:
    generator = random.Random(5)
    return Talk(pair, [[generator.randrange(3, 256) for _ in range(n)] for n in lengths])


def go_on(talking: Talk, graphs: StepGraphs, steps: int, rows: list[int] | None = None) -> None:
    """Some steps as a worker makes them."""
    rows = list(range(len(talking.ids))) if rows is None else rows
    for _ in range(steps):
        talking.take(rows, graphs.forward(talking.chunks(rows)))
        graphs.between_steps()


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MODELS)
def test_random_batches_get_what_they_would_without(make: Make, shape: str) -> None:
    """A replay equals the same step done kernel by kernel, to the bit, whatever is in it."""
    family, changes = MODELS[shape]
    pair = make(family, **changes)
    eager = FixedSteps(pair.model, 8)
    eager.place(lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=8)
    assert graphs.capture_all() == len(graphs.buckets) > 3
    talking, generator = talk(pair, 250, 1, 30, 63, 100, 31), random.Random(3)
    for _ in range(30):
        rows = generator.sample(range(6), generator.randint(1, 6))
        chunks, before = talking.chunks(rows), graphs.replayed
        logits = graphs.forward(chunks).clone()
        bucket = graphs._bucket_of(chunks)
        assert bucket is not None
        eager.fill(bucket, chunks)
        eager.run(bucket)
        assert graphs.replayed == before or torch.equal(eager.logits(len(rows)), logits)
        plain = pair.model.forward(pair.model.batch(chunks))
        torch.testing.assert_close(logits, plain, **NEAR)
        talking.take(rows, logits)
    assert graphs.replayed > 15
    assert graphs.refused == {}
    talking.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_every_dtype(make: Make, dtype: torch.dtype) -> None:
    pair = make("llama", dtype)
    eager = FixedSteps(pair.model, 4)
    eager.place(lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    graphs.capture_all()
    talking = talk(pair, 30, 5)
    for step in range(12):
        rows = [[0], [1], [0, 1]][step % 3]
        chunks, before = talking.chunks(rows), graphs.replayed
        logits = graphs.forward(chunks).clone()
        bucket = Bucket(len(rows), 8)
        eager.fill(bucket, chunks)
        eager.run(bucket)
        assert graphs.replayed == before or torch.equal(eager.logits(len(rows)), logits)
        talking.take(rows, logits)
    assert graphs.replayed == 12 - 1 - 2
    assert graphs.refused == {}


def test_a_growing_context_goes_from_bucket_to_bucket(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 250)
    go_on(talking, graphs, 20)
    assert list(graphs.captured) == [Bucket(1, 8), Bucket(1, 16)]
    talking.check()


def test_keys_are_read_when_a_step_is_replayed(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 40)
    go_on(talking, graphs, 6)
    chunks = talking.chunks([0])
    replayed, before = graphs.replayed, graphs.forward(chunks).clone()
    block = pair.kv.pages[chunks[0].blocks[0], 1, 0, 3]
    kept = block.clone()
    block.add_(1)
    poisoned = graphs.forward(chunks).clone()
    block.copy_(kept)
    again = graphs.forward(chunks).clone()
    assert graphs.replayed == replayed + 3
    assert float((poisoned - before).abs().max()) > 1e-3
    assert torch.equal(again, before)


def test_a_full_batch_and_its_limit(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, *[3] * 5)
    go_on(talking, graphs, 4, [0, 1, 2, 3])
    assert list(graphs.captured) == [Bucket(4, 8)]
    go_on(talking, graphs, 4)  # five of them: as they come
    assert list(graphs.captured) == [Bucket(4, 8)]
    talking.check()


@pytest.fixture(scope="module")
def flash() -> Iterator[Any]:
    """The stand-in for torch's kernel, as an operator: one call, of which ATen knows no more."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    with torch.library._scoped_library("coldframe_tests", "DEF") as library:
        library.define(f"flash{str(schema).partition('_flash_attention_forward')[2]}")
        library.impl("flash", lambda *args, **more: kernel(*args, **more), "CPU")
        yield torch.ops.coldframe_tests.flash.default


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[-1]], ids=str)
@pytest.mark.parametrize("shape", ["plain", "layers that slide"])
def test_by_a_kernel_for_whole_batches(make: Make, flash: Any, shape: str, way: Way) -> None:
    family, changes = MODELS[shape]
    pair = make(family, **changes)
    pair.model.varlen = Varlen(flash, way)
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 62, 7, 33)
    for rows in ([0], [0, 1, 2], [2]):
        go_on(talking, graphs, 5, rows)
    assert (len(graphs.captured), graphs.refused) == (2, {})
    assert graphs.replayed >= 6
    talking.check()


def test_steps_that_would_copy_too_much_are_left_as_they_are(
    make: Make, flash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldframe.runtime.engine import fixed

    pair = make()
    layer = pair.spec.kv_block_bytes(4) // pair.spec.layers
    monkeypatch.setattr(fixed, "_GATHERED", 16 * layer)
    few = StepGraphs(pair.model, RecordingCapturer(), most=4).buckets
    assert few == (Bucket(1, 8), Bucket(1, 16), Bucket(2, 8))
    pair.model.varlen = Varlen(flash, WAYS[-1])
    assert StepGraphs(pair.model, RecordingCapturer(), most=4).buckets == few
    pair.model.varlen = Varlen(flash, WAYS[0])
    assert len(StepGraphs(pair.model, RecordingCapturer(), most=4).buckets) == 6
    assert len(StepGraphs(pair.model, RecordingCapturer(), most=4, limit=2).buckets) == 2


# -- when it is captured ---------------------------------------------------------------------------


def test_a_bucket_is_captured_between_two_steps_once_it_has_come_twice(make: Make) -> None:
    pair, capturer, recorder = make(), RecordingCapturer(), Recorder("decode")
    graphs = StepGraphs(pair.model, capturer, most=4, recorder=recorder)
    talking = talk(pair, 5, 6)
    for rows, captured in (([0], 0), ([0, 1], 0), ([0], 1), ([0, 1], 2), ([0, 1], 2)):
        before = len(capturer.made)
        talking.take(rows, graphs.forward(talking.chunks(rows)))
        assert len(capturer.made) == before  # never while somebody waits for this step
        graphs.between_steps()
        graphs.between_steps()
        assert len(capturer.made) == captured
    notes = [(span.name, span.note) for span in recorder.drain()]
    assert notes == [
        ("graph_capture", "1 x 8 blocks, in use; 1 so far"),
        ("graph_capture", "2 x 8 blocks, in use; 2 so far"),
    ]
    assert [graph.handle for graph in graphs.captured.values()] == [1, 2]
    talking.check()


def test_while_nobody_asks_the_others_follow(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 5, 6)
    assert not graphs.while_idle()  # somebody's first token comes first
    go_on(talking, graphs, 1)
    order: list[Bucket] = []
    while graphs.while_idle():
        order += set(graphs.captured) - set(order)
    # The one that has come, then the smallest first.
    assert order == [Bucket(2, 8), *(b for b in graphs.buckets if b != Bucket(2, 8))]
    go_on(talking, graphs, 4)
    assert graphs.replayed == 4 - 2
    talking.check()


def test_behind_weights_that_left_a_token_comes_first_again(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 5)
    go_on(talking, graphs, 3)
    assert graphs.while_idle()
    captured = len(graphs.captured)
    graphs.weights_leave()
    assert not graphs.while_idle()
    go_on(talking, graphs, 1)
    assert graphs.replayed == 1  # what was captured holds
    assert graphs.while_idle()
    assert len(graphs.captured) == captured + 1
    talking.check()


def test_what_is_captured_beforehand_leaves_the_kv_alone(make: Make) -> None:
    pair, recorder = make(), Recorder("frozen")
    before = pair.kv.pages.clone().view(torch.uint8)
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4, recorder=recorder)
    assert graphs.capture_all() == len(graphs.buckets) == 6
    assert graphs.capture_all() == 6
    assert torch.equal(pair.kv.pages.view(torch.uint8), before)
    assert len(recorder.drain()) == 6
    talking = talk(pair, 5, 40)
    go_on(talking, graphs, 6)
    assert graphs.replayed == 4
    talking.check()


def test_who_is_behind_is_computed_as_ever(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    ids = [7] * 20
    for start in (0, 5, 10):
        chunks = [pair.chunk(ids[: start + 5], start=start, prompt=20)]
        torch.testing.assert_close(
            graphs.forward(chunks), pair.model.forward(pair.model.batch(chunks))
        )
        assert not graphs.between_steps()
    assert graphs.captured == {}


def test_a_token_without_a_block_is_refused(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    graphs.capture_all()
    go_on(talk(pair, 5), graphs, 4)
    with pytest.raises(RequestError, match="do not fit"):
        graphs.forward([Chunk([7], 32, 32, [5])])


def test_requests_join_and_leave(make: Make) -> None:
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=8)
    decoder = Decoder(pair.model, 8, graphs=graphs)
    answers: dict[str, list[int]] = {}
    prompts = [[3 + (11 * row + n) % 250 for n in range(20 + 9 * row)] for row in range(7)]
    for step in range(40):
        if step % 3 == 0 and step // 3 < len(prompts):
            row = step // 3
            params = SamplingParams(max_tokens=8 + row)
            made = Sequence(f"r{row}", 0, tuple(prompts[row]), (), params, Silent(), ())
            made.blocks = list(pair.chunk(prompts[row], row).blocks)
            decoder.admit(made)
        if len(decoder):
            for sequence, emission in decoder.step():
                answers.setdefault(sequence.request, []).append(emission.token)
            graphs.between_steps()
    assert len(decoder) == 0
    assert graphs.replayed > 5
    for row, prompt in enumerate(prompts):
        assert answers[f"r{row}"] == pair.reference_greedy(prompt, 8 + row)


# -- what fails ------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_captured_is_computed(make: Make) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    pair, recorder = make(), Recorder("decode")
    graphs = StepGraphs(pair.model, RecordingCapturer([error]), most=4, recorder=recorder)
    talking = talk(pair, 5, 6)
    for rows in ([0], [0, 1]):
        go_on(talking, graphs, 5, rows)
    assert list(graphs.captured) == [Bucket(2, 8)]
    assert "CUDA_ERROR_OUT_OF_MEMORY" in str(graphs.refused[Bucket(1, 8)])
    assert isinstance(graphs.refused[Bucket(1, 8)], DeviceError)
    (first, _) = recorder.drain()
    assert "1 x 8 blocks failed: CUDA_ERROR_OUT_OF_MEMORY" in (first.note or "")
    talking.check()


def test_where_nothing_can_be_captured_it_is_not_tried_for_ever(make: Make) -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nand more")
    pair, capturer = make(), RecordingCapturer([error] * 9)
    graphs = StepGraphs(pair.model, capturer, most=4)
    assert graphs.capture_all() == 0
    assert len(graphs.refused) == 3
    (why,) = {str(refused.got) for refused in graphs.refused.values()}
    assert why == "operation not permitted when stream is capturing"
    talking = talk(pair, 5)
    go_on(talking, graphs, 4)
    assert not graphs.while_idle()
    talking.check()


def test_a_capture_may_fail_now_and_then(make: Make) -> None:
    error = RuntimeError("no luck")
    graphs = StepGraphs(make().model, RecordingCapturer([error, error, None] * 2), most=4)
    assert graphs.capture_all() == 2
    assert len(graphs.refused) == 4


def test_a_lost_device_is_told(make: Make) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700
    graphs = StepGraphs(make().model, RecordingCapturer([error]), most=4)
    with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
        graphs.capture_all()


def test_where_there_is_no_memory_for_it_all_is_computed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: object, nbytes: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(RecordingCapturer, "place", none)
    pair = make()
    graphs = StepGraphs(pair.model, RecordingCapturer(), most=4)
    talking = talk(pair, 5)
    go_on(talking, graphs, 4)
    assert graphs.captured == {}
    assert set(graphs.refused) == set(graphs.buckets)
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        graphs.install(Bucket(1, 8), Recording(), 0)
    talking.check()


def test_weights_that_move_are_followed(make: Make) -> None:
    pair, capturer = make(), RecordingCapturer()
    graphs = StepGraphs(pair.model, capturer, most=4)
    talking = talk(pair, 5)
    go_on(talking, graphs, 4)
    first, old = capturer.made[0], pair.weights
    pair.model.rebind(pair.arrange(old))
    for tensor in old.values():
        tensor.fill_(torch.nan)  # nobody looks there any more
    go_on(talking, graphs, 1)
    assert first.closed
    assert capturer.dropped == 1
    go_on(talking, graphs, 3)
    assert len(graphs.captured) == 1
    assert graphs.replayed > 2
    talking.check()


def test_what_was_dropped_is_captured_anew_and_told_to_whom_it_may_concern(make: Make) -> None:
    pair, capturer = make(), RecordingCapturer()
    graphs = StepGraphs(pair.model, capturer, most=4)
    talking = talk(pair, 5)
    go_on(talking, graphs, 5)
    graphs.drop()
    assert (graphs.captured, capturer.dropped) == ({}, 1)
    graphs.report_to(recorder := Recorder("clone"))
    go_on(talking, graphs, 5)
    assert len(capturer.made) == 2
    (span,) = recorder.drain()
    assert span.name == "graph_capture"
    talking.check()


def test_a_kernel_that_takes_bounds_for_lengths_is_found_out(make: Make) -> None:
    """Without padding it is right, as the longest sequence is as long as the bound."""

    def wrong(*args: Any, **more: Any) -> Any:
        longest = int(more["seqused_k"].max())
        assert args[6] >= longest
        out, *rest = kernel(*args, **more)
        return (out * (longest / args[6]), *rest)

    pair, capturer = make(), RecordingCapturer()
    pair.model.varlen = Varlen(wrong, WAYS[0])
    graphs = StepGraphs(pair.model, capturer, most=4)
    talking = talk(pair, 5, 40)
    go_on(talking, graphs, 5)
    assert capturer.made == []
    assert list(graphs.refused) == [Bucket(2, 8)]
    go_on(talking, graphs, 5, [0])
    assert capturer.made == []
    assert set(graphs.refused) == set(graphs.buckets)  # none is trusted behind the second
    (why,) = {refused.what for refused in graphs.refused.values()}
    assert why == "a padded decode step computes something else"
    talking.check()


def test_one_bucket_whose_padding_is_wrong_costs_no_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, capturer = make(), RecordingCapturer()
    really, wrong = FixedSteps.run, [Bucket(1, 8)]

    def run(steps: FixedSteps, bucket: Bucket, *model: Any) -> None:
        really(steps, bucket, *model)
        if bucket in wrong:
            steps.logits(1).mul_(2)

    monkeypatch.setattr(FixedSteps, "run", run)
    graphs = StepGraphs(pair.model, capturer, most=4)
    talking = talk(pair, 5, 40)
    go_on(talking, graphs, 4, [0])
    go_on(talking, graphs, 4)
    assert list(graphs.refused) == [Bucket(1, 8)]
    assert list(graphs.captured) == [Bucket(2, 8)]
    assert graphs.replayed == 1
    talking.check()


def break_numbers(recording: Recording) -> None:
    """As if the host had read the step's numbers once, for good."""
    recording.calls = [call for call in recording.calls if "index_select" not in str(call.operator)]


def break_kv(recording: Recording) -> None:
    """As if keys and values went elsewhere."""
    recording.calls = [call for call in recording.calls if "index_copy_" not in str(call.operator)]


def break_logits(recording: Recording) -> None:
    recording.calls.pop()


@pytest.mark.parametrize("break_it", [break_numbers, break_kv, break_logits])
def test_a_capture_that_computes_something_else_is_found_out(
    make: Make, break_it: Callable[[Recording], None]
) -> None:
    pair, capturer = make(), RecordingCapturer()
    graphs = StepGraphs(pair.model, capturer, most=4)
    talking = talk(pair, 40)
    go_on(talking, graphs, 2)
    break_it(capturer.made[0])
    go_on(talking, graphs, 6)
    assert graphs.replayed == 0
    assert "computes something else" in str(graphs.refused[Bucket(1, 8)])
    assert graphs.captured == {}
    # What it is closed with is taken from others that are yet to be saved.
    assert (capturer.made[0].closed, graphs.dropped) == (False, False)
    graphs.drop()
    assert (capturer.made[0].closed, graphs.dropped) == (True, True)
    talking.check()


def watch(*seconds: float) -> Stopwatch:
    """A stopwatch that gives these, one after the other: replays first, then what is eager."""
    left = iter(seconds)
    return lambda: lambda: next(left)


def test_a_replay_that_is_slower_than_no_replay_is_refused(make: Make) -> None:
    pair, capturer = make(), RecordingCapturer()
    stopwatch = watch(2.0, 1.2, 1.0, 3.0, 1.05, 9.0, 2.0, 1.0)
    graphs = StepGraphs(pair.model, capturer, most=4, stopwatch=stopwatch)
    talking = talk(pair, 40, 7)
    go_on(talking, graphs, 6, [0])
    go_on(talking, graphs, 6, [0, 1])
    assert list(graphs.captured) == [Bucket(2, 8)]
    assert list(graphs.refused) == [Bucket(1, 8)]
    why = graphs.refused[Bucket(1, 8)]
    assert why.what == "a replayed step is slower than one kernel by kernel"
    assert (why.expected, why.got) == ("at most 1.1 times 1000.000 ms", "1200.000 ms")
    assert graphs.replayed == 6 - 3
    go_on(talking, graphs, 3, [0])
    assert len(capturer.made) == 2  # and it is not captured again
    talking.check()


def test_what_was_rebuilt_and_is_slow_is_not_captured_instead(make: Make) -> None:
    pair = make()
    graphs, here, captured = rebuilt(pair, watch(2.0, 2.0, 1.0, 1.0))
    talking = talk(pair, 40)
    go_on(talking, graphs, 6)
    while graphs.while_idle():
        pass
    assert (here.made, graphs.replayed) == ([], 0)
    assert list(graphs.refused) == [Bucket(1, 8)]
    assert [made.closed for made in captured.made].count(True) == 1
    talking.check()


def test_whoever_watches_hears_what_is_tried_and_when_it_is_over(make: Make) -> None:
    pair, told = make(), list[str]()
    graphs, *_ = rebuilt(pair)
    graphs.tell_trials(told.append)
    talking = talk(pair, 5)
    go_on(talking, graphs, 1)
    assert told == ["captured", ""]  # of padding
    with pytest.raises(RequestError):
        graphs.forward([Chunk([7], 32, 32, [5])])
    go_on(talking, graphs, 2)
    assert told[2:] == ["rebuilt", ""] * 2
    own = StepGraphs(pair.model, RecordingCapturer(), most=4)
    told.clear()
    own.tell_trials(told.append)
    go_on(talking, own, 2)
    own_replay = own.captured[Bucket(1, 8)]
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700

    def lose() -> None:
        raise error

    assert isinstance(own_replay, Recording)
    own_replay.replayed = lose
    with pytest.raises(DeviceLost):
        go_on(talking, own, 1)
    assert told == ["captured", "", "captured"]


# -- what was captured elsewhere -------------------------------------------------------------------


class Elsewhere(RecordingCapturer):
    """Gives the same places as another one has, as if both lay at the same addresses."""

    scratch = (0, 1 << 20)

    def __init__(self, other: RecordingCapturer) -> None:
        super().__init__()
        self._places = list(other.placed)
        self.reached = 0

    def place(self, nbytes: int) -> Tensor:
        place = self._places.pop(0)
        assert len(place) == nbytes
        self.placed.append(place)
        return place

    def reach(self, nbytes: int) -> None:
        self.reached = max(self.reached, nbytes)


def rebuilt(
    pair: Pair, stopwatch: Stopwatch | None = None
) -> tuple[StepGraphs, Elsewhere, RecordingCapturer]:
    """Steps that one has captured, in the hands of another over the same memory."""
    captured = RecordingCapturer()
    first = StepGraphs(pair.model, captured, most=4)
    first.capture_all()
    here = Elsewhere(captured)
    graphs = StepGraphs(pair.model, here, most=4, stopwatch=stopwatch)
    for bucket, graph in first.captured.items():
        graphs.install(bucket, graph, 1 << 20)
    return graphs, here, captured


def test_what_was_rebuilt_is_tried_and_then_replayed(make: Make) -> None:
    pair = make()
    graphs, here, _ = rebuilt(pair)
    assert here.reached == 1 << 20
    talking = talk(pair, 250, 7)
    for rows in ([0], [0, 1]):
        go_on(talking, graphs, 12, rows)
    assert graphs.replayed > 15
    assert not graphs.while_idle()  # there is nothing left to capture
    assert (here.made, graphs.captured, graphs.refused) == ([], {}, {})
    talking.check()


@pytest.mark.parametrize("break_it", [break_numbers, break_kv, break_logits])
def test_what_was_rebuilt_wrong_is_captured_again(
    make: Make, break_it: Callable[[Recording], None]
) -> None:
    pair = make()
    graphs, here, captured = rebuilt(pair)
    for recording in captured.made:
        break_it(recording)
    talking = talk(pair, 40)
    go_on(talking, graphs, 8)
    assert len(here.made) == 1
    assert list(graphs.captured) == [Bucket(1, 8)]
    assert "computes something else" in str(graphs.refused[Bucket(1, 8)])
    assert graphs.replayed == 8 - 1 - 1 - 2 - 1
    talking.check()


def test_what_was_rebuilt_and_fails_is_captured_again(make: Make) -> None:
    pair = make()
    graphs, _, captured = rebuilt(pair)
    error = torch.AcceleratorError("CUDA error: invalid argument")
    error.error_code = 1
    for recording in captured.made:

        def fail() -> None:
            raise error

        recording.replayed = fail
    talking = talk(pair, 40)
    go_on(talking, graphs, 8)
    assert list(graphs.captured) == [Bucket(1, 8)]
    assert "CUDA_ERROR_INVALID_VALUE" in str(graphs.refused[Bucket(1, 8)])
    talking.check()
