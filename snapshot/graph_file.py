"""An archive of captured graphs as bytes: versioned, small, and vouched for by one hash of it all.

    8 bytes   magic
    4 bytes   version
    32 bytes  SHA-256 of all that follows
    4 bytes   length of the fingerprint
              the fingerprint, JSON
              the rest, deflated: 4 bytes, the length of a JSON object, that object, and what it
              gives the lengths of

Numbers are little-endian. Nothing is believed before the hash is right, and nothing is inflated
before the fingerprint fits. What is then inside is what this version has written.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coldframe.loader.errors import ImageDamaged, NoImage, SnapshotError
from coldframe.snapshot.fields import parse
from coldframe.snapshot.graph_fingerprint import GraphFingerprint
from coldframe.snapshot.graph_kernels import KernelIdentity
from coldframe.snapshot.graph_nodes import NODE, WORD, Copy, Fill, GraphNodes, Place, Region
from coldframe.snapshot.graph_reading import Attributes, Settings

__all__ = ["GraphArchive", "VERSION", "check", "decode", "encode"]

VERSION = 1

_MAGIC = b"CFGRAPHS"
_HEAD = struct.Struct("<8sI32s")
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 30
_LEVEL = 1
_AGAIN = "Remove it; the graphs are captured and written again."


@dataclass(frozen=True, slots=True)
class GraphArchive:
    """Captured graphs in a form that holds in another process.

    Attributes:
        fingerprint: What they take for granted.
        regions: The memory that pointers lead into, at the addresses that it had.
        kernels: What each kernel is known by, and what was set of it.
        attributes: The different attributes of nodes.
        graphs: By key, such as `8x16`.
        refused: By key, why a graph is not among them.
        images: Cubins, fatbins or PTX that kernels come from, beside those that libraries bring.
        notes: Numbers that whoever has saved them wants back.
    """

    fingerprint: GraphFingerprint
    regions: tuple[Region, ...]
    kernels: tuple[tuple[KernelIdentity, Settings], ...]
    attributes: tuple[Attributes, ...]
    graphs: Mapping[str, GraphNodes]
    refused: Mapping[str, str] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


def encode(archive: GraphArchive) -> bytes:
    """The archive as bytes."""
    parts: list[bytes] = []
    about = {
        "regions": [list(region) for region in archive.regions],
        "kernels": [[*identity, settings] for identity, settings in archive.kernels],
        "attributes": [
            [[name, value.hex()] for name, value in attributes] for attributes in archive.attributes
        ],
        "graphs": {key: _described(graph, parts) for key, graph in archive.graphs.items()},
        "refused": dict(archive.refused),
        "images": [len(image) for image in archive.images],
        "notes": dict(archive.notes),
    }
    parts += archive.images
    head, fingerprint = _json(about), _json(archive.fingerprint.to_json())
    body = b"".join((_LENGTH.pack(len(head)), head, *parts))
    rest = b"".join((_LENGTH.pack(len(fingerprint)), fingerprint, zlib.compress(body, _LEVEL)))
    return _HEAD.pack(_MAGIC, VERSION, hashlib.sha256(rest).digest()) + rest


def check(raw: bytes, where: str) -> memoryview:
    """That bytes are those of an archive as it was written.

    Args:
        raw: They.
        where: The file that they are from, for errors.

    Returns:
        What its hash vouches for.

    Raises:
        ImageDamaged: They are not what was written.
        NoImage: It is of another version.
    """
    if len(raw) < _HEAD.size:
        raise _damaged(where, f"{len(raw)} bytes", f"at least {_HEAD.size} bytes")
    magic, version, digest = _HEAD.unpack_from(raw)
    if magic != _MAGIC:
        raise _damaged(where, repr(magic), repr(_MAGIC))
    if version != VERSION:
        raise NoImage(
            "the archive of graphs is of another version",
            where=where,
            expected=VERSION,
            got=version,
            hint=_AGAIN,
        )
    rest = memoryview(raw)[_HEAD.size :]
    found = hashlib.sha256(rest).digest()
    if found != digest:
        raise _damaged(where, f"sha256 {found.hex()[:16]}", f"sha256 {digest.hex()[:16]}")
    return rest


def decode(raw: bytes, where: str, here: GraphFingerprint | None = None) -> GraphArchive:
    """The archive that was written as bytes.

    Args:
        raw: They.
        where: The file that they are from, for errors.
        here: What there is here; None asks for nothing.

    Raises:
        ImageDamaged: They are not what was written.
        NoImage: It is of another version, or was captured with something else; the error names it.
        SnapshotError: A field of it is wrong.
    """
    rest = check(raw, where)
    try:
        return _decoded(rest, where, here)
    except (zlib.error, struct.error, ValueError, TypeError, KeyError, IndexError) as error:
        # Nobody changed it since it was written: then whoever wrote it was not this version.
        raise _damaged(where, error, f"what version {VERSION} writes") from error


def _decoded(rest: memoryview, where: str, here: GraphFingerprint | None) -> GraphArchive:
    (length,) = _LENGTH.unpack_from(rest)
    start = _LENGTH.size + length
    fingerprint = GraphFingerprint.from_json(parse(bytes(rest[_LENGTH.size : start]), where))
    if here is not None and (refusal := fingerprint.refusal(here)) is not None:
        raise NoImage(
            f"the graphs were captured with another {refusal.field}",
            where=where,
            expected=refusal.expected,
            got=refusal.got,
            hint="Nothing is lost: they are captured again, and written in its place.",
        )
    unpacker = zlib.decompressobj()
    body = memoryview(unpacker.decompress(rest[start:], _MOST_BYTES))
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("its end is missing")
    (length,) = _LENGTH.unpack_from(body)
    about = json.loads(bytes(body[_LENGTH.size : _LENGTH.size + length]))
    parts = _Parts(body[_LENGTH.size + length :])
    archive = GraphArchive(
        fingerprint,
        tuple(Region(*region) for region in about["regions"]),
        tuple(_kernel(kernel) for kernel in about["kernels"]),
        tuple(
            tuple((name, bytes.fromhex(value)) for name, value in attributes)
            for attributes in about["attributes"]
        ),
        {key: _graph(graph, parts) for key, graph in about["graphs"].items()},
        about["refused"],
        tuple(parts.take(length) for length in about["images"]),
        about["notes"],
    )
    parts.end()
    return archive


class _Parts:
    """What lies one behind the other."""

    def __init__(self, body: memoryview) -> None:
        self._body = body

    def take(self, length: int) -> bytes:
        if not 0 <= length <= len(self._body):
            raise ValueError(f"{length} bytes where {len(self._body)} are left")
        taken, self._body = bytes(self._body[:length]), self._body[length:]
        return taken

    def end(self) -> None:
        if self._body:
            raise ValueError(f"{len(self._body)} bytes more than it has")


def _described(graph: GraphNodes, parts: list[bytes]) -> dict[str, Any]:
    """What a graph is put together from again; the rest of it goes behind the other parts."""
    parts += [
        graph.nodes,
        graph.sources.tobytes(),
        graph.targets.tobytes(),
        graph.ports,
        graph.words,
        graph.kinds,
    ]
    return {
        "nodes": graph.count,
        "edges": len(graph.sources),
        "words": len(graph.kinds),
        "ports": bool(graph.ports),
        "fills": {n: list(o) for n, o in enumerate(graph.operations) if isinstance(o, Fill)},
        "copies": {n: list(o) for n, o in enumerate(graph.operations) if isinstance(o, Copy)},
        "fixed": graph.fixed,
    }


def _graph(about: dict[str, Any], parts: _Parts) -> GraphNodes:
    nodes = parts.take(about["nodes"] * NODE.size)
    sources, targets = (array("I", parts.take(about["edges"] * 4)) for _ in range(2))
    ports = parts.take(about["edges"] * 3 * about["ports"])
    words, kinds = parts.take(about["words"] * WORD), parts.take(about["words"])
    operations: dict[int, Fill | Copy] = {}
    for number, (target, *numbers) in about["fills"].items():
        operations[int(number)] = Fill(Place(*target), *numbers)
    for number, (source, target, numbers) in about["copies"].items():
        operations[int(number)] = Copy(Place(*source), Place(*target), tuple(numbers))
    if max((*sources, *targets), default=-1) >= about["nodes"]:
        raise ValueError("an edge leads nowhere")
    return GraphNodes(
        nodes,
        sources,
        targets,
        ports,
        tuple(operations[number] for number in range(len(operations))),
        words,
        kinds,
        about["fixed"],
    )


def _kernel(value: list[Any]) -> tuple[KernelIdentity, Settings]:
    name, owner, layout, needs, settings = value
    identity = KernelIdentity(name, owner, _pairs(layout), _pairs(needs))
    return identity, _pairs(settings)


def _pairs(value: list[Any]) -> tuple[tuple[Any, Any], ...]:
    return tuple((first, second) for first, second in value)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _damaged(where: str, got: object, expected: str) -> SnapshotError:
    return ImageDamaged(
        "the archive of graphs is damaged", where=where, expected=expected, got=got, hint=_AGAIN
    )
