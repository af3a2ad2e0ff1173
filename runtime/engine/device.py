"""Where the engine computes: what a GPU needs to be told, and a CPU does not.

A GPU works behind the program: what it is to do is queued, and the program goes on. Three moments
need care, so that a step neither waits more often than it must nor lets go too early: numbers go
there in one copy that nobody waits for (`upload`), results come back in one wait (`fetch`), and
before memory changes hands all that was queued is done (`settle`). On a CPU all of this is nothing.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

__all__ = ["fetch", "give_back", "reserved", "send", "settle", "start", "stopwatch", "upload"]


def start(device: torch.device) -> None:
    """Has torch use a GPU from this thread on; that takes a while, most of it for the context.

    Products of float32 are float32's, not TF32's, and sums of 16-bit products are kept in float32
    to their end, also where a product is cut into several along the inner dimension: answers are
    then as near to those of other batches, and of a CPU, as the dtype lets them be.

    Attention is not cuDNN's, which torch would take first on recent GPUs: that makes a plan anew
    for every shape, and each token of an answer sees one key more than the one before.

    Args:
        device: Which, of those that this process sees; the first one, where that is not said.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_device(device.index or 0)
    # The first product makes the libraries' handles and their workspace.
    ones = torch.ones(16, 16, device=device)
    torch.mm(ones, ones)


def upload(rows: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
    """Rows of numbers as tensors on a device, in one copy.

    Args:
        rows: Of any lengths.
        device: Where to.

    Returns:
        `[len(row)]` int64 each, views of one tensor.
    """
    device = torch.device(device)
    # Only from locked memory does a copy go on beside the program.
    flat = torch.tensor(
        list(chain.from_iterable(rows)), dtype=torch.int64, pin_memory=_in_use(device)
    )
    there = flat.to(device, non_blocking=True)
    return list(torch.split(there, [len(row) for row in rows]))


def send(numbers: array[int], there: Tensor) -> None:
    """Writes numbers where a device looks for them, in one copy that nobody waits for.

    The locked memory that they come from is torch's own to use again, once they are there.

    Args:
        numbers: As many as `there` has room for, of 8 bytes each (`q`).
        there: `[n]` int64.
    """
    here = torch.frombuffer(numbers, dtype=torch.int64)
    if _in_use(there.device):
        here = here.pin_memory()
    there.copy_(here, non_blocking=True)


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device on the CPU, after one wait for what makes them.

    Returns:
        Copies; the tensors themselves where they are there already.
    """
    here = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    settle(tensors[0].device)
    return here


def settle(device: torch.device) -> None:
    """Waits until a device has done all that it was given.

    Raises:
        RuntimeError: Something of it has failed (see `device_errors`).
    """
    if _in_use(device):
        # One that sleeps: a waiting thread that spins would take a core from everybody else.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def give_back(device: torch.device) -> None:
    """Gives back what torch keeps of a device's memory without need, when nothing is to be done."""
    if _in_use(device):
        torch.cuda.empty_cache()


def reserved(device: torch.device) -> int:
    """Bytes of a device's memory that torch has; none of a CPU's."""
    return torch.cuda.memory_reserved(device) if _in_use(device) else 0


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Starts to measure how long a device works.

    Returns:
        Gives the seconds since then: of a GPU from when it had nothing to do until what was queued
        since is done, of a CPU the time of all of this process's threads.
    """
    if not _in_use(device):
        started = time.process_time()
        return lambda: time.process_time() - started
    settle(device)
    begin, end = (
        torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    stream = torch.cuda.current_stream(device)
    begin.record(stream)

    def elapsed() -> float:
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return elapsed


def _in_use(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
