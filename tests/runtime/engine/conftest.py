"""Small random models of Transformers, and ours over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Batch, Chunk, Model
from coldframe.runtime.engine.spec import ModelSpec
from tests.runtime.engine.arrangements import ARRANGEMENTS, arrange

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BLOCK = 32


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class Pair:
    """A Transformers model and the engine's own over the same weights."""

    reference: Any
    spec: ModelSpec
    arrangement: str
    weights: dict[str, Tensor]
    model: Model
    kv: KVCache

    def arrange(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors in fresh memory, laid out as this model's are."""
        return arrange(weights, self.arrangement)

    def chunk(
        self, ids: Sequence[int], row: int = 0, start: int = 0, prompt: int | None = None
    ) -> Chunk:
        """Tokens `ids[start:]` of a request that has the row-th 12 blocks, in a shuffled order."""
        blocks = [(row * 12 + (5 * i) % 12) for i in range(12)]
        return Chunk(ids[start:], start, len(ids) if prompt is None else prompt, blocks)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Our logits of every position of one prompt, `[T, vocab]`."""
        batch = self.model.batch([self.chunk(ids)])
        return self.model.logits(self.through(batch), batch, all_positions=True)

    def through(self, batch: Batch) -> Tensor:
        """The hidden states behind the last layer."""
        x = self.model.embed(batch)
        for index in range(self.spec.layers):
            x = self.model.layer(index, x, batch)
        return x

    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """Our greedy answers, all prompts in one ragged batch, then decoded together."""
        answers: list[list[int]] = [[] for _ in prompts]
        batch = self.model.batch([self.chunk(p, row) for row, p in enumerate(prompts)])
        while True:
            for answer, token in zip(answers, self.model.forward(batch).argmax(-1), strict=True):
                answer.append(int(token))
            if len(answers[0]) == steps:
                return answers
            batch = self.model.batch(
                [
                    self.chunk([*p, *a], row, len(p) + len(a) - 1, len(p))
                    for row, (p, a) in enumerate(zip(prompts, answers, strict=True))
                ]
            )

    def _forget(self) -> None:
        """Transformers' dynamic RoPE remembers the longest sequence it has seen; ours does not."""
        rope = self.reference.model.rotary_emb
        rope.max_seq_len_cached = rope.original_max_seq_len
        rope.inv_freq = rope.original_inv_freq

    @torch.inference_mode()
    def reference_logits(self, ids: Sequence[int]) -> Tensor:
        """Transformers' logits of every position of one prompt, `[T, vocab]`."""
        self._forget()
        logits: Tensor = self.reference(torch.tensor([ids])).logits[0].float()
        return logits

    @torch.inference_mode()
    def reference_greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """Transformers' greedy answer: prefill at once, then token by token from its cache."""
        self._forget()
        answer: list[int] = []
        out = self.reference(torch.tensor([prompt]), use_cache=True)
        while True:
            answer.append(int(out.logits[0, -1].argmax()))
            if len(answer) == steps:
                return answer
            out = self.reference(
                torch.tensor([answer[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )


def small_config(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of two layers in the family's usual spelling."""
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24 if family == "qwen3" else 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mistral":
        config["sliding_window"] = None
    return config | changes


def make_reference(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A Transformers model with random weights; norms and biases are random too."""
    kind = config["model_type"]
    keys = {key: value for key, value in config.items() if key != "model_type"}
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **keys), attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return reference.to(dtype)


def make_pair(reference: Any, config: dict[str, Any], dtype: torch.dtype, arrangement: str) -> Pair:
    """The reference and our model over the same weights."""
    weights = arrange(dict(reference.named_parameters()), arrangement)
    headers = {n: Header(tuple(t.shape), NAMES[t.dtype]) for n, t in weights.items()}
    spec = ModelSpec.from_config(config, headers)
    blocks = 96
    # Whatever a former owner left behind must not matter.
    memory = torch.full((blocks * spec.kv_block_bytes(dtype.itemsize),), 0xFF, dtype=torch.uint8)
    kv = KVCache(memory, spec, dtype, blocks)
    return Pair(reference, spec, arrangement, weights, Model(spec, weights, kv), kv)


@pytest.fixture(scope="session", params=ARRANGEMENTS)
def arrangement(request: pytest.FixtureRequest) -> str:
    """How weights lie in memory: all that compare with Transformers do so for each way."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def references() -> dict[str, Any]:
    """The Transformers models made so far."""
    return {}


@pytest.fixture(scope="session")
def pair(arrangement: str, references: dict[str, Any]) -> Callable[..., Pair]:
    """Makes a pair, one for each (family, changes) asked for."""
    made: dict[str, Pair] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Pair:
        key = repr((family, dtype, sorted(changes.items())))
        config = small_config(family, **changes)
        if key not in references:
            references[key] = make_reference(config, dtype)
        if key not in made:
            made[key] = make_pair(references[key], config, dtype, arrangement)
        return made[key]

    return make


@pytest.fixture(scope="session")
def config() -> Callable[..., dict[str, Any]]:
    """Makes a small config."""
    return small_config


@pytest.fixture(scope="session")
def prompts() -> dict[int, list[int]]:
    """Random prompts by their length."""
    generator = torch.Generator().manual_seed(11)
    return {
        n: torch.randint(3, 256, (n,), generator=generator).tolist() for n in (1, 7, 33, 64, 300)
    }
