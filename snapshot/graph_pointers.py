"""Pointers among the parameters of captured kernels: told from other numbers, and made offsets.

What a parameter points to must be in a region: the driver is asked about every other number that
could be an address, and one that it knows is memory which will not be there again. Memory of the
host that it does not know cannot be told from a number; no kernel could read it either.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.loader.errors import GraphRefused
from coldframe.snapshot.graph_kernels import KernelIdentity
from coldframe.snapshot.graph_nodes import ITSELF, WORD, Place, Region, place_of

__all__ = ["ParameterBlock", "Pointers", "refused"]

_LOWEST_ADDRESS = 1 << 16
_HIGHEST_ADDRESS = 1 << 57
_DESCRIPTOR_BYTES, _DESCRIPTOR_ALIGNMENT = 128, 64
"""A CUtensorMap, in which addresses stand in a form that is nobody's business."""

_BUFFER, _BUFFER_BYTES = 1, 2
"""CU_LAUNCH_PARAM_BUFFER_POINTER and CU_LAUNCH_PARAM_BUFFER_SIZE."""

_INSIDE = "Take all memory that the step uses from the regions before it is captured."


class Pointers:
    """Tells where pointers lead.

    Args:
        calls: The driver's.
        regions: What they may lead into.
    """

    def __init__(self, calls: GraphCalls, regions: Sequence[Region]) -> None:
        self._calls = calls
        self._regions = tuple(regions)
        self._plain: set[int] = set()

    def place(self, value: int, where: str) -> Place | None:
        """Where a number leads; None for one that is no pointer.

        Args:
            value: It.
            where: What it is a parameter of, for errors.

        Raises:
            GraphRefused: It leads to memory that is in no region.
            DeviceError: The driver does not say.
        """
        if not _LOWEST_ADDRESS <= value < _HIGHEST_ADDRESS or value in self._plain:
            return None
        place = place_of(value, self._regions)
        if place is None:
            if self._calls.knows_pointer(value):
                raise self._outside(value, where)
            self._plain.add(value)
        return place

    def demand(self, address: int, where: str) -> Place:
        """Where what surely is a pointer leads.

        Raises:
            GraphRefused: Into no region.
        """
        place = place_of(address, self._regions)
        if place is None:
            raise self._outside(address, where)
        return place

    def _outside(self, address: int, where: str) -> GraphRefused:
        around = self._calls.allocation(address)
        got = f"{address:#x}"
        if around is not None:
            got += f", of {around[1]:,} bytes at {around[0]:#x}"
        return refused(
            "a pointer leads out of all regions",
            where,
            expected=", ".join(
                f"{region.name} [{region.base:#x}, {region.base + region.size:#x})"
                for region in self._regions
            ),
            got=got,
            hint=_INSIDE,
        )


class ParameterBlock:
    """The parameters of a graph's kernels, one behind the other; see `graph_nodes.py`.

    Attributes:
        kinds: What each word is.
        fixed: Whether a pointer may be hidden in one of them.
    """

    def __init__(self) -> None:
        self.kinds = bytearray()
        self.fixed = False
        self._words = array("Q")

    def words(self) -> bytes:
        """All words."""
        return self._words.tobytes()

    def add(self, kernel: KernelIdentity, params: Any, pointers: Pointers) -> int:
        """Takes a node's parameters.

        Args:
            kernel: What it runs.
            params: A CUDA_KERNEL_NODE_PARAMS.
            pointers: What tells them from numbers.

        Returns:
            The word at which the table of pointers to them begins.

        Raises:
            GraphRefused: They cannot be read, or lead out of all regions.
        """
        table, first = len(self._words), len(self._words) + len(kernel.layout)
        words = array("Q", _parameter_bytes(kernel, params))
        kinds = bytearray(len(words))
        for offset, size in kernel.layout:
            # A pointer lies on a multiple of its size, and in one parameter only.
            for number in range(-(-offset // WORD), (offset + size) // WORD):
                where = f"a KERNEL node, kernel {kernel.name}, parameter at {offset}"
                place = pointers.place(words[number], where)
                if place is not None:
                    words[number], kinds[number] = place.offset, place.region + 1
            if size >= _DESCRIPTOR_BYTES and not offset % _DESCRIPTOR_ALIGNMENT:
                self.fixed = True
        self._words.extend(first * WORD + offset for offset, _ in kernel.layout)
        self._words.extend(words)
        self.kinds += bytes([ITSELF]) * len(kernel.layout) + kinds
        return table


def refused(
    what: str,
    where: str,
    *,
    expected: object = None,
    got: object = None,
    hint: str | None = None,
) -> GraphRefused:
    """Why a graph cannot be kept.

    Args:
        what: What is wrong.
        where: The kind of the node, and its kernel's name.
        expected: What can be kept.
        got: What there is.
        hint: What to do about it.
    """
    return GraphRefused(what, where=where, expected=expected, got=got, hint=hint)


def _parameter_bytes(kernel: KernelIdentity, params: Any) -> bytes:
    """A node's parameters as the device has them, filled up to whole words."""
    size = kernel.block_bytes
    block = bytearray(-(-size // WORD) * WORD)
    table, extra = int(params.kernelParams or 0), int(params.extra or 0)
    if table and size:
        pointers = (ctypes.c_uint64 * len(kernel.layout)).from_address(table)
        for (offset, length), pointer in zip(kernel.layout, pointers, strict=True):
            block[offset : offset + length] = ctypes.string_at(pointer, length)
    elif size:
        packed = _packed(extra, size)
        if packed is None:
            raise refused(
                "the parameters of a kernel cannot be read",
                f"a KERNEL node, kernel {kernel.name}",
                expected=f"{size} bytes",
                got="less, or none",
            )
        block[:size] = packed
    return bytes(block)


def _packed(extra: int, size: int) -> bytes | None:
    """Parameters that were passed as one buffer; None where it is too short."""
    given: dict[int, int] = {}
    while extra and len(given) < 2:
        key, value = (ctypes.c_uint64 * 2).from_address(extra)
        if key not in (_BUFFER, _BUFFER_BYTES):
            break
        given[key] = value
        extra += 2 * WORD
    if len(given) < 2 or ctypes.c_size_t.from_address(given[_BUFFER_BYTES]).value < size:
        return None
    return ctypes.string_at(given[_BUFFER], size)
