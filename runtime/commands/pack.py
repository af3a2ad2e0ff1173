"""`coldframe pack`: the same checkpoint, written anew so that it loads as fast as it can.

Names, dtypes, shapes and values stay as they are, and any program that reads safetensors reads
the result. What comes out is sealed.

The directory appears whole or not at all: everything is written beside it and renamed.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from coldframe.loader.checkpoints.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from coldframe.loader.checkpoints.seal import SEAL_NAME, Seal, SealedShard, sha256
from coldframe.loader.checkpoints.sealing import read_header
from coldframe.loader.checkpoints.verify import VerifiedSource
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.loader.files import open_regular, source_error
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.file import FileSource
from coldframe.runtime.checkpoints.packing import (
    DATA_ALIGNMENT,
    deal,
    file_names,
    merged_metadata,
    write_shard,
)
from coldframe.runtime.commands.progress import ProgressBar
from coldframe.runtime.commands.seal import Counter, local_directory
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.units import byte_count, human_bytes, human_seconds

__all__ = ["add_arguments", "pack", "run"]

_SHARD_SIZE = 5 * 10**9


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint's directory")
    parser.add_argument("target", metavar="DST", help="a directory that is empty or not there")
    parser.flag(
        "--shard-size",
        type=byte_count,
        default=_SHARD_SIZE,
        help="bytes of tensors in a file at most (5GB)",
    )
    parser.flag("--json", action="store_true", help="print one JSON document")
    parser.epilog = (
        "Weights come in the order of their load, the data on a page, and all tensors but those of "
        "odd size, which come last, on a cache line. Other files are copied as they are; other "
        "safetensors files and subdirectories are left out."
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ColdframeError: SRC is not sound, or DST cannot be written.
    """
    started = time.monotonic()
    source = Path(local_directory(args.source))
    with _terminable():
        document = pack(source, Path(args.target), args.shard_size)
    document["seconds"] = time.monotonic() - started
    print(json.dumps(document) if args.json else _text(document))
    return 0


def pack(source: Path, target: Path, shard_size: int = _SHARD_SIZE) -> dict[str, Any]:
    """Writes a packed copy of a checkpoint.

    Args:
        source: The checkpoint's directory. Where it has a seal, what is read is checked.
        target: Where the copy goes: nothing is there yet, or an empty directory.
        shard_size: Bytes of tensors in a file at most; a larger tensor has a file of its own.

    Returns:
        What was done, as JSON values.

    Raises:
        RequestError: Something is in the target already.
        PlatformError: The disk is full, or the target cannot be written.
        CheckpointError: The source is not sound.
        SourceError: The source cannot be read, or does not match its seal.
    """
    target = Path(os.path.realpath(target))
    fresh = target.parent / f".{target.name}.{os.getpid()}.new"
    checkpoint = Checkpoint.open(source)
    others = _other_files(source, checkpoint)
    weights = sum(shard.size for shard in checkpoint.shards)
    try:
        _check_vacant(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent, weights + others.nbytes)
        fresh.mkdir()
        document = _write(checkpoint, source, others, fresh, shard_size)
        _sync(fresh)
        fresh.rename(target)  # over an empty directory, too
        _sync(target.parent)
    except OSError as error:
        raise _platform_error(error, target, weights + others.nbytes) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return {"source": str(source), "target": str(target), **document}


class _Others(NamedTuple):
    """What is beside the weights: files to be copied, and what is left out."""

    names: list[str]
    left_out: list[str]
    nbytes: int


def _other_files(source: Path, checkpoint: Checkpoint) -> _Others:
    replaced = {SEAL_NAME, INDEX_NAME, *(shard.name for shard in checkpoint.shards)}
    names, left_out, nbytes = [], [], 0
    try:
        paths = sorted(source.iterdir())
    except OSError as error:
        raise source_error(error, str(source), "Check the directory.") from None
    for path in paths:
        if path.name in replaced:
            continue
        # Weights that the index does not name: a second copy, or what an older save has left.
        weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if weights or not path.is_file():  # of a link, what it points to
            left_out.append(path.name)
        else:
            names.append(path.name)
            nbytes += path.stat().st_size
    return _Others(names, left_out, nbytes)


