"""Memory of ours as one of torch's allocators, for what is computed within a capture."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import torch

from coldframe.loader.devices.scratch import Scratch
from coldframe.loader.errors import ColdframeError, DeviceError

__all__ = ["TorchMemory"]

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)

_SMALL, _SMALL_PIECES, _LARGE = 1 << 20, 16, 32 << 20
"""What a pool is stocked with, in bytes: two of the small pieces share a segment of torch's."""


class TorchMemory:
    """A worker's own memory as one of torch's allocators.

    Torch calls it while it holds its own lock, and Python's is taken then. So no other thread of
    the process may make or free tensors of the GPU meanwhile. None does; and a pool is stocked, so
    that torch rarely has to call.

    Raises:
        DeviceError: This torch takes none from outside.
    """

    def __init__(self) -> None:
        make = getattr(torch._C, "_cuda_customAllocator", None)
        self._kind = getattr(torch.cuda, "MemPool", None)
        if make is None or self._kind is None:
            raise DeviceError(
                "this torch takes no memory from outside for a graph",
                expected="torch.cuda.MemPool with an allocator",
                got=f"torch {torch.__version__}",
            )
        self._scratch: Scratch | None = None
        # As long as torch has their addresses, they must live.
        self._calls = (_ALLOCATE(self._allocate), _FREE(self._free))
        addresses = [ctypes.cast(call, ctypes.c_void_p).value for call in self._calls]
        self._allocator = make(*addresses)

    def use(self, scratch: Scratch) -> None:
        """Says where the memory is."""
        self._scratch = scratch

    def pool(self) -> Any:
        """A pool over it, whose `id` a capture takes."""
        assert self._kind is not None
        return self._kind(self._allocator)

    def stock(self, pool: Any, device: torch.device, stream: Any) -> None:
        """Has a pool take memory for most of what captures need, before the first of them.

        Nothing comes of it where this torch gives up a pool that is not in a capture.

        Args:
            pool: See `pool`. Nothing is in it yet.
            device: Which GPU.
            stream: The one of the captures: torch keeps memory for each stream apart.
        """
        use = getattr(torch.cuda, "use_mem_pool", None)
        count = getattr(pool, "use_count", None)
        if use is None or count is None or count() < 1:
            return
        with suppress(torch.OutOfMemoryError), torch.cuda.stream(stream), use(pool, device):
            # Small tensors and large ones come from segments of their own.
            pieces = [_SMALL] * _SMALL_PIECES + [_LARGE]
            made = [torch.empty(n, dtype=torch.uint8, device=device) for n in pieces]
            del made

    def _allocate(self, nbytes: int, device: int, stream: int | None) -> int | None:
        """Called by torch, from its C++: what is raised here would be lost. None is no memory."""
        try:
            assert self._scratch is not None
            return self._scratch.take(nbytes)
        except ColdframeError:
            return None

    def _free(self, address: int | None, nbytes: int, device: int, stream: int | None) -> None:
        if address is not None and self._scratch is not None:
            self._scratch.give_back(address)
