"""First uses, done before they cost anybody a first token.

The first prefill and the first decode step pay for what happens once in a process: oneDNN makes
its primitives and writes their kernels, ATen looks up its own, Python specialises its bytecode,
torch imports what it had put off. A worker that is to be frozen does all that beforehand, on dummy
inputs of the model's shapes and through the very code that serves.

It needs next to no memory, whatever the model's size. The weights are zeros that nobody wrote: a
page that is only ever read is the kernel's one page of zeros. One layer of each kind stands for
all of them, in both arrangements that weights come in (`engine/linear.py`).

A worker on a GPU does so when it has started (`ready_device`), while its weights come.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod

import torch

from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Chunk, Model
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.sampling import SampleInput, sample
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.answer import TextStream
from coldframe.runtime.worker.tensors import torch_dtypes
from coldframe.runtime.worker.text import Tokenizer

__all__ = ["dummy_weights", "first_uses", "ready_device", "sample_each", "stream_text", "warm_up"]

_BATCHES = ((64,), (1, 63), (8,) * 8, (1,))
"""Prompt lengths of the requests that are prefilled, and then decoded, together.

In bfloat16 on a CPU oneDNN makes its primitives anew for each number of tokens in a step, from
three on. That takes 2 to 4 ms and, for a model of 210 M parameters, 3.3 MB of the image each time,
so two numbers stand for all: the 64 that these prompts have together, and the 8 of a batch in
decode. What is left to a prompt of another length is those milliseconds, once.
"""

_STEPS = 3
"""Decode steps of each batch: Python specialises a function after it has run a few times."""

_PARAMS = (
    SamplingParams(),
    SamplingParams(logprobs=2),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=1),
    SamplingParams(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.1, seed=2),
)

_TEXT = "A cold frame gives seedlings a head start: \N{SNOWMAN} to \N{SEEDLING} in 40 days.\n"

_MAP_NORESERVE = 0x4000  # nothing is reserved for what is never written; Python 3.13 names it
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def warm_up(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Runs everything that serves a request once, on dummy weights.

    To be called with as many threads as the clones will have, for kernels are made for a number of
    threads; by OMP_NUM_THREADS, as `torch.set_num_threads` starts threads that do not end.

    Args:
        spec: The model's shape.
        tokenizer: The model's.
    """
    stream_text(tokenizer)
    sample_each(spec)
    spec = _one_of_each_kind(spec)
    for gap in (0, 8):
        model = Model(spec, dummy_weights(spec, gap), _cache(spec))
        for lengths in _BATCHES:
            _serve(model, lengths, tokenizer)
        del model
    ctypes.CDLL(None).malloc_trim(0)


def ready_device(
    model: Model, tensors: Mapping[str, torch.Tensor], enough: Callable[[], bool]
) -> None:
    """Uses what a model's device will use, while there is time.

    Args:
        model: The model.
        tensors: Its weights by their names.
        enough: Whether there is something better to do; asked before each piece.
    """
    for _ in first_uses(model, tensors):
        if enough():
            return


