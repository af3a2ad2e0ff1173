"""What a worker does on its device while weights come, here on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.varlen import WAYS, Varlen
from coldframe.runtime.worker.warmup import dummy_weights, ready_device
from tests.runtime.engine.test_varlen import kernel
from tests.snapshot.frozen import ROOT

BLOCKS = 4


@pytest.fixture
def spec(demo_model: Callable[..., Path]) -> ModelSpec:
    """The tiny demo model's shape."""
    return ModelSpec.from_config(json.loads((demo_model() / "config.json").read_text()))


def model_of(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> Model:
    memory = torch.full((BLOCKS * spec.kv_block_bytes(4),), 7, dtype=torch.uint8)
    return Model(spec, weights, KVCache(memory, spec, torch.float32, BLOCKS))


def test_whatever_is_in_the_weights_yet(spec: ModelSpec) -> None:
    weights = dummy_weights(spec)
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    model = model_of(spec, weights)
    asked: list[int] = []
    ready_device(model, weights, lambda: bool(asked.append(1)))
    assert len(asked) > 6
    assert bool((model.kv.pages.view(torch.uint8) == 7).all())  # the requests' KV is not touched
    assert all(bool(tensor.isnan().all()) for tensor in weights.values())


def test_it_ends_when_there_is_something_better_to_do(spec: ModelSpec) -> None:
    weights = dummy_weights(spec)
    asked: list[int] = []

    def enough() -> bool:
        asked.append(1)
        return len(asked) == 2

    ready_device(model_of(spec, weights), weights, enough)
    assert len(asked) == 2


def test_nothing_is_done_where_there_is_something_better_at_once(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: object) -> None:
        raise AssertionError("a piece was computed")

    monkeypatch.setattr(Model, "forward", compute)
    weights = dummy_weights(spec)
    ready_device(model_of(spec, weights), weights, lambda: True)


def test_attention_is_the_models(spec: ModelSpec) -> None:
    used: list[object] = []

    def noted(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        used.append(arguments)
        return kernel(*arguments, **options)

    weights = dummy_weights(spec)
    model = model_of(spec, weights)
    model.varlen = Varlen(noted, WAYS[0])
    ready_device(model, weights, lambda: bool(used))
    assert used


@pytest.mark.heavy
def test_a_worker_on_a_cpu_imports_nothing_of_it() -> None:
    """Neither what is a GPU's, nor torch's compiler, which some of that would bring along."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from coldframe.runtime.worker.lean_torch import import_torch
import_torch()
from coldframe.runtime.worker import answer
from coldframe.runtime.worker import decode as decode_worker
from coldframe.runtime.worker import prefill as prefill_worker
from coldframe.runtime.worker import worker
from coldframe.runtime.engine import model
ours = ("warmup", "engine.varlen", "engine.device_errors")
names = ("torch._dynamo", *(f"coldframe.runtime.{{name}}" for name in ours))
print([name for name in names if name in sys.modules])
import coldframe.runtime.worker.warmup, coldframe.runtime.engine.varlen
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["[]", "False"]
