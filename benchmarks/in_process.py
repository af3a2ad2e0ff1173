"""The engine in the benchmark's own process: weights read here, KV of its own, no sockets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coldframe.runtime.replica.sizing import ModelFacts

if TYPE_CHECKING:
    from coldframe.runtime.engine.model import Model
    from coldframe.runtime.engine.sequence import Sequence
    from coldframe.runtime.worker.text import Tokenizer

__all__ = ["load_model", "sequence_of"]


def load_model(directory: str, blocks: int) -> Model:
    """A model with all its weights in, and KV of so many blocks."""
    import torch
    from safetensors.torch import load_file

    from coldframe.runtime.engine.kv import KVCache
    from coldframe.runtime.engine.model import Model
    from coldframe.runtime.worker.tensors import torch_dtypes

    spec = ModelFacts(directory).spec
    dtype = torch_dtypes()[spec.dtype]
    memory = torch.empty(blocks * spec.kv_block_bytes(dtype.itemsize), dtype=torch.uint8)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        weights |= load_file(file)
    return Model(spec, weights, KVCache(memory, spec, dtype, blocks))


def sequence_of(
    name: str,
    prompt: tuple[int, ...],
    tokens: int,
    blocks: list[int],
    tokenizer: Tokenizer,
    eos_ids: tuple[int, ...],
) -> Sequence:
    """A request of a prompt for so many tokens, its blocks given."""
    from coldframe.runtime.engine.params import SamplingParams
    from coldframe.runtime.engine.sequence import Sequence
    from coldframe.runtime.worker.answer import TextStream

    params = SamplingParams(max_tokens=tokens, ignore_eos=True).with_seed()
    text = TextStream(tokenizer, prompt, ())
    sequence = Sequence(name, 0, prompt, (), params, text, eos_ids)
    sequence.blocks = list(blocks)
    return sequence
