"""The seal: hashes of all that is in a checkpoint, in one small file beside it.

A load that finds `coldframe.seal.json` holds every byte against it while it streams. It is there
against faults: a bit that flipped on a disk, in memory or on the way, a copy that ended early,
files of two versions in one folder. It is no protection against attackers: who can write weights
can write a seal, and XXH3 is not made to withstand anybody.

Config and headers have SHA-256, which Python brings along, so that opening a sealed checkpoint
needs no package; the weights have a hash that is as fast as memory (`pieces`).
"""

from __future__ import annotations

import binascii
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coldframe.loader.checkpoints.pieces import (
    ALGORITHM,
    DIGEST_BYTES,
    PIECE_BYTES,
    Pieces,
    cuts_of_shards,
)
from coldframe.loader.checkpoints.whole_file import write_whole
from coldframe.loader.errors import (
    CheckpointError,
    PlatformError,
    SourceCorrupt,
    SourceCredentials,
    SourceDenied,
    SourceNotFound,
)
from coldframe.loader.sources.base import Origin
from coldframe.loader.strict_json import describe, parse_object

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Checkpoint

__all__ = ["GOOD_COPY", "SEAL_NAME", "Seal", "SealedShard", "sha256"]

SEAL_NAME = "coldframe.seal.json"
VERSION = 1

_MAX_SEAL_BYTES = 1 << 28  # some ten terabytes of weights
_KEYS = {"version", "algorithm", "piece_bytes", "config", "shards"}
_SHARD_KEYS = {"name", "size", "header", "pieces"}
_AGAIN = "Seal it again: coldframe seal MODEL."
GOOD_COPY = (
    "Write the file there again from a good copy; if it was changed on purpose, seal the model"
    " again."
)


