"""LZ4 blocks: what the pieces of a compressed image are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages

__all__ = ["installed", "packer", "unpacker"]

_LEVEL = 6  # of 12: a second for an image; 12 takes twenty, and saves three bytes in a hundred


def installed() -> bool:
    """Whether the package is here."""
    from importlib.util import find_spec

    add_site_packages()
    return find_spec("lz4") is not None


def packer() -> Callable[[bytes], bytes]:
    """What compresses; for several threads.

    Raises:
        PlatformError: The package is not installed.
    """
    block = _package()

    def pack(plain: bytes) -> bytes:
        packed: bytes = block.compress(
            plain, mode="high_compression", compression=_LEVEL, store_size=False
        )
        return packed

    return pack


def unpacker() -> Callable[[memoryview, memoryview], int]:
    """What decompresses one buffer into another; for several threads.

    It gives the number of bytes written, and a negative one for what is no LZ4 block of at most
    as many bytes as there is room for. Both buffers must be writable and contiguous.

    Raises:
        PlatformError: The package is not installed.
    """
    import ctypes

    block = _package()
    try:
        # The package's own function makes a new object each time, and then copies it: for each
        # byte of the image a page is faulted in and given back, half as much work again.
        call = ctypes.CDLL(block._block.__file__).LZ4_decompress_safe
    except (AttributeError, OSError):
        return _by_copy(block)
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    call.restype = ctypes.c_int

    def unpack(packed: memoryview, plain: memoryview) -> int:
        source = (ctypes.c_char * packed.nbytes).from_buffer(packed)
        target = (ctypes.c_char * plain.nbytes).from_buffer(plain)
        return int(call(source, target, packed.nbytes, plain.nbytes))

    return unpack


def _by_copy(block: Any) -> Callable[[memoryview, memoryview], int]:
    def unpack(packed: memoryview, plain: memoryview) -> int:
        try:
            found = block.decompress(packed, uncompressed_size=plain.nbytes)
        except block.LZ4BlockError:
            return -1
        plain[: len(found)] = found
        return len(found)

    return unpack


def _package() -> Any:
    add_site_packages()
    try:
        import lz4.block  # type: ignore[import-untyped]
    except ImportError:
        raise PlatformError(
            "compressed images need lz4", expected="lz4", hint="Run: pip install lz4"
        ) from None
    return lz4.block
