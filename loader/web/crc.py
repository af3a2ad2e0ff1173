"""CRCs, which can be put together from those of pieces: what stores keep of large objects."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages

__all__ = ["Crc", "crcs"]


class Crc(NamedTuple):
    """One kind of CRC.

    Attributes:
        update: The CRC of a buffer behind bytes that have the given one.
        combine: The CRC of two runs of bytes, from theirs and the length of the second.
    """

    update: Callable[[memoryview, int], int]
    combine: Callable[[int, int, int], int]

    def sum(self, parts: Sequence[memoryview]) -> int:
        checksum = 0
        for part in parts:
            checksum = self.update(part, checksum)
        return checksum


def crcs() -> dict[str, Crc]:
    """The kinds that S3 keeps, by name.

    Raises:
        PlatformError: awscrt is not installed.
    """
    add_site_packages()
    try:
        from awscrt import checksums  # type: ignore[import-untyped]
    except ImportError:
        raise PlatformError(
            "S3's checksums need awscrt", hint="Run: pip install 'coldframe[s3]'"
        ) from None
    return {
        "crc64nvme": Crc(checksums.crc64nvme, checksums.combine_crc64nvme),
        "crc32c": Crc(checksums.crc32c, checksums.combine_crc32c),
        # zlib's is the faster of the two where there is no AVX-512 for it.
        "crc32": Crc(zlib.crc32, checksums.combine_crc32),
    }