def first_uses(real: Model, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """What a device does in a prefill and in a decode step, once and for nobody, piece by piece.

    A GPU's kernels come into its memory when they are first called, its libraries choose theirs
    then, and torch takes the memory to compute in. The weights here are those of the arena,
    whatever is in them yet: nothing is made of what comes out. Keys and values go to memory of
    their own.

    Args:
        real: The model, nothing of which is touched but its weights.
        tensors: Those, by their names.

    Yields:
        Before each piece, when those before are done: the rest may be left out.
    """
    spec = _one_of_each_kind(real.spec)
    model = Model(spec, tensors, _cache(spec, real.device))
    model.varlen = real.varlen
    for lengths in _BATCHES:
        prompts, blocks = [_prompt(spec, length) for length in lengths], _blocks_of(lengths)
        both = list(zip(prompts, blocks, strict=True))
        steps = [[Chunk(prompt, 0, len(prompt), own) for prompt, own in both]]
        # The second half of a prompt behind the first one, then a token behind all of it.
        halves = [(prompt, len(prompt) // 2, own) for prompt, own in both]
        steps.append([Chunk(prompt[half:], half, len(prompt), own) for prompt, half, own in halves])
        steps.append([Chunk((0,), len(prompt), len(prompt), own) for prompt, own in both])
        for chunks in steps:
            yield
            logits = model.forward(model.batch(chunks))
            asked = SampleInput(SamplingParams(), (0,), (), 1)
            sample(torch.zeros_like(logits), [asked] * len(chunks))


def _one_of_each_kind(spec: ModelSpec) -> ModelSpec:
    """The model with one layer of each kind; they differ in nothing but their windows."""
    kinds = tuple(dict.fromkeys(spec.windows))
    return replace(spec, layers=len(kinds), windows=kinds)


def stream_text(tokenizer: Tokenizer) -> None:
    """Turns token ids to text, as it is streamed."""
    ids = tokenizer.encode(_TEXT)
    for stop in ((), ("never there",)):
        stream = TextStream(tokenizer, ids[:5], stop)
        for token in ids[5:]:
            stream.push(token)
        stream.flush()


def sample_each(spec: ModelSpec, device: torch.device | str = "cpu") -> None:
    """Draws tokens in every way there is.

    Not from the logits of the dummy weights, where all tokens are equal: ties take long.

    Args:
        spec: The model's shape.
        device: Where the logits are.
    """
    logits = torch.linspace(-9, 9, spec.vocab_size, device=device).expand(len(_PARAMS), -1)
    sample(logits, [SampleInput(params, (0,), (0,), 2) for params in _PARAMS])


def dummy_weights(spec: ModelSpec, gap: int = 0) -> dict[str, torch.Tensor]:
    """Weights of nothing but zeros, unmapped with the last tensor of them.

    Args:
        spec: With few layers.
        gap: Bytes between neighbours. With none, maps of the same input are joined, and tensors
            are as well aligned as in the layout `aligned`; with 8, they are as in most files.
    """
    dtype = torch_dtypes()[spec.dtype]
    shapes = spec.expected_tensors()
    size = sum(prod(shape) * dtype.itemsize + gap for shape in shapes.values())
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=_ZEROS), dtype=torch.uint8)
    tensors = {}
    end = 0
    for name, shape in shapes.items():
        start = end + gap
        end = start + prod(shape) * dtype.itemsize
        tensors[name] = memory[start:end].view(dtype).view(shape)
    return tensors


def _serve(model: Model, lengths: tuple[int, ...], tokenizer: Tokenizer) -> None:
    """Takes some requests through prefill and decode, as workers do."""
    spec = model.spec
    params = SamplingParams(max_tokens=_STEPS + 2, ignore_eos=True)
    prefiller, decoder = Prefiller(model, lambda stage: True), Decoder(model)
    for number, (length, blocks) in enumerate(zip(lengths, _blocks_of(lengths), strict=True)):
        prompt = _prompt(spec, length)
        text = TextStream(tokenizer, prompt, ())
        sequence = Sequence(str(number), 0, prompt, (), params, text, spec.eos_token_ids)
        sequence.blocks = blocks
        prefiller.admit(sequence)
        decoder.admit(sequence)
    while not prefiller.idle:
        prefiller.advance()
    for _ in range(_STEPS):
        decoder.step()


def _prompt(spec: ModelSpec, length: int) -> tuple[int, ...]:
    """Token ids, as many as the model's context has room for."""
    length = max(1, min(length, spec.context_length - _STEPS - 1))
    return tuple(token % spec.vocab_size for token in range(length))


def _blocks_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """KV blocks for each prompt and what follows it."""
    blocks: list[list[int]] = []
    used = 0
    for length in lengths:
        count = -(-(length + _STEPS + 1) // BLOCK_TOKENS)
        blocks.append(list(range(used, used + count)))
        used += count
    return blocks


def _cache(spec: ModelSpec, device: torch.device | str = "cpu") -> KVCache:
    """Room for any of the batches."""
    dtype = torch_dtypes()[spec.dtype]
    blocks = max(sum(map(len, _blocks_of(lengths))) for lengths in _BATCHES)
    size = blocks * spec.kv_block_bytes(dtype.itemsize, BLOCK_TOKENS)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    return KVCache(memory, spec, dtype, blocks, BLOCK_TOKENS)
