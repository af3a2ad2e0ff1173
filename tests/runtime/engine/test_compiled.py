"""Decode steps by compiled code: the same tokens, and the model itself where it is of no use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.compiled import CompiledSteps
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from tests.runtime.engine.traced_runners import calls, traced_code

MakePair = Callable[..., Any]
KINDS = {
    "plain": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "own heads": ("llama", {"num_key_value_heads": 4}),
    "qkv biases": ("qwen2", {}),
    "qk norms": ("qwen3", {"attention_bias": True}),
    "windows": ("mistral", {"sliding_window": 20}),
    "some windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


def refused(why: str) -> None:
    raise AssertionError(why)


def prefill(both: Any, prompts: list[list[int]]) -> None:
    """The prompts' keys and values, but for their last tokens'."""
    chunks = [both.chunk(p[:-1], row, 0, len(p)) for row, p in enumerate(prompts)]
    both.model.forward(both.model.batch(chunks))


def last_tokens(both: Any, prompts: list[list[int]]) -> list[Any]:
    return [both.chunk(p, row, len(p) - 1) for row, p in enumerate(prompts)]


def greedy(both: Any, steps: CompiledSteps, prompts: list[list[int]], count: int) -> Any:
    prefill(both, prompts)
    texts = [list(p) for p in prompts]
    for _ in range(count):
        chunks = [
            both.chunk(text, row, len(text) - 1, len(prompt))
            for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
        ]
        for text, token in zip(texts, steps.forward(chunks).argmax(-1), strict=True):
            text.append(int(token))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(
    pair: MakePair, prompts: dict[int, list[int]], kind: str
) -> None:
    family, changes = KINDS[kind]
    both = pair(family, **changes)
    code = traced_code(both.spec)
    steps = CompiledSteps(both.model, code, refused)
    # Of several lengths, so that blocks begin and are full in mid-way; three are padded to four.
    asked = [prompts[33], prompts[7], prompts[64]]
    answers = greedy(both, steps, asked, 8)
    assert answers == [both.reference_greedy(prompt, 8) for prompt in asked]
    assert calls(code) == {1: 0, 2: 0, 4: 8}
    assert greedy(both, steps, asked[:1], 8) == answers[:1]
    assert calls(code) == {1: 8, 2: 0, 4: 8}


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_logits_are_near_the_models_own(
    pair: MakePair, prompts: dict[int, list[int]], dtype: torch.dtype, near: float
) -> None:
    both = pair("qwen3", dtype)
    asked = [prompts[33], prompts[300]]
    prefill(both, asked)
    steps = CompiledSteps(both.model, traced_code(both.spec), refused)
    got = steps.forward(last_tokens(both, asked)).log_softmax(-1)
    eager = both.model.forward(both.model.batch(last_tokens(both, asked))).log_softmax(-1)
    assert torch.allclose(got, eager, atol=near, rtol=0)


def test_other_steps_are_the_models(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    both = pair("llama")
    code = traced_code(both.spec, (1, 2))
    steps = CompiledSteps(both.model, code, refused)
    asked = [prompts[33], prompts[7], prompts[64]]
    prefill(both, asked)
    last = last_tokens(both, asked)
    for chunks in (
        last,  # more than any code is for
        [both.chunk(prompts[7], 3), last[0]],  # a prompt beside a token
        [both.chunk(prompts[1], 3)],  # a first token, which sees no other
    ):
        wanted = both.model.forward(both.model.batch(chunks))
        assert torch.equal(steps.forward(chunks), wanted)
    assert calls(code) == {1: 0, 2: 0}


def test_beyond_what_was_measured_steps_are_the_models(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama")
    code = traced_code(both.spec, (1,))
    code = replace(code, sizes=tuple(replace(size, keys=33) for size in code.sizes))
    steps = CompiledSteps(both.model, code, refused)
    prefill(both, [prompts[33]])
    text = [*prompts[33], 5]
    chunks = [both.chunk(text, 0, at, at) for at in (32, 33)]
    chunks[0] = both.chunk(text[:33], 0, 32, 33)
    for chunk in chunks:
        eager = both.model.forward(both.model.batch([chunk]))
        assert torch.allclose(steps.forward([chunk]), eager, atol=1e-4)
    assert calls(code) == {1: 1}
    assert steps.in_use


@pytest.mark.parametrize("fails_at", [1, 2])
def test_code_that_fails_is_given_up(
    pair: MakePair, prompts: dict[int, list[int]], fails_at: int
) -> None:
    both = pair("llama")
    asked = [prompts[64], prompts[33]]  # one of them is about to begin a block
    prefill(both, asked)
    chunks = last_tokens(both, asked)
    wanted = both.model.forward(both.model.batch(chunks))
    why: list[str] = []
    code = traced_code(both.spec, fails_at=fails_at)
    steps = CompiledSteps(both.model, code, why.append)
    for _ in range(2):
        assert torch.equal(steps.forward(chunks), wanted)
    assert why == ["the code has failed"]
    assert not steps.in_use
    assert calls(code) == {1: 0, 2: 0, 4: 0}


def test_the_weights_may_lie_elsewhere(pair: MakePair, prompts: dict[int, list[int]]) -> None:
    both = pair("llama")
    code = traced_code(both.spec)
    model = Model(both.spec, both.weights, both.kv)
    steps = CompiledSteps(model, code, refused)
    prefill(both, [prompts[33]])
    chunks = last_tokens(both, [prompts[33]])
    before = steps.forward(chunks)
    # Aligned to nothing but their own size, and what was there before is of no use any more.
    odd = {
        name: torch.frombuffer(
            bytearray(b"\0" * 4 + tensor.detach().numpy().tobytes()), dtype=tensor.dtype, offset=4
        ).view(tensor.shape)
        for name, tensor in both.weights.items()
    }
    model.rebind(odd)
    assert torch.equal(steps.forward(chunks), before)
    model.rebind({name: torch.zeros_like(tensor) for name, tensor in odd.items()})
    assert not torch.equal(steps.forward(chunks), before)
    assert calls(code)[1] == 3


def test_what_does_not_fit_is_refused(pair: MakePair) -> None:
    both = pair("llama")
    code = traced_code(both.spec)

    def why(model: Model) -> list[str]:
        said: list[str] = []
        assert not CompiledSteps(model, code, said.append).in_use
        return said

    wider = pair("llama", intermediate_size=128)
    assert why(wider.model) == ["compiled for intermediate_size 96, here it is 128"]
    torch.set_num_threads(2)
    assert why(both.model) == ["compiled for threads 1, here it is 2"]
    torch.set_num_threads(1)
    half = KVCache(both.kv.pages.view(torch.uint8).view(-1), both.spec, torch.float16, 4)
    assert why(Model(both.spec, both.weights, half)) == [
        "compiled for keys in F32, here they are torch.float16"
    ]
    varlen = Model(both.spec, both.weights, both.kv)
    varlen.varlen = object()  # type: ignore[assignment]
    (said,) = why(varlen)
    assert "attention" in said


def test_weights_of_another_dtype_are_refused_when_they_are_seen(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama")
    why: list[str] = []
    steps = CompiledSteps(both.model, traced_code(both.spec, vectors="BF16"), why.append)
    prefill(both, [prompts[33]])
    chunks = last_tokens(both, [prompts[33]])
    wanted = both.model.forward(both.model.batch(chunks))
    assert torch.equal(steps.forward(chunks), wanted)
    assert why == ["compiled for weights in torch.bfloat16, here one is torch.float32"]


def test_norms_of_another_dtype_than_matrices(
    pair: MakePair, prompts: dict[int, list[int]]
) -> None:
    both = pair("llama", torch.bfloat16)
    mixed = {n: t.float() if t.dim() == 1 else t for n, t in both.weights.items()}
    model = Model(both.spec, mixed, both.kv)
    prefill(both, [prompts[33]])
    chunks = last_tokens(both, [prompts[33]])
    steps = CompiledSteps(model, traced_code(both.spec, vectors="F32"), refused)
    got = steps.forward(chunks).log_softmax(-1)
    assert torch.allclose(got, model.forward(model.batch(chunks)).log_softmax(-1), atol=0.1, rtol=0)


def test_a_shape_says_what_differs() -> None:
    shape = CodeShape("BF16", "BF16", 8, 16, 2, 1, 4, 32, 1e-5, False, False, False, False, 2)
    assert CodeShape.from_json(shape.to_json()) == shape
    assert shape.difference(shape) is None
    other = CodeShape.from_json({**shape.to_json(), "qk_norm": True})
    assert shape.difference(other) == "compiled for qk_norm False, here it is True"
    with pytest.raises(TypeError):
        CodeShape.from_json({"dtype": "BF16"})
