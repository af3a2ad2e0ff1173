"""Replicas on a GPU, and what Transformers computes there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.options import ReplicaOptions


def options(model: Path, runs: Path, device: str, **more: object) -> ReplicaOptions:
    told: dict[str, Any] = {"model": str(model), "run_dir": str(runs), **more}
    if "device" in {field.name for field in dataclasses.fields(ReplicaOptions)}:
        told["device"] = device
    elif device != "cpu":
        pytest.skip("replicas cannot be told a device yet")
    return ReplicaOptions(**told)


@functools.cache
def reference(model: Path, device: str, dtype: str) -> Any:
    """Transformers' model on the GPU; its float32 is exact, not tf32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.eval().to(device)


@functools.cache
def expected(model: Path, device: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of Transformers in float32."""
    import torch

    ids = torch.tensor([prompt], device=device)
    out = reference(model, device, "float32").generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=0,
        do_sample=False,
        eos_token_id=[-1],
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def logprobs(
    model: Path, device: str, dtype: str, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """What Transformers gives to each token of an answer, the ones before it given."""
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=device)
    with torch.inference_mode():
        logits = reference(model, device, dtype)(ids).logits[0, len(prompt) - 1 : -1]
    rows = logits.double().log_softmax(-1)
    found: list[float] = rows[range(len(answer)), list(answer)].tolist()
    return found
