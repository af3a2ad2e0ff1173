"""Copies of whole stretches of host memory, by a few threads that share nothing.

What a copy into new memory costs is mostly the kernel's giving out its pages, for which each thread
has to wait on its own. Torch splits one tensor after the other over the threads of its kernels,
which wait for one another behind each, and spin while they do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["copy_all", "span_of"]

_PIECE = 4 << 20
_MOST_THREADS = 8
"""More than that wait for the memory."""


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies tensors into others, as `copy_` does it one after the other.

    Args:
        pairs: Of each copy where it goes and what: two tensors of one shape. What is not one
            stretch of the host's memory, and the same dtype, on both sides is left to torch; so is
            all of it where one copy writes where another does.
    """
    pairs = list(pairs)
    apart = _are_apart(into for into, _ in pairs)
    pieces = []
    for into, source in pairs:
        if not (apart and _is_plain(into, source)):
            into.copy_(source)
            continue
        to, since, nbytes = into.data_ptr(), source.data_ptr(), into.numel() * into.element_size()
        pieces += [
            (to + at, since + at, min(_PIECE, nbytes - at)) for at in range(0, nbytes, _PIECE)
        ]
    threads = min(torch.get_num_threads(), _MOST_THREADS, len(pieces))
    if threads < 2:
        for piece in pieces:
            ctypes.memmove(*piece)
        return
    with ThreadPoolExecutor(threads, "copy") as pool:
        # Foreign calls let go of the interpreter.
        for _ in pool.map(lambda piece: ctypes.memmove(*piece), pieces):
            pass


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in pairs)
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _are_apart(tensors: Iterable[torch.Tensor]) -> bool:
    reached = 0
    for begin, end in sorted(span_of(tensor) for tensor in tensors):
        if begin < reached:
            return False
        reached = max(reached, end)
    return True


def _is_plain(into: torch.Tensor, source: torch.Tensor) -> bool:
    alike = into.dtype == source.dtype and into.shape == source.shape
    host = into.device.type == source.device.type == "cpu"
    stretches = into.is_contiguous() and source.is_contiguous()
    return alike and host and stretches and not into.is_conj() and not into.is_neg()
