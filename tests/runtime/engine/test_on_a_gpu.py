"""The engine where all its memory is a GPU's, a fake one: no mixed devices, no wait unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.functional import scaled_dot_product_attention

from coldframe.runtime.engine import attention, sampling, trial
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.device import fetch
from coldframe.runtime.engine.graphs import StepGraphs
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Chunk, Model
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.sampling import SampleInput, sample
from coldframe.runtime.engine.saturation import SIZES, SaturationProbe
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.varlen import WAYS, Varlen, Way
from coldframe.runtime.worker import warmup
from tests.runtime.engine.conftest import small_config
from tests.runtime.engine.fake_gpu import GPU, Traffic, fake_gpu, real_zeros
from tests.runtime.engine.test_prefill import Silent

BLOCKS = 64
OPERATOR = torch.ops.aten._flash_attention_forward.default
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "biases, norms, a tied head and layers that slide": (
        "qwen3",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "dynamic RoPE and a window": (
        "mistral",
        {"sliding_window": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
}
BATCHES: dict[str, list[tuple[int, int]]] = {
    "a fresh prompt": [(0, 70)],
    "a fresh prompt that fits its window": [(0, 15)],
    "fresh prompts": [(0, 70), (0, 33), (0, 5)],
    "a chunk behind others": [(40, 50)],
    "one token": [(40, 1)],
    "tokens of several": [(40, 1), (0, 1), (99, 1)],
    "everything": [(0, 70), (40, 1), (33, 20), (64, 1), (0, 1)],
}


@pytest.fixture(params=MODELS)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    """Models that differ in what their steps do."""
    family, changes = MODELS[request.param]
    return ModelSpec.from_config(small_config(family, **changes))


@pytest.fixture
def sliding() -> ModelSpec:
    """A model some of whose layers have a window."""
    family, changes = MODELS["biases, norms, a tied head and layers that slide"]
    return ModelSpec.from_config(small_config(family, **changes))


@pytest.fixture
def plain() -> ModelSpec:
    """A model without anything special."""
    return ModelSpec.from_config(small_config("llama"))


def weights(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """As in the layout `aligned`: what can be joined lies directly behind one another."""
    shapes = spec.expected_tensors()
    memory = torch.empty(sum(map(prod, shapes.values())), dtype=dtype, device=GPU)
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = memory[at : at + prod(shape)].view(shape)
        at += prod(shape)
    return tensors


@contextmanager
def on_gpu(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[Model, Traffic]]:
    with fake_gpu() as traffic:
        nbytes = BLOCKS * spec.kv_block_bytes(dtype.itemsize)
        cache = KVCache(torch.empty(nbytes, dtype=torch.uint8, device=GPU), spec, dtype, BLOCKS)
        model = Model(spec, weights(spec, dtype), cache)
        traffic.__init__()  # type: ignore[misc]
        yield model, traffic


def chunks(batch: list[tuple[int, int]]) -> list[Chunk]:
    return [
        Chunk([7] * count, start, start + count, list(range(row * 6, row * 6 + 6)))
        for row, (start, count) in enumerate(batch)
    ]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_goes_there_at_once_and_nothing_waits(spec: ModelSpec, batch: str) -> None:
    with on_gpu(spec) as (model, traffic):
        logits = model.forward(model.batch(chunks(BATCHES[batch])))
        assert logits.device == GPU
        assert logits.shape == (len(BATCHES[batch]), spec.vocab_size)
        assert (traffic.up, traffic.down, traffic.waits) == (1, 0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_every_dtype(plain: ModelSpec, dtype: torch.dtype) -> None:
    with on_gpu(plain, dtype) as (model, traffic):
        model.forward(model.batch(chunks(BATCHES["everything"])))
        assert (traffic.up, traffic.down, traffic.waits) == (1, 0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_kernel_is_asked_for_that_writes_all_scores_down(
    plain: ModelSpec, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Flash attention takes groups of heads; of float32 it knows nothing."""
    asked: list[dict[str, Any]] = []

    def noted(*tensors: Tensor, **options: Any) -> Tensor:
        asked.append(options)
        return scaled_dot_product_attention(*tensors, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    with on_gpu(plain, dtype) as (model, _):
        model.forward(model.batch(chunks(BATCHES["a fresh prompt"])))
    assert {options["is_causal"] for options in asked} == {True}
    groups = dtype != torch.float32
    assert {options.get("enable_gqa", False) for options in asked} == {groups}


def test_maps_of_the_same_input_are_joined(plain: ModelSpec) -> None:
    with on_gpu(plain) as (model, _):
        assert model.weights.layers[0].qkv.weight is not None


def test_mixed_devices_are_seen(plain: ModelSpec) -> None:
    """What the other tests rely on."""
    with on_gpu(plain) as (model, traffic):
        batch = model.batch(chunks(BATCHES["everything"]))
        batch.positions = torch.zeros(batch.tokens, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"device"):
            model.forward(batch)
        traffic.__init__()  # type: ignore[misc]
        torch.zeros(3, device=GPU)[[0, 1]].cpu()
        torch.tensor([1, 2], device=GPU)
        assert len(traffic.waits) == 3


# -- requests ------------------------------------------------------------------------------------


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched has values: the first of all tokens is the likeliest."""
    monkeypatch.setattr(sampling, "fetch", lambda *them: list(map(real_zeros, fetch(*them))))


def sequence(number: int, length: int, answer: int = 2) -> Sequence:
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    made = Sequence(f"r{number}", 0, (7,) * length, (), params, Silent(), ())
    made.blocks = list(range(number * 6, number * 6 + 6))
    return made


@pytest.mark.usefixtures("values")
def test_a_prefill_waits_for_its_first_tokens_alone(spec: ModelSpec) -> None:
    ready = 1
    with on_gpu(spec) as (model, traffic):
        prefiller = Prefiller(model, lambda stage: stage < ready)
        prefiller.admit(sequence(0, 70))
        prefiller.admit(sequence(1, 1))
        assert prefiller.advance() == []
        assert prefiller.advance() is None
        prefiller.admit(sequence(2, 33))  # starts behind the others, and joins them
        finished: list[Any] = []
        while not finished:
            ready += not (emitted := prefiller.advance()) and emitted is None
            finished = emitted or []
            assert (traffic.down, traffic.waits) == (len(finished) > 0, [])
        assert len(finished) == 3
        assert traffic.up == 3  # the two, the one, and all of them together


@pytest.mark.usefixtures("values")
def test_a_long_prompt_is_waited_for_at_the_end_of_each_chunk(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_gpu(spec) as (model, traffic):
        settled: list[int] = []
        monkeypatch.setattr(model, "settle", lambda: settled.append(traffic.up))
        prefiller = Prefiller(model, lambda stage: True, chunk=50)
        prefiller.admit(sequence(0, 150))
        while not prefiller.advance():
            assert traffic.down == 0
        assert (traffic.up, traffic.down, traffic.waits) == (3, 1, [])
        assert settled == [1, 2]  # the last one's end is its token


@pytest.mark.usefixtures("values")
def test_a_step_of_decode_goes_up_and_down_once(spec: ModelSpec) -> None:
    with on_gpu(spec) as (model, traffic):
        decoder = Decoder(model, beside=20)
        for number, length in enumerate((40, 64, 1, 33)):
            made = sequence(number, length)
            made.kv_tokens = length - 1
            decoder.admit(made)
        decoder.admit(behind := sequence(4, 45, answer=3))
        steps = 0
        while len(decoder):
            decoder.step()
            steps += 1
            assert (traffic.up, traffic.down, traffic.waits) == (steps, steps, [])
        assert len(behind.generated_ids) == 3


class Capturer:
    """Writes nothing down: what is asked for within a capture, and a replay, is one call each."""

    note, scratch, own_bytes = "", None, 0

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.captures = 0
        self.replays = 0
        self.handle = 1

    def place(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=GPU)

    def reach(self, nbytes: int) -> None:
        raise NotImplementedError

    def capture(self, work: Callable[[], object]) -> Capturer:
        before = (self.traffic.up, self.traffic.down, list(self.traffic.waits))
        work()
        # A graph has none of these in it.
        assert (self.traffic.up, self.traffic.down, self.traffic.waits) == before
        self.captures += 1
        return self

    def replay(self) -> None:
        self.replays += 1

    def close(self) -> None:
        """There is nothing of it."""

    def drop(self) -> None:
        """Nor of this."""


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is padded and replayed is not held against anything, which takes a wait."""
    for name in ("try_padding", "try_replay"):
        monkeypatch.setattr(trial, name, lambda steps, *_: (steps.logits(3), None))


@pytest.mark.usefixtures("values", "trusted")
@pytest.mark.parametrize("way", [None, *WAYS], ids=str)
def test_a_replayed_step_goes_up_and_down_once(sliding: ModelSpec, way: Way | None) -> None:
    with on_gpu(sliding) as (model, traffic):
        model.varlen = None if way is None else Varlen(OPERATOR, way)
        capturer = Capturer(traffic)
        steps = StepGraphs(model, capturer, most=4)
        decoder = Decoder(model, graphs=steps)
        for number, length in enumerate((40, 64, 1)):
            made = sequence(number, length, answer=9)
            made.kv_tokens = length - 1
            decoder.admit(made)
        for _ in range(3):
            decoder.step()
            steps.between_steps()
        assert (capturer.captures, capturer.replays, steps.refused) == (1, 0, {})
        for replayed in range(1, 5):
            traffic.__init__()  # type: ignore[misc]
            decoder.step()
            assert not steps.between_steps()
            assert capturer.replays == replayed
            assert (traffic.up, traffic.down, traffic.waits) == (1, 1, [])
            assert traffic.calls < 20  # views, the copy up, the choice of a token, a block cleared


@pytest.mark.usefixtures("trusted")
def test_captures_ahead_wait_for_what_they_warm_up(plain: ModelSpec) -> None:
    with on_gpu(plain) as (model, traffic):
        capturer = Capturer(traffic)
        steps = StepGraphs(model, capturer, most=2)
        assert steps.capture_all() == capturer.captures == 4
        assert (traffic.up, traffic.down) == (4, 0)  # the numbers of each
        assert all("copy" in wait for wait in traffic.waits)  # of what makes a model


@pytest.mark.usefixtures("values")
def test_a_step_without_a_token_brings_nothing_back(
    plain: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_gpu(plain) as (model, traffic):
        settled: list[int] = []
        monkeypatch.setattr(model, "settle", lambda: settled.append(traffic.up))
        decoder = Decoder(model)
        decoder.admit(sequence(0, 150))
        assert decoder.step() == []
        assert (traffic.up, traffic.down, traffic.waits) == (1, 0, [])
        assert settled == [1]


def test_rows_to_be_sampled_come_with_the_same_wait() -> None:
    asked = [
        SampleInput(SamplingParams(temperature=temperature, seed=1), (0,), (), 1)
        for temperature in (0.0, 1.0, 0.0, 1.0)
    ]
    with fake_gpu() as traffic:
        logits = torch.empty(4, 100, device=GPU)
        with pytest.raises(DataDependentOutputException):  # there are no values
            sample(logits, asked)
        assert (traffic.up, traffic.down, traffic.waits) == (0, 3, [])


# -- what is beside them -------------------------------------------------------------------------


def test_a_layers_maps_can_be_measured(plain: ModelSpec) -> None:
    with on_gpu(plain) as (model, traffic):
        probe = SaturationProbe()
        while (found := probe.advance(model.weights.layers)) is None:
            pass
        assert found.tokens in SIZES
        assert (traffic.up, traffic.down, traffic.waits) == (0, 0, [])


@pytest.mark.usefixtures("values")
def test_first_uses_are_those_of_the_device(plain: ModelSpec) -> None:
    with on_gpu(plain, torch.float32) as (model, traffic):
        pieces = list(warmup.first_uses(model, weights(plain, torch.float32)))
        assert len(pieces) >= 6
        assert traffic.down == len(pieces)
        assert all("copy" in wait for wait in traffic.waits)  # of what makes a model


def test_weights_elsewhere_are_taken_without_reading_them(plain: ModelSpec) -> None:
    with on_gpu(plain) as (model, traffic):
        model.rebind(weights(plain, torch.bfloat16))
        model.settle()
        assert (traffic.up, traffic.down, traffic.waits) == (0, 0, [])
