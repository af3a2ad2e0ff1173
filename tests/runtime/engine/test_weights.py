"""Which weights run as one, told from where they lie; and the same weights moved in mid-way."""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sequence import Sequence
from tests.runtime.engine.arrangements import ARRANGEMENTS, arrange

MakePair = Callable[..., Any]
Prompts = dict[int, list[int]]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, one kv head": ("mistral", {"num_key_value_heads": 1}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_together_runs_as_one(pair: MakePair, shape: str) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    # Safetensors sorts by name: o between k and q, but gate directly before up. Their biases lie
    # with them only in a file where no other name comes between, which there is not.
    in_file = {"qkv": False, "gate_up": "mlp_bias" not in changes}
    fused = {
        "apart": {"qkv": False, "gate_up": False},
        "file": in_file,
        "aligned": {"qkv": True, "gate_up": True},
    }[both.arrangement]
    for index, layer in enumerate(both.model.weights.layers):
        for group, names in {
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            maps = getattr(layer, group)
            parts = [both.weights[f"model.layers.{index}.{name}.weight"] for name in names]
            assert (maps.weight is not None) == fused[group]
            if maps.weight is not None:
                assert maps.weight.data_ptr() == parts[0].data_ptr()
                assert maps.weight.shape == (sum(map(len, parts)), both.spec.hidden_size)
            first_bias = both.weights.get(f"model.layers.{index}.{names[0]}.bias")
            if maps.bias is not None:
                assert first_bias is not None
                assert maps.bias.data_ptr() == first_bias.data_ptr()
            else:
                assert first_bias is None or not fused[group]


def test_padding_between_keeps_them_apart(pair: MakePair, prompts: Prompts) -> None:
    """The aligned layout but for one value more before v: q, k and v run apart, and right."""
    both = pair("llama")
    prefix = "model.layers.0.self_attn."
    names = [f"{prefix}{role}_proj.weight" for role in "qkv"]
    parts = [both.weights[name] for name in names]
    memory = torch.zeros(sum(part.numel() for part in parts) + 1)
    moved, at = dict(both.weights), 0
    for name, part in zip(names, parts, strict=True):
        at += name == names[2]
        moved[name] = memory[at : at + part.numel()].view(part.shape).copy_(part)
        at += part.numel()
    model = Model(both.spec, moved, both.kv)
    assert model.weights.layers[0].qkv.weight is None
    batch = model.batch([both.chunk(prompts[33])])
    torch.testing.assert_close(
        model.forward(batch), both.reference_logits(prompts[33])[-1:], rtol=0.0, atol=1e-4
    )


class Silent:
    """A text stream for requests whose text nobody reads."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> tuple[str, bool]:
        return "", False


@pytest.mark.parametrize("to", ARRANGEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_move_in_the_middle_of_sequences(
    pair: MakePair, prompts: Prompts, shape: str, to: str
) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    old = both.arrange(both.weights)
    model = Model(both.spec, old, both.kv)
    decoder = Decoder(model)
    answers: dict[str, list[int]] = defaultdict(list)

    def admit(row: int, length: int) -> None:
        sequence = Sequence(
            f"r{row}", 0, tuple(prompts[length]), (), SamplingParams(max_tokens=10), Silent(), ()
        )
        sequence.blocks = both.chunk(prompts[length], row).blocks
        decoder.admit(sequence)

    def step() -> None:
        for sequence, emission in decoder.step():
            answers[sequence.request].append(emission.token)

    admit(0, 33)
    step()
    admit(1, 300)
    for _ in range(4):
        step()
    model.rebind(arrange(both.weights, to))
    for tensor in old.values():
        tensor.fill_(float("nan"))
    admit(2, 7)
    while len(decoder):
        step()
    assert answers == {
        f"r{row}": both.reference_greedy(prompts[length], 10)
        for row, length in enumerate((33, 300, 7))
    }


@pytest.mark.parametrize("to", ARRANGEMENTS)
@pytest.mark.parametrize("layers_done", [0, 1, 2])
def test_weights_move_in_the_middle_of_a_prefill(
    pair: MakePair, prompts: Prompts, layers_done: int, to: str
) -> None:
    both = pair("qwen2")
    old = both.arrange(both.weights)
    model = Model(both.spec, old, both.kv)
    batch = model.batch([both.chunk(prompts[64]), both.chunk(prompts[7], 1)])
    x = model.embed(batch)
    for index in range(layers_done):
        x = model.layer(index, x, batch)
    model.rebind(arrange(both.weights, to))
    for tensor in old.values():
        tensor.fill_(float("nan"))
    for index in range(layers_done, both.spec.layers):
        x = model.layer(index, x, batch)
    expected = torch.stack([both.reference_logits(prompts[n])[-1] for n in (64, 7)])
    torch.testing.assert_close(model.logits(x, batch), expected, rtol=0.0, atol=1e-4)


def test_nothing_looks_into_the_old_memory_after_the_move(pair: MakePair, prompts: Prompts) -> None:
    """It can be unmapped then; torch itself would keep nobody from doing it too early."""
    both = pair("qwen3", tie_word_embeddings=True)
    arenas: list[weakref.ref[mmap.mmap]] = []

    def allocate(nbytes: int) -> torch.Tensor:
        arena = mmap.mmap(-1, nbytes)
        arenas.append(weakref.ref(arena))
        return torch.frombuffer(arena, dtype=torch.uint8)

    model = Model(both.spec, arrange(both.weights, "aligned", allocate), both.kv)
    batch = model.batch([both.chunk(prompts[33])])
    before = model.forward(batch)
    assert arenas[0]() is not None
    model.rebind(both.weights)
    assert arenas[0]() is None
    torch.testing.assert_close(model.forward(batch), before)


def test_what_was_begun_with_them_is_done_before_they_may_go(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("llama")
    model = Model(both.spec, both.weights, both.kv)
    old, waited = model.weights, list[bool]()
    monkeypatch.setattr(model, "settle", lambda: waited.append(model.weights is not old))
    model.rebind(both.weights)
    assert waited == [True]
