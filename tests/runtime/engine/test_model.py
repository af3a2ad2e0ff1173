"""The model against Transformers: the same weights, tokens equal, float32 logits within 1e-4."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from coldframe.loader.errors import ArenaError, RequestError
from coldframe.runtime.engine import attention
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Batch, Chunk, Model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 48,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}
EXACT = {"rtol": 0.0, "atol": 1e-4}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_one_request_is_what_transformers_answers(pair, prompts, family, rope) -> None:
    both = pair(family, **ROPES[rope])
    for length in (1, 7, 64, 300):
        ids = prompts[length]
        torch.testing.assert_close(both.prefill(ids), both.reference_logits(ids), **EXACT)
        assert both.greedy([ids], 8) == [both.reference_greedy(ids, 8)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_mixed_lengths_are_what_each_would_get_alone(pair, prompts, family, rope) -> None:
    both = pair(family, **ROPES[rope])
    mixed = [prompts[length] for length in (7, 300, 1, 64)]
    assert both.greedy(mixed, 8) == [both.reference_greedy(ids, 8) for ids in mixed]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_of_float32_as_a_gpu_attends(pair, prompts, family, monkeypatch) -> None:
    """Where no kernel takes heads that share keys, they stand in for a batch."""
    monkeypatch.setattr(attention, "_takes_groups", lambda q: False)
    both = pair(family)
    for length in (7, 64, 300):
        ids = prompts[length]
        torch.testing.assert_close(both.prefill(ids), both.reference_logits(ids), **EXACT)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "own head_dim": ("mistral", {"head_dim": 40}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "no grouping": ("qwen2", {"num_key_value_heads": 4}),
    "window": ("mistral", {"sliding_window": 20}),
    "window of whole blocks": ("mistral", {"sliding_window": 64}),
    "upper layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "named layers slide": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "window with dynamic RoPE": ("mistral", {"sliding_window": 20, **ROPES["dynamic"]}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_models(pair, prompts, shape) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    for length in (7, 300):
        ids = prompts[length]
        torch.testing.assert_close(both.prefill(ids), both.reference_logits(ids), **EXACT)
    mixed = [prompts[length] for length in (64, 1, 300, 33)]
    expected = [both.reference_greedy(ids, 8) for ids in mixed]
    assert both.greedy(mixed, 8) == expected
    assert [both.greedy([ids], 8)[0] for ids in mixed] == expected


@pytest.mark.parametrize("shape", ["window", "upper layers slide", "window with dynamic RoPE"])
@pytest.mark.parametrize("cuts", [(0, 1, 64, 300), (0, 100, 131, 132, 300), (0, 299, 300)])
def test_a_prompt_in_chunks_is_the_prompt_at_once(pair, prompts, shape, cuts) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    ids = prompts[300]
    parts = []
    for start, end in pairwise(cuts):
        batch = both.model.batch([both.chunk(ids[:end], start=start, prompt=300)])
        parts.append(both.model.logits(both.through(batch), batch, all_positions=True))
    torch.testing.assert_close(torch.cat(parts), both.reference_logits(ids), **EXACT)


def test_prefill_and_decode_in_one_batch(pair, prompts) -> None:
    both = pair("llama")
    old, late, new = prompts[33], prompts[300], prompts[7]
    first = both.reference_greedy(old, 3)
    both.model.forward(both.model.batch([both.chunk(old, 0)]))
    both.model.forward(both.model.batch([both.chunk(late[:100], 1, prompt=300)]))
    mixed = both.model.batch(
        [
            both.chunk([*old, first[0]], 0, 33, 33),
            both.chunk(late, 1, 100),
            both.chunk(new, 2),
            both.chunk(prompts[1], 3),
        ]
    )
    whole = [[*old, first[0]], late, new, prompts[1]]
    expected = torch.stack([both.reference_logits(ids)[-1] for ids in whole])
    torch.testing.assert_close(both.model.forward(mixed), expected, **EXACT)


@pytest.mark.parametrize("rope", ["default", "dynamic"])
@pytest.mark.parametrize("layers_ahead", [0, 1, 2])
def test_a_late_group_catches_up_and_joins(pair, prompts, rope, layers_ahead) -> None:
    both = pair("qwen2", **ROPES[rope])
    early = both.model.batch([both.chunk(prompts[64], 0), both.chunk(prompts[7], 1)])
    late = both.model.batch([both.chunk(prompts[1], 2), both.chunk(prompts[33], 3)])
    states = []
    for group in (early, late):
        x = both.model.embed(group)
        for index in range(layers_ahead):
            x = both.model.layer(index, x, group)
        states.append(x)
    joined, x = both.model.batch([*early.chunks, *late.chunks]), torch.cat(states)
    for index in range(layers_ahead, both.spec.layers):
        x = both.model.layer(index, x, joined)
    expected = [both.reference_logits(prompts[n])[-1] for n in (64, 7, 1, 33)]
    torch.testing.assert_close(both.model.logits(x, joined), torch.stack(expected), **EXACT)


def test_nothing_reads_a_weight_before_its_stage_is_in(pair, prompts) -> None:
    """The weights land one stage after another, each just before the method that needs it."""
    both = pair("qwen3", tie_word_embeddings=True)
    arena = both.arrange(both.weights)
    for tensor in arena.values():
        tensor.fill_(float("nan"))
    model = Model(both.spec, arena, both.kv)

    def land(prefix: str) -> None:
        for name, weight in both.weights.items():
            if name.startswith(prefix):
                arena[name].copy_(weight)

    batch = both.model.batch([both.chunk(prompts[33])])
    land("model.embed_tokens.")
    x = model.embed(batch)
    for index in range(both.spec.layers):
        land(f"model.layers.{index}.")
        x = model.layer(index, x, batch)
    land("model.norm.")
    expected = both.reference_logits(prompts[33])[-1:]
    torch.testing.assert_close(model.logits(x, batch), expected, **EXACT)


def test_weights_are_used_where_they_lie(pair, prompts) -> None:
    """A weight that changes in the arena changes the answer: no copy is kept."""
    both = pair("llama", num_hidden_layers=1)
    arena = both.arrange(both.weights)
    model = Model(both.spec, arena, both.kv)
    batch = both.model.batch([both.chunk(prompts[7])])
    before = model.forward(batch)
    for name, tensor in arena.items():
        kept = tensor.clone()
        tensor.mul_(1.5)
        assert not torch.equal(model.forward(batch), before), name
        tensor.copy_(kept)
    assert torch.equal(model.forward(batch), before)


@pytest.mark.parametrize("window", [None, 20])
def test_what_others_left_in_memory_is_never_seen(pair, prompts, window) -> None:
    both = pair("mistral", sliding_window=window)
    mixed = [prompts[length] for length in (1, 300, 33)]
    clean = both.greedy(mixed, 8)
    both.kv.pages.fill_(float("nan"))
    assert both.greedy(mixed, 8) == clean
    both.kv.pages.fill_(float("inf"))
    assert both.greedy(mixed, 8) == clean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_as_close_as_transformers_does(pair, prompts, family, dtype) -> None:
    """Both round differently; neither may drift further from float32 than the other by much."""
    both, exact = pair(family, dtype), pair(family)
    ids = prompts[64]
    truth = exact.reference_logits(ids).log_softmax(-1)
    ours = (both.prefill(ids).log_softmax(-1) - truth).abs().mean()
    theirs = (both.reference_logits(ids).log_softmax(-1) - truth).abs().mean()
    assert ours <= 1.5 * theirs
    alone = both.prefill(ids)[-1].log_softmax(-1)
    both.greedy([prompts[300], ids[:-1], prompts[7]], 2)
    step = both.model.batch(
        [both.chunk([*ids[:-1], ids[-1]], 1, 63, 63), both.chunk(prompts[1], 2)]
    )
    together = both.model.forward(step)[0].log_softmax(-1)
    assert (together - alone).abs().mean() <= 2 * theirs


def test_vectors_of_another_dtype_are_cast(pair, prompts) -> None:
    both = pair("qwen2", torch.bfloat16)
    wide = {n: t.float() if t.dim() == 1 else t for n, t in both.weights.items()}
    batch = both.model.batch([both.chunk(prompts[7])])
    expected = both.model.forward(batch)
    assert torch.equal(Model(both.spec, both.arrange(wide), both.kv).forward(batch), expected)


def test_last_tokens_are_among_all_positions(pair, prompts) -> None:
    both = pair("llama")
    batch = both.model.batch([both.chunk(prompts[7], 0), both.chunk(prompts[33], 1)])
    x = both.through(batch)
    every = both.model.logits(x, batch, all_positions=True)
    assert every.shape == (40, 256)
    assert every.dtype == torch.float32
    torch.testing.assert_close(both.model.logits(x, batch), every[[6, 39]])


def test_the_kv_layout_is_the_contract(pair, prompts) -> None:
    """[block][layer][2][token][kv_head][head_dim], computed by Transformers' own cache."""
    both = pair("llama")
    ids = prompts[64]
    both.model.forward(both.model.batch([both.chunk(ids)]))
    with torch.inference_mode():
        cache = both.reference(torch.tensor([ids]), use_cache=True).past_key_values
    blocks = both.chunk(ids).blocks
    for layer in range(both.spec.layers):
        for block in range(2):
            page = both.kv.pages[blocks[block], layer]
            span = slice(32 * block, 32 * block + 32)
            keys = cache.layers[layer].keys[0, :, span].transpose(0, 1)
            values = cache.layers[layer].values[0, :, span].transpose(0, 1)
            torch.testing.assert_close(page[0], keys, **EXACT)
            torch.testing.assert_close(page[1], values, **EXACT)


