"""`coldframe bench load MODEL`: loading alone, beside other loaders and the disk's own limit.

Cold runs start with the weight files evicted from the page cache, which is proven before each; a
raw O_DIRECT read of the same files is the ceiling. Runs of all loaders are interleaved.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.loaders import load_once
from coldframe.loader.errors import PlatformError
from coldframe.loader.residency import cached_bytes
from coldframe.runtime.flags import Parser

__all__ = ["add_arguments", "evict", "run"]

_OURS = ("coldframe", "coldframe --copy")
_PEERS = ("safetensors", "runai", "runai io_uring", "fastsafetensors")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--cache", default="cold,warm", help="states of the page cache (cold,warm)")
    parser.flag(
        "--against",
        default="safetensors",
        help=f"other loaders, of {', '.join(_PEERS)}; those that are not installed are left out",
    )
    parser.flag("--runs", type=int, default=5, help="runs of each cell (5)")
    parser.flag(
        "--peer-python", default=sys.executable, help="the interpreter that has the other loaders"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        PlatformError: One of our own loads failed, or a file cannot be evicted.
    """
    peers = [name for name in args.against.split(",") if name]
    unknown = [name for name in peers if name not in _PEERS]
    caches = args.cache.split(",")
    if unknown or set(caches) - {"cold", "warm"}:
        raise PlatformError(
            "no such loader or state of the page cache",
            where="--against, --cache",
            expected=f"{', '.join(_PEERS)}; cold, warm",
            got=", ".join(unknown or caches),
        )
    rows, skipped = [], {}
    for cache in caches:
        names = [*_OURS, *(["raw O_DIRECT"] if cache == "cold" else []), *peers]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(args.runs):
            print(f"{cache}, run {number + 1} of {args.runs}", file=sys.stderr)
            for name in list(results):
                (evict if cache == "cold" else warm_page_cache)(args.model)
                try:
                    python = args.peer_python if name in peers else sys.executable
                    results[name].append(load_once(name, args.model, python))
                except PlatformError as error:
                    if name in _OURS:
                        raise
                    skipped[name] = str(error)
                    del results[name]
        rows += _rows(cache, results)
    print_rows(rows, {"model": str(args.model), "left_out": skipped})
    return 0


def evict(model: Path) -> None:
    """Drops the weight files from the page cache, and proves it.

    Raises:
        PlatformError: Some of it stays: somebody else has it mapped, or it is a tmpfs.
    """
    for file in sorted(model.glob("*.safetensors")):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            left = cached_bytes(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        if left:
            raise PlatformError(
                "a file cannot be evicted from the page cache", where=file, got=f"{left} bytes left"
            )


def _rows(cache: str, results: dict[str, list[dict[str, float]]]) -> list[Row]:
    rows = []
    for name, runs in results.items():
        rate = [run["bytes"] / run["seconds"] / 1e9 for run in runs]
        rows.append(Row(f"{cache}: {name}", rate, "GB/s"))
        per_gb = [run["cpu_s"] / (run["bytes"] / 1e9) for run in runs]
        rows.append(Row("  CPU time", per_gb, "s/GB"))
        rows.append(Row("  peak memory", [run["peak"] / 1e6 for run in runs], "MB"))
    ours = results["coldframe"]
    for name, runs in results.items():
        if name not in _OURS:
            ratio = [a["seconds"] / b["seconds"] for a, b in zip(ours, runs, strict=True)]
            rows.append(Row(f"{cache}: our time / {name}", ratio, "ratio"))
    return rows