def sha256(data: bytes | bytearray | memoryview) -> str:
    """What a seal says of configs and headers, in hexadecimal."""
    import hashlib  # a few milliseconds, which a load without a seal need not spend

    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class SealedShard:
    """What one file should be.

    Attributes:
        name: Its file name.
        size: Bytes in it.
        header: SHA-256 of all that is before the data, in hexadecimal.
        pieces: 16 bytes of XXH3 for each of its pieces, in their order.
    """

    name: str
    size: int
    header: str
    pieces: bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """What a checkpoint should be, to the last bit.

    Attributes:
        config: SHA-256 of `config.json`, in hexadecimal.
        shards: In the order of their names.
    """

    config: str
    shards: tuple[SealedShard, ...]

    @staticmethod
    def read(origin: Origin) -> Seal | None:
        """The seal of the checkpoint at a place, or None where there is none.

        Raises:
            CheckpointError: There is one that cannot be understood.
            SourceError: It cannot be read.
        """
        try:
            raw = origin.read_small(SEAL_NAME, _MAX_SEAL_BYTES)
        except SourceCredentials:
            raise
        except (SourceNotFound, SourceDenied):
            # S3 denies what is not there to those who may not list what is.
            return None
        return Seal.parse(raw, where=origin.uri_of(SEAL_NAME))

    @staticmethod
    def parse(raw: bytes, *, where: str) -> Seal:
        """Reads a seal, strictly.

        Args:
            raw: The document.
            where: Its file, for the error.

        Raises:
            CheckpointError: It is damaged, or of another version.
        """
        document = parse_object(raw, where=where, hint=_AGAIN)
        version = document.get("version")
        if type(version) is not int or version != VERSION:
            raise CheckpointError(
                "the seal is of another version",
                where=where,
                expected=VERSION,
                got=describe(version),
                hint=_AGAIN,
            )
        how = (document.get("algorithm"), document.get("piece_bytes"))
        if how != (ALGORITHM, PIECE_BYTES):
            raise CheckpointError(
                "the seal's hashes are not of the kind that this version knows",
                where=where,
                expected=f"{ALGORITHM} of pieces of {PIECE_BYTES} bytes",
                got=f"{describe(how[0])} of pieces of {describe(how[1])} bytes",
                hint=_AGAIN,
            )
        shards = document.get("shards")
        if document.keys() != _KEYS or not isinstance(shards, list) or not shards:
            raise _malformed(where, "its keys, or its list of shards")
        found = tuple(_parse_shard(entry, where) for entry in shards)
        names = [shard.name for shard in found]
        if names != sorted(set(names)):
            raise _malformed(where, "the order of its shards")
        return Seal(_sha256(document["config"], where, "config"), found)

    def encode(self) -> bytes:
        """The document that `parse` reads."""
        document = {
            "version": VERSION,
            "algorithm": ALGORITHM,
            "piece_bytes": PIECE_BYTES,
            "config": self.config,
            "shards": [
                {
                    "name": shard.name,
                    "size": shard.size,
                    "header": shard.header,
                    "pieces": binascii.b2a_base64(shard.pieces, newline=False).decode(),
                }
                for shard in self.shards
            ],
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, in hexadecimal: one name for exactly these weights."""
        return sha256(self.encode())

    def write(self, directory: str) -> str:
        """Puts it into a model's directory: whole, or not at all.

        Returns:
            Its path.

        Raises:
            PlatformError: It cannot be written.
        """
        path = os.path.join(directory, SEAL_NAME)
        try:
            write_whole(path, self.encode(), 0o666)
        except OSError as error:
            raise PlatformError(
                "the seal cannot be written",
                where=path,
                got=error.strerror,
                hint="Seal the model where this user may write to its directory, and copy both.",
            ) from error
        return path

    def check_config(self, raw: bytes, *, where: str) -> None:
        """Holds `config.json` against the seal.

        Raises:
            SourceCorrupt: It is another one.
        """
        _check(raw, self.config, "the config is not the one that was sealed", where)

    def check_header(self, name: str, raw: bytes | bytearray | memoryview, *, where: str) -> None:
        """Holds what is before a shard's data against the seal.

        Args:
            name: The shard's file name.
            raw: The header with the 8 bytes before it.
            where: The file, for the error.

        Raises:
            SourceCorrupt: It is another one.
            CheckpointError: The seal does not name such a shard.
        """
        for shard in self.shards:
            if shard.name == name:
                _check(raw, shard.header, "a header is not the one that was sealed", where)
                return
        raise _outdated(where, "no such shard", name)

    def pieces_of(self, checkpoint: Checkpoint) -> tuple[Pieces, ...]:
        """What the pieces of each of its shards should hash to.

        Raises:
            CheckpointError: The seal is of another checkpoint, by names and sizes.
        """
        sealed = [shard.name for shard in self.shards]
        there = [shard.name for shard in checkpoint.shards]
        for name in sorted({*sealed} ^ {*there}):
            now, then = ("no such shard", name) if name in sealed else (name, "no such shard")
            raise _outdated(checkpoint.path, then, now)
        found = []
        for shard, cuts, promised in zip(
            checkpoint.shards, cuts_of_shards(checkpoint), self.shards, strict=True
        ):
            if promised.size != shard.size:
                raise _outdated(shard.uri, f"{promised.size} bytes", f"{shard.size} bytes")
            count = len(promised.pieces) // DIGEST_BYTES
            if count != len(cuts) - 1:
                raise _outdated(shard.uri, f"{count} pieces", f"{len(cuts) - 1} pieces")
            found.append(Pieces(cuts, promised.pieces))
        return tuple(found)


def _check(raw: bytes | bytearray | memoryview, expected: str, what: str, where: str) -> None:
    got = sha256(raw)
    if got != expected:
        raise SourceCorrupt(
            what, where=where, expected=f"SHA-256 {expected}", got=got, hint=GOOD_COPY
        )


def _parse_shard(entry: Any, where: str) -> SealedShard:
    if not isinstance(entry, dict) or entry.keys() != _SHARD_KEYS:
        raise _malformed(where, "a shard's keys")
    name, size, pieces = entry["name"], entry["size"], entry["pieces"]
    if not isinstance(name, str) or type(size) is not int or size < 0:
        raise _malformed(where, f"name or size of shard {describe(name)}")
    header = _sha256(entry["header"], where, f"the header of {name}")
    try:
        digests = binascii.a2b_base64(pieces, strict_mode=True)
    except (TypeError, ValueError):
        raise _malformed(where, f"the pieces of {name}") from None
    if len(digests) % DIGEST_BYTES:
        raise _malformed(where, f"the pieces of {name}")
    return SealedShard(name, size, header, digests)


def _sha256(value: object, where: str, what: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise _malformed(where, what)
    return value


def _malformed(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        "the seal is malformed", where=where, got=f"a fault in {what}", hint=_AGAIN
    )


def _outdated(where: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        "the model was sealed before it was changed",
        where=where,
        expected=expected,
        got=got,
        hint=f"{_AGAIN} If nobody changed it on purpose, download or copy it again.",
    )
