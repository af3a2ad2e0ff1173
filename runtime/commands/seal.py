"""`coldframe seal`: what a model's bytes are now, kept beside it for every load to check them.

It is against faults, not against attackers: see `loader.checkpoints.seal`.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from coldframe.loader.checkpoints.pieces import ALGORITHM, Pieces
from coldframe.loader.checkpoints.seal import SEAL_NAME, Seal
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.errors import RequestError, SourceNotFound
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from coldframe.loader.sources.location import Directory, Hub, parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.commands.progress import ProgressBar
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["Counter", "add_arguments", "local_directory", "run"]

_MOSTLY = 0.9
"""What has less than this share in the page cache is read faster past it."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory")
    parser.flag("--check", action="store_true", help="hold the model against the seal that it has")
    parser.flag("--json", action="store_true", help="print one JSON document")
    parser.epilog = (
        f"Writes {SEAL_NAME} into the directory: a hash for every piece of the weights, at most "
        "1 MiB each. Loads check all that they read against it. It finds faults of disks, memory "
        "and networks, and files that were mixed up; it does not stop an attacker, who could seal "
        "what they changed."
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if the model does not match its seal.

    Raises:
        ColdframeError: The model cannot be read, or the seal not be written.
    """
    started = time.monotonic()
    origin = DirectoryOrigin(local_directory(args.model))
    checkpoint = Checkpoint.open(origin, sealed=False)
    before = _existing(origin) if args.check else None
    if before is not None:
        before.pieces_of(checkpoint)  # raises for another checkpoint, before all is read
    total = sum(shard.size - shard.data_offset for shard in checkpoint.shards)
    found = _seal(checkpoint, origin, total)
    document: dict[str, Any] = {
        "model": args.model,
        "seal": origin.uri_of(SEAL_NAME),
        "digest": found.digest,
        "algorithm": ALGORITHM,
        "bytes": total,
    }
    if before is None:
        found.write(origin.path)
    else:
        document["bad"] = bad = list(_differences(before, found, checkpoint))
        document["ok"] = not bad
    document["seconds"] = time.monotonic() - started
    print(json.dumps(document) if args.json else _text(document))
    return 0 if document.get("ok", True) else 1


def local_directory(model: str) -> str:
    """The directory of a MODEL that is on this machine.

    Raises:
        RequestError: It is on another one, or is nothing that could be a model.
        SourceError: It is the id of a model that is not in the local cache.
    """
    location = parse_location(model)
    if isinstance(location, Directory):
        return location.path
    path = open_origin(location).path if isinstance(location, Hub) else None
    if path is None:
        raise RequestError(
            "the model is not on this machine",
            where=location.uri,
            expected="a directory",
            hint="Download it first, and give the directory.",
        )
    return path


@dataclass(slots=True)
class Counter:
    """Bytes done, for a progress bar."""

    total: int
    done: int = 0

    @property
    def progress(self) -> tuple[int, int]:
        return self.done, self.total


def _existing(origin: DirectoryOrigin) -> Seal:
    seal = Seal.read(origin)
    if seal is None:
        raise SourceNotFound(
            "the model has no seal",
            where=origin.uri_of(SEAL_NAME),
            hint="Seal it first: coldframe seal MODEL.",
        )
    return seal


def _seal(checkpoint: Checkpoint, origin: DirectoryOrigin, total: int) -> Seal:
    bar, counter = ProgressBar(), Counter(total)

    def progress(done: int) -> None:
        counter.done = done
        bar.update(counter)

    source = FileSource(checkpoint.shards)
    try:
        if source.cached_bytes() < _MOSTLY * total:
            source.use_direct()
        return seal_checkpoint(checkpoint, origin, source, progress)
    finally:
        source.close()
        bar.clear()


def _differences(sealed: Seal, found: Seal, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """What is not as it was sealed: a config or a header, or tensors and their byte ranges."""
    if found.config != sealed.config:
        yield {"file": CONFIG_NAME, "tensor": None, "ranges": []}
    shards = zip(sealed.shards, sealed.pieces_of(checkpoint), found.shards, strict=True)
    for index, (before, promised, after) in enumerate(shards):
        if before.header != after.header:
            yield {"file": before.name, "tensor": None, "ranges": [[0, promised.cuts[0]]]}
        there = Pieces(promised.cuts, after.pieces)
        tensors = [t for t in checkpoint.tensors.values() if t.shard == index and t.nbytes]
        starts = [tensor.offset for tensor in tensors]
        bad: dict[str, list[list[int]]] = {}
        for piece in range(len(promised)):
            if there.digest(piece) == promised.digest(piece):
                continue
            start, stop = promised.cuts[piece], promised.cuts[piece + 1]
            ranges = bad.setdefault(tensors[bisect_right(starts, start) - 1].name, [])
            if ranges and ranges[-1][1] == start:
                ranges[-1][1] = stop
            else:
                ranges.append([start, stop])
        for name, ranges in bad.items():
            yield {"file": before.name, "tensor": name, "ranges": ranges}


def _text(document: dict[str, Any]) -> str:
    speed = human_bytes(document["bytes"] / document["seconds"])
    how = f"{human_bytes(document['bytes'])} in {human_seconds(document['seconds'])}, {speed}/s"
    if "ok" not in document:
        return f"{document['seal']}: written, digest {document['digest'][:12]} ({how})"
    if document["ok"]:
        return f"{document['model']}: as it was sealed, digest {document['digest'][:12]} ({how})"
    lines = [f"{document['model']}: not as it was sealed ({how})"]
    for entry in document["bad"]:
        tensor = "" if entry["tensor"] is None else f", tensor {entry['tensor']}"
        ranges = "".join(f", bytes {start} to {stop}" for start, stop in entry["ranges"])
        lines.append(f"  {entry['file']}{tensor}{ranges}")
    return "\n".join(lines)
