"""What a replica's vLLM engine is started with, and what is said where it does not start."""

from __future__ import annotations

import pytest
import torch

from coldframe.loader.errors import DeviceFull, ReplicaError, RequestError
from coldframe.runtime.integrations.vllm.engine import _why_not, engine_arguments


def test_a_replicas_engine_has_no_gates() -> None:
    """It takes the load over when it is up, so it is not to be up before its weights are in."""
    wrong = {"model_loader_extra_config": {"gated": True}, "max_num_seqs": 4}
    made = engine_arguments("/model", "cpu", "BF16", 1024, 1 << 20, wrong)
    assert made["load_format"] == "coldframe"
    assert made["model_loader_extra_config"] == {"gated": False}
    assert made["max_num_seqs"] == 4


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("a device has none"),
        RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 1 GiB'"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        ValueError("No available memory for the cache blocks. Try increasing"),
        ValueError("(2 GiB KV cache is needed, which is larger than the available KV cache memory"),
        ValueError("Free memory on device cuda:0 (1/80 GiB) on startup is less than desired"),
        ValueError("Available memory on node 0 (1/4 GiB) on kv cache allocation is less than"),
    ],
)
def test_too_little_memory(error: Exception) -> None:
    assert isinstance(_why_not(error), DeviceFull)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), ReplicaError),
        (ValueError("swap_space: no such memory"), RequestError),
        (OSError("cannot open shared memory"), ReplicaError),
    ],
)
def test_whatever_else_speaks_of_memory(error: Exception, kind: type[Exception]) -> None:
    assert type(_why_not(error)) is kind