def _write(
    checkpoint: Checkpoint, source: Path, others: _Others, fresh: Path, shard_size: int
) -> dict[str, Any]:
    for name in others.names:
        fd, _ = open_regular(str(source / name))
        with os.fdopen(fd, "rb") as original:
            _write_file(fresh / name, original)
    config = (fresh / CONFIG_NAME).read_bytes()

    # What is checked here was read again since the checkpoint was opened.
    seal = checkpoint.seal
    if seal is not None:
        seal.check_config(config, where=str(source / CONFIG_NAME))
    file_source = FileSource(checkpoint.shards)
    try:
        headers = []
        for index, shard in enumerate(checkpoint.shards):
            header = read_header(file_source, index, shard.data_offset)
            if seal is not None:
                seal.check_header(shard.name, header, where=shard.uri)
            headers.append((shard.uri, header))
        reader = VerifiedSource(file_source, seal, checkpoint) if seal else file_source
        shards = _write_weights(checkpoint, reader, merged_metadata(headers), fresh, shard_size)
        reader.finish()
    finally:
        file_source.close()
    packed = Seal(sha256(config), tuple(shards))
    packed.write(str(fresh))
    return {
        "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        "files": [{"name": shard.name, "bytes": shard.size} for shard in shards],
        "copied": others.names,
        "left_out": others.left_out,
        "digest": packed.digest,
        "verified": seal is not None,
    }


def _write_weights(
    checkpoint: Checkpoint, source: Source, metadata: dict[str, str], fresh: Path, shard_size: int
) -> list[SealedShard]:
    files = deal(checkpoint, shard_size)
    names = file_names(len(files))
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    bar, counter = ProgressBar(), Counter(total)

    def progress(nbytes: int) -> None:
        counter.done += nbytes
        bar.update(counter)

    try:
        shards = [
            write_shard(fresh / name, tensors, source, metadata, progress)
            for name, tensors in zip(names, files, strict=True)
        ]
    finally:
        bar.clear()
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor.name: name
                for name, tensors in zip(names, files, strict=True)
                for tensor in tensors
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        _write_file(fresh / INDEX_NAME, io.BytesIO(text.encode()))
    return shards


def _write_file(path: Path, content: BinaryIO) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes a polite request to end leave nothing behind, as Ctrl-C does."""

    def terminate(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_vacant(target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(
            "there is something in place of the packed model already",
            where=target,
            expected="nothing, or an empty directory",
            hint="Name another directory, or remove this one yourself.",
        )


def _check_space(parent: Path, nbytes: int) -> None:
    if shutil.disk_usage(parent).free < nbytes + DATA_ALIGNMENT:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _platform_error(error: OSError, target: Path, nbytes: int) -> PlatformError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PlatformError(
            "there is not enough disk space for the packed model",
            where=target.parent,
            expected=f"{nbytes} bytes",
            got=f"{shutil.disk_usage(target.parent).free} bytes free",
            hint="Free some space, or name a directory on another disk.",
        )
    return PlatformError(
        "the packed model cannot be written",
        where=target,
        got=error.strerror or str(error),
        hint="Name a directory that this user may write to.",
    )


def _text(document: dict[str, Any]) -> str:
    files = len(document["files"])
    how = " from a sealed model" if document["verified"] else ""
    lines = [
        f"{document['target']}: {human_bytes(document['bytes'])} of weights{how} in {files} "
        f"{'file' if files == 1 else 'files'}, sealed, in {human_seconds(document['seconds'])}"
    ]
    if document["left_out"]:
        lines.append(f"left out: {', '.join(document['left_out'])}")
    return "\n".join(lines)
