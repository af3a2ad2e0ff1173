"""What a captured graph is made of, in a form that holds in another process.

All parameters of a graph's kernels are one block of 8-byte words. Before each kernel's own lies the
table of pointers to them that the driver wants. Beside the words is a byte for each that says what
it is: a plain value, an offset in one of the regions, or an offset in the block itself. So all
pointers of a graph are made at once (`relocated`), without a look at any of them.

A pointer is known by where it leads: into a region, which every process has reserved under the same
name. Where regions keep their addresses, as those of weights, KV and scratch memory do, it makes no
difference that some other number may look like one.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "COPY_FIELDS",
    "EMPTY",
    "ITSELF",
    "KERNEL",
    "MOST_REGIONS",
    "NODE",
    "OPERATION",
    "WORD",
    "Copy",
    "Fill",
    "GraphNodes",
    "Place",
    "Region",
    "place_of",
    "relocated",
]

NODE = struct.Struct("<11I")
"""What is kept of a node: its kind, the number of its kernel or operation; of a kernel the three
sizes of the grid, those of a block, the dynamic shared memory in bytes, the number of its
attributes, and the word at which its table of pointers begins."""
KERNEL, OPERATION, EMPTY = range(3)

WORD = 8
PLAIN, ITSELF = 0, 255
MOST_REGIONS = ITSELF - 1

COPY_FIELDS = (
    *(
        f"{end}{what}"
        for end in ("src", "dst")
        for what in ("XInBytes", "Y", "Z", "LOD", "Pitch", "Height")
    ),
    "WidthInBytes",
    "Height",
    "Depth",
)
"""The numbers of a CUDA_MEMCPY3D, but for its ends."""


class Region(NamedTuple):
    """Addresses of a device that are called by a name.

    Attributes:
        name: Such as `weights`.
        base: Where it begins.
        size: Its bytes, whether or not there is memory behind all of them.
    """

    name: str
    base: int
    size: int


class Place(NamedTuple):
    """A pointer: the number of a region, and an offset in it."""

    region: int
    offset: int


class Fill(NamedTuple):
    """A memset: rows of equal elements.

    Attributes:
        target: Where the first row begins.
        pitch: From row to row, in bytes.
        value: Of each element.
        element: Its bytes.
        width: Elements in a row.
        height: Rows.
    """

    target: Place
    pitch: int
    value: int
    element: int
    width: int
    height: int


class Copy(NamedTuple):
    """A copy within the device.

    Attributes:
        source: Where it is from.
        target: Where to.
        numbers: See `COPY_FIELDS`.
    """

    source: Place
    target: Place
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GraphNodes:
    """One graph.

    Attributes:
        nodes: A `NODE` for each.
        sources: The number of the node that each edge is from.
        targets: The number of the node that it leads to.
        ports: Three bytes for each edge, its data; empty where all of them are zero.
        operations: What memsets and copies do.
        words: The block of parameters; see the module.
        kinds: A byte for each word: 0 for a value, a region's number and 1, or `ITSELF`.
        fixed: Whether there are parameters in which a pointer may be hidden, so that it can only be
            made again where all regions are at the same addresses.
    """

    nodes: bytes
    sources: array[int]
    targets: array[int]
    ports: bytes
    operations: tuple[Fill | Copy, ...]
    words: bytes
    kinds: bytes
    fixed: bool

    @property
    def count(self) -> int:
        """How many nodes it has."""
        return len(self.nodes) // NODE.size


def place_of(address: int, regions: Sequence[Region]) -> Place | None:
    """The region that an address is in, and where in it; None where it is in none."""
    for number, region in enumerate(regions):
        if region.base <= address < region.base + region.size:
            return Place(number, address - region.base)
    return None


def relocated(words: bytes, kinds: bytes, bases: Mapping[int, int]) -> bytes:
    """The words, with the base of what they are offsets in added to each.

    All words at once: a second block is laid out that has the base of each word's kind there,
    byte by byte, and both are added as if each were one long number. As no word's own sum overflows
    it, what comes out has each of these sums in its place.

    Args:
        words: 8 bytes each, little-endian.
        kinds: What each of them is.
        bases: The base of each kind.

    Raises:
        OverflowError: The last of them does overflow.
    """
    addends = bytearray(len(words))
    for place in range(WORD):
        table = bytearray(256)
        for kind, base in bases.items():
            table[kind] = base >> 8 * place & 0xFF
        if any(table):
            addends[place::WORD] = kinds.translate(table)
    total = int.from_bytes(words, "little") + int.from_bytes(addends, "little")
    return total.to_bytes(len(words), "little")
