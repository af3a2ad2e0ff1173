from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.worker.text import Tokenizer
from coldframe.runtime.worker.warmup import warm_up
from tests.snapshot.frozen import ENVIRONMENT, ROOT, frozen
from tests.support import unavailable

# What a worker has imported by then, and the real model over its weights.
WORKER = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from safetensors.torch import load_file
from coldframe.runtime.worker import decode as decode_worker
from coldframe.runtime.worker import prefill as prefill_worker
from coldframe.runtime.worker.answer import TextStream
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.worker.tensors import torch_dtypes
from coldframe.runtime.worker.text import Tokenizer
from coldframe.runtime.worker.warmup import warm_up

model = Path({model!r})
tokenizer = Tokenizer.load(model)
config = json.loads((model / "config.json").read_text())
tensors = {{}}
for shard in model.glob("*.safetensors"):
    tensors |= load_file(shard)
dtype = tensors["model.embed_tokens.weight"].dtype
names = {{torch_dtype: name for name, torch_dtype in torch_dtypes().items()}}
from dataclasses import replace
spec = replace(ModelSpec.from_config(config), dtype=names[dtype])

def serve(lengths, **given):
    memory = torch.zeros(len(lengths) * 4 * spec.kv_block_bytes(dtype.itemsize), dtype=torch.uint8)
    real = Model(spec, tensors, KVCache(memory, spec, dtype, len(lengths) * 4))
    prefiller, decoder = Prefiller(real, lambda stage: True), Decoder(real)
    for place, length in enumerate(lengths):
        prompt = tuple(5 + (7 * i + place) % 400 for i in range(length))
        params = SamplingParams(max_tokens=6, ignore_eos=True, **given)
        text = TextStream(tokenizer, prompt, ())
        sequence = Sequence(str(place), 0, prompt, (), params, text, ())
        sequence.blocks = list(range(place * 4, place * 4 + 4))
        prefiller.admit(sequence)
        decoder.admit(sequence)
    tokens = []
    while not prefiller.idle:
        tokens += [emission.token for _, emission in prefiller.advance() or ()]
    while len(decoder):
        tokens += [emission.token for _, emission in decoder.step()]
    return tokens
"""


def worker(model: Path, code: str, **environment: str) -> list[str]:
    """The lines that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(root=str(ROOT), model=str(model)) + code],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", **environment},
        stdout=subprocess.PIPE,
        check=True,
        timeout=100,
        text=True,
    )
    return done.stdout.splitlines()


def test_what_follows_makes_no_primitive_of_its_own(demo_model: Callable[..., Path]) -> None:
    """oneDNN says itself what it makes, and what it finds made."""
    code = """
def say(what): print(what, flush=True)
say("warming"); warm_up(spec, tokenizer)
say("serving"); serve((64,)); serve((40, 24)); serve((8,) * 8); serve((1, 1))
say("another length"); serve((57,))
"""
    said = worker(demo_model(dtype="bfloat16"), code, ONEDNN_VERBOSE="profile_create")
    parts = [said.index(mark) for mark in ("warming", "serving", "another length")]
    warming, serving, other = (
        [line for line in said[start:end] if "create:cache_miss" in line]
        for start, end in pairwise([*parts, len(said)])
    )
    if not warming:
        unavailable("this CPU, or this torch, does bfloat16 without oneDNN")
    assert serving == []
    assert other  # there is no way around that, and the test sees it


def test_answers_are_the_same_after_it(demo_model: Callable[..., Path]) -> None:
    """It leaves no switch of torch's where it was not."""
    code = """
def state():
    return [torch._C._get_mkldnn_enabled(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.get_rng_state().tolist(), serve((64, 3))]
before = state()
warm_up(spec, tokenizer)
print(state() == before)
"""
    assert worker(demo_model(dtype="bfloat16"), code) == ["True"]


@pytest.mark.heavy
def test_a_large_model_takes_little_memory_and_gives_it_back(
    demo_model: Callable[..., Path],
) -> None:
    large = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 100_000,
        "num_hidden_layers": 10,
        "tie_word_embeddings": False,
    }
    code = f"""
def status(*names):
    with open("/proc/self/status") as file:
        found = dict(line.split(":") for line in file)
    return [int(found[name].split()[0]) / 1024 for name in names]
spec = replace(ModelSpec.from_config({{**config, **{large!r}}}), dtype="BF16")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is from now on
[before] = status("VmRSS")
warm_up(spec, tokenizer)
first, mapped, peak = status("VmRSS", "VmSize", "VmHWM")
warm_up(spec, tokenizer)
second, mapped_again = status("VmRSS", "VmSize")
print(json.dumps([peak - before, second - first, mapped_again - mapped]))
"""
    peak, kept, mapped = json.loads(worker(demo_model(), code)[0])
    # All of it would be 2,000 MiB, and what is run 900: the embedding, the head and one layer.
    assert peak < 200
    # What torch and oneDNN keep is there after the first time.
    assert kept < 8
    assert mapped < 100


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_family_in_every_dtype(
    demo_model: Callable[..., Path], family: str, dtype: str
) -> None:
    model = demo_model(family=family)
    warm_up(spec_of(model, dtype), Tokenizer.load(model))


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 16},
        {"sliding_window": 8, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        {"vocab_size": 20},
        {"num_hidden_layers": 1, "tie_word_embeddings": False},
    ],
    ids=["short context", "sliding window", "small vocabulary", "one layer"],
)
def test_unusual_models(demo_model: Callable[..., Path], change: dict[str, Any]) -> None:
    model = demo_model()
    warm_up(spec_of(model, "F32", **change), Tokenizer.load(model))


def spec_of(model: Path, dtype: str, **change: Any) -> ModelSpec:
    config = {**json.loads((model / "config.json").read_text()), **change}
    return replace(ModelSpec.from_config(config), dtype=dtype)


def test_a_warm_worker_can_be_frozen_and_serves_in_its_clones(
    demo_model: Callable[..., Path],
) -> None:
    prepare = WORKER.format(root=str(ROOT), model=str(demo_model(dtype="bfloat16")))
    prepare += "expected = serve((64, 3))\nwarm_up(spec, tokenizer)\n"
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    with frozen(prepare, "template", environment) as process:
        for _ in range(2):
            assert process.woken(threads=2).value("serve((64, 3)) == expected") is True
