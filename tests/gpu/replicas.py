"""Replicas on a GPU, and what Transformers computes there."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.runtime.options import ReplicaOptions


def options(model: Path, runs: Path, device: str, **more: Any) -> ReplicaOptions:
    """A replica for which no CPU stands in."""
    return ReplicaOptions(model=str(model), run_dir=str(runs), device=device, **more)


def beside(device: str) -> str:
    """Where Transformers computes: on the same GPU, or where COLDFRAME_TEST_BESIDE says."""
    return os.environ.get("COLDFRAME_TEST_BESIDE", device)


@functools.cache
def reference(model: Path, device: str, dtype: str) -> Any:
    """Transformers' model on the GPU; its float32 is exact, not tf32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.eval().to(beside(device))


@functools.cache
def expected(model: Path, device: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of Transformers in float32."""
    import torch

    ids = torch.tensor([prompt], device=beside(device))
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

    ids = torch.tensor([[*prompt, *answer]], device=beside(device))
    with torch.inference_mode():
        logits = reference(model, device, dtype)(ids).logits[0, len(prompt) - 1 : -1]
    rows = logits.double().log_softmax(-1)
    found: list[float] = rows[range(len(answer)), list(answer)].tolist()
    return found