def test_write_and_gather_by_slots(pair) -> None:
    both = pair("llama")
    spec = both.spec
    memory = torch.zeros(10 * spec.kv_block_bytes(4) + 100, dtype=torch.uint8)
    kv = KVCache(memory, spec, torch.float32, 10)
    k, v = torch.randn(2, 40, spec.kv_heads, spec.head_dim)
    slots = torch.tensor([7 * 32 + i for i in range(32)] + [3 * 32 + i for i in range(8)])
    kv.write(1, k, v, slots)
    keys, values = kv.gather(1, torch.tensor([[7, 3]]))
    torch.testing.assert_close(keys[0, :, :40].transpose(0, 1), k)
    torch.testing.assert_close(values[0, :, :40].transpose(0, 1), v)
    assert not keys[0, :, 40:].any()
    assert not kv.gather(0, torch.tensor([list(range(10))]))[0].any()
    kv.clear([7])
    assert not kv.gather(1, torch.tensor([[7]]))[0].any()
    torch.testing.assert_close(
        kv.gather(1, torch.tensor([[3]]))[1][0, :, :8].transpose(0, 1), v[32:]
    )


def test_memory_that_is_too_small_is_refused(pair) -> None:
    spec = pair("llama").spec
    memory = torch.zeros(2 * spec.kv_block_bytes(4) - 1, dtype=torch.uint8)
    with pytest.raises(ArenaError, match="too small"):
        KVCache(memory, spec, torch.float32, 2)


@pytest.mark.parametrize("chunk", [Chunk([], 0, 1, [0]), Chunk([5, 6], 31, 33, [0])])
def test_tokens_without_room_are_refused(chunk) -> None:
    with pytest.raises(RequestError, match="KV blocks"):
        Batch.build([chunk])
