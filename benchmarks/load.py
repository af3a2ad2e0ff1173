"""`coldframe bench load MODEL`: loading alone, beside other loaders and the limits of the path.

From disk, cold runs start with the weight files evicted from the page cache, which is proven before
each; a raw O_DIRECT read of the same files is the ceiling. Over a network, nginx on loopback serves
the files from the page cache, as plain HTTP and as a bucket of S3; a raw read from sockets is the
ceiling. Runs of all loaders are interleaved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import Row, evict_files, print_rows, warm_page_cache, words
from coldframe.benchmarks.loaders import load_once
from coldframe.benchmarks.nginx import BUCKET, serve
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "evict", "run"]

_PEERS = {
    "disk": ("safetensors", "runai", "runai io_uring", "fastsafetensors"),
    "http": (),
    "s3": ("runai s3",),
}
_S3 = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--over", default="disk", help="paths to it, of disk, http, s3 (disk)")
    # Without a twin in the environment: COLDFRAME_CACHE is a directory.
    parser.add_argument(
        "--cache", default="cold,warm", help="states of the page cache, of cold, warm (cold,warm)"
    )
    parser.flag(
        "--against",
        default="safetensors",
        help="other loaders, of safetensors, runai, runai io_uring, fastsafetensors, runai s3; "
        "those that are not installed are left out",
    )
    parser.flag("--runs", type=int, default=5, help="runs of each cell (5)")
    parser.flag(
        "--peer-python", default=sys.executable, help="the interpreter that has the other loaders"
    )
    parser.flag("--json", action="store_true", help="print the JSON document alone")


@dataclass(frozen=True, slots=True)
class _Cell:
    """One way to the weights, and who goes it.

    Attributes:
        name: For the table.
        where: Each loader's place by its name.
        prepare: `cold` or `warm`: what the page cache must be before each run.
        ceiling: The loader that is the path's own limit, or None.
        peers: Those that are not ours.
        environment: What all of them find in theirs.
    """

    name: str
    where: dict[str, str]
    prepare: str
    ceiling: str | None
    peers: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        RequestError: There is no such path, loader or state of the page cache.
        PlatformError: One of our own loads failed, or a file cannot be evicted.
    """
    against = words(args.against, {peer for peers in _PEERS.values() for peer in peers})
    paths, caches = words(args.over, set(_PEERS)), words(args.cache, {"cold", "warm"})
    if not args.model.is_dir():
        raise RequestError(
            "there is no such directory",
            where="MODEL",
            got=args.model,
            hint="Give a local checkpoint's directory; --over serves it in other ways.",
        )
    if args.runs < 1:
        raise RequestError("there must be a run", where="--runs", got=args.runs)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    with _sealed(args.model) as sealed:
        for path in paths:
            with _cells(path, args.model, sealed, against, caches) as cells:
                for cell in cells:
                    results = _measure(cell, args, left_out)
                    rows += _rows(cell, results)
    print_rows(rows, {"model": str(args.model), "left_out": left_out}, table=not args.json)
    return 0


@contextmanager
def _sealed(model: Path) -> Iterator[Path]:
    """The same model sealed: a directory of links, and a seal."""
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as directory:
        for path in model.iterdir():
            if path.is_file() and path.name != "coldframe.seal.json":
                Path(directory, path.name).symlink_to(path.resolve())
        origin = DirectoryOrigin(directory)
        checkpoint = Checkpoint.open(origin)
        source = origin.open_source(checkpoint.shards)
        try:
            seal_checkpoint(checkpoint, origin, source).write(directory)
        finally:
            source.close()
        yield Path(directory)


@contextmanager
def _cells(
    path: str, model: Path, sealed: Path, against: list[str], caches: list[str]
) -> Iterator[list[_Cell]]:
    peers = [name for name in against if name in _PEERS[path]]
    if path == "disk":
        cells = []
        for cache in caches:
            ceiling = "raw O_DIRECT" if cache == "cold" else None
            names = ["coldframe", "coldframe --copy", *peers, *([ceiling] if ceiling else [])]
            where = {**dict.fromkeys(names, str(model)), "coldframe sealed": str(sealed)}
            cells.append(_Cell(cache, where, cache, ceiling, peers))
        yield cells
        return
    with serve(model) as plain, serve(sealed) as with_seal:
        scheme = f"s3://{BUCKET}/model"
        tail = f"/{BUCKET}/model"
        if path == "http":
            where = dict.fromkeys(["coldframe", "coldframe at 1 GB/s", "raw sockets"], plain + tail)
            where |= dict.fromkeys(
                ["coldframe sealed", "coldframe sealed at 1 GB/s"], with_seal + tail
            )
            yield [_Cell(path, where, "warm", "raw sockets", [])]
        else:
            where = dict.fromkeys(["coldframe", *peers], scheme)
            yield [
                _Cell(path, where, "warm", None, peers, {**_S3, "AWS_ENDPOINT_URL": plain}),
            ]


