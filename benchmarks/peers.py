"""Other implementations beside ours: each a process of its own, with as many threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["lacks_vllm", "transformers_decode_rates"]

_LOOK_S = 60.0

_TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
path, prompt, tokens, runs, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
ids = torch.tensor([prompt])
def seconds(count):
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                         min_new_tokens=count, do_sample=False, pad_token_id=0)
    assert out.shape[1] == len(prompt) + count
    return time.perf_counter() - started
seconds(4)
rates = []
for _ in range(runs):
    first = seconds(1)
    rates.append((tokens - 1) / (seconds(tokens) - first))
print(json.dumps(rates))
"""


def lacks_vllm(python: Path | None) -> str | None:
    """Why vLLM cannot be started by an interpreter; None where it can be, as far as is seen.

    It is found there, not imported: that takes seconds, and is what is measured.

    Args:
        python: The interpreter, or None where none was given.
    """
    if python is None:
        return "no interpreter that has vLLM was given (--vllm-python)"
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, timeout=_LOOK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"{python} is no interpreter (--vllm-python)"
    return f"{python} has no vLLM (--vllm-python)" if done.returncode else None


def transformers_decode_rates(
    model: Path, prompt: Sequence[int], tokens: int, runs: int, threads: int
) -> list[float]:
    """Tokens per second of `transformers.generate` after the first token, one value a run."""
    arguments = json.dumps([str(model), list(prompt), tokens, runs, threads])
    done = subprocess.run(
        [sys.executable, "-c", _TRANSFORMERS, arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rates: list[float] = json.loads(done.stdout)
    return rates