def _measure(
    cell: _Cell, args: argparse.Namespace, left_out: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Each loader's runs, one of each after the other."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in cell.where}
    for number in range(args.runs):
        print(f"{cell.name}, run {number + 1} of {args.runs}", file=sys.stderr)
        for name in list(results):
            (evict if cell.prepare == "cold" else warm_page_cache)(args.model)
            python = args.peer_python if name in cell.peers else sys.executable
            try:
                results[name].append(load_once(name, cell.where[name], python, cell.environment))
            except PlatformError as error:
                if name not in cell.peers:
                    raise
                left_out[name] = str(error)
                del results[name]
    return results


def evict(model: Path) -> None:
    """Drops the weight files from the page cache, and proves it.

    Raises:
        PlatformError: Some of it stays: somebody else has it mapped, or it is a tmpfs.
    """
    evict_files(sorted(model.glob("*.safetensors")))


def _rows(cell: _Cell, results: dict[str, list[dict[str, Any]]]) -> list[Row]:
    rows = []
    for name, runs in results.items():
        rate = [run["bytes"] / run["seconds"] / 1e9 for run in runs]
        rows.append(Row(f"{cell.name}: {name}", rate, "GB/s"))
        rows.append(Row("  CPU time", [r["cpu_s"] / r["bytes"] * 1e9 for r in runs], "s/GB"))
        rows.append(Row("  peak memory", [run["peak"] / 1e6 for run in runs], "MB"))
        if "late" in runs[0] and name == "coldframe":
            rows.append(Row("  beside the arena", [r["beside"] / 1e6 for r in runs], "MB", 256))
        # What is mapped is there as a whole; over loopback at full speed it is all over before
        # the connections have found their pace.
        if name == "coldframe at 1 GB/s" or (name == "coldframe" and cell.name != "warm"):
            late = [run["late"] for run in runs]
            most = 0.03 if name != "coldframe" or cell.name == "cold" else None
            rows.append(Row("  first stage: time - share of bytes", late, "of 1", most))
    ours = results["coldframe"]
    copied = results.get("coldframe --copy", ours)
    mapped = cell.name == "warm"
    for name in cell.peers:
        if name in results:
            limit = 0.6 if mapped else 1.0
            rows.append(_ratio(f"{cell.name}: our time / {name}", ours, results[name], limit))
            if cell.name == "s3":
                rows.append(_ratio("s3: our CPU / runai s3", ours, results[name], 1.0, "cpu_s"))
    if mapped and "runai" in results:
        rows.append(_ratio("warm: our copy / runai", copied, results["runai"], 1.0))
    if cell.ceiling is not None:
        name = f"{cell.name}: {cell.ceiling}'s time / ours"
        best = min((ours, copied), key=lambda runs: sum(run["seconds"] for run in runs))
        # On loopback the server takes the same cores, so there is no telling what a link would do.
        least = 0.9 if cell.name == "cold" else None
        rows.append(_ratio(name, results[cell.ceiling], best, least, at_least=True))
    if "coldframe sealed" in results:
        name = f"{cell.name}: time sealed / unsealed"
        most = 1.05 if cell.name == "cold" else None
        rows.append(_ratio(name, results["coldframe sealed"], copied, most))
    if "coldframe sealed at 1 GB/s" in results:
        name = f"{cell.name} at 1 GB/s: time sealed / unsealed"
        sealed = results["coldframe sealed at 1 GB/s"]
        rows.append(_ratio(name, sealed, results["coldframe at 1 GB/s"], 1.05))
    return rows


def _ratio(
    name: str,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    target: float | None,
    what: str = "seconds",
    *,
    at_least: bool = False,
) -> Row:
    values = [a[what] / b[what] for a, b in zip(ours, theirs, strict=True)]
    return Row(name, values, "ratio", target, at_least)
