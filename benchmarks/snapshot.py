"""`coldframe bench snapshot MODEL`: images of warm workers, made and restored, against limits.

What is restored is beside what starts fresh in each run, and runs of all cells are interleaved, so
that a machine whose speed drifts drifts for both sides. The image's size and how it is packed
decide the rest, so one stored as it is stands beside the one that `snapshot create` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.benchmarks.restores import Restored
from coldframe.benchmarks.snapshot_cells import CODECS, SLOW, Cells, Image, cell_name
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    # Without a twin in the environment: that one names the images that are in use.
    parser.add_argument(
        "--snapshot-store",
        metavar="DIR",
        type=Path,
        help="an empty directory for the images, on the disk to measure; they stay there (a "
        "temporary one)",
    )
    parser.flag("--runs", type=int, default=7, help="runs of each cell (7)")
    parser.flag("--clones", type=int, default=8, help="clones at once, an even number (8)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether all targets are met.

    Raises:
        RequestError: The arguments make no sense.
        ColdframeError: An image cannot be made, or a clone of it cannot be restored or does not
            answer.
    """
    _check(args)
    if sys.dont_write_bytecode:
        print("no bytecode is kept: each process compiles all that it imports", file=sys.stderr)
    left_out: dict[str, str] = {}
    with _store(args.snapshot_store) as store:
        images = {codec: Image.create(args.model, store, codec) for codec in CODECS}
        cells = Cells(args.model, images, args.clones, left_out)
        for number in range(args.runs):
            print(f"run {number + 1} of {args.runs}", file=sys.stderr)
            cells.run()
    rows = [*_image_rows(cells), *_restore_rows(cells), *_disk_rows(cells), *_start_rows(cells)]
    rows += _many_rows(cells)
    more = {
        "model": str(args.model),
        "runs": args.runs,
        "left_out": left_out,
        "bytecode": not sys.dont_write_bytecode,
    }
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _check(args: argparse.Namespace) -> None:
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.runs < 1:
        raise RequestError("there must be a run", where="--runs", got=args.runs)
    if args.clones < 2 or args.clones % 2:
        raise RequestError(
            "half of the clones are for prefill, half for decode",
            where="--clones",
            expected="an even number",
            got=args.clones,
        )
    store = args.snapshot_store
    if store is not None and store.exists() and any(store.iterdir()):
        raise RequestError(
            "the directory for the images is not empty",
            where="--snapshot-store",
            got=store,
            hint="Name one that is empty or not there: its files are evicted and read.",
        )


@contextlib.contextmanager
def _store(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as directory:
        yield Path(directory)


def _image_rows(cells: Cells) -> list[Row]:
    rows = []
    for codec, image in cells.images.items():
        manifest = image.manifest
        rows += [
            Row(f"{codec}: snapshot create", [image.created_s], "s", 20.0),
            Row(f"{codec}: image", [manifest.image_bytes / 1e6], "MB", 170.0),
            Row("  in the store", [manifest.stored_bytes / 1e6], "MB"),
        ]
    return rows


def _restore_rows(cells: Cells) -> list[Row]:
    """From RAM, against the import of torch and the engine, which every fresh worker needs."""
    fresh = cells.seconds["import engine"]
    rows = [
        Row("fresh: import torch", cells.seconds["import torch"], "s"),
        Row("fresh: import torch and the engine", fresh, "s"),
        Row("fresh: as warm as the frozen one", cells.seconds["freeze point"], "s"),
    ]
    for codec in cells.images:
        for verify, most in ((False, 0.15), (True, 0.25)):
            hashed = "hashed" if verify else "not hashed"
            up = cells.restored[cell_name(codec, verify, "up")]
            executed = cells.restored[cell_name(codec, verify, "exec")]
            prepared = cells.restored[cell_name(codec, verify, "prepared")]
            # The default's is the target.
            target = most if codec == "lz4" else None
            ratio = f"{codec}, {hashed}: first instruction / import"
            rows += [
                Row(ratio, _ratios([r.total for r in up], fresh), "ratio", target),
                Row("  first instruction", [r.total for r in up], "s"),
                Row("    image found", [r.check for r in up], "s"),
                Row("    image in memory", [r.read for r in up], "s"),
                Row("    process made", [r.criu for r in up], "s"),
                Row("  restorer started too / import", _totals(executed, fresh), "ratio"),
                Row("  image in memory before / import", _totals(prepared, fresh), "ratio"),
            ]
    return rows


def _disk_rows(cells: Cells) -> list[Row]:
    """From a cold disk, against one read of the image."""
    rows = []
    for codec in cells.images:
        cold = cells.restored[f"{codec}: cold"]
        if not cold:
            continue
        total = [restored.total for restored in cold]
        read, direct = cells.seconds[f"{codec}: read"], cells.seconds[f"{codec}: read directly"]
        rows += [
            Row(f"{codec}, cold disk: first instruction", total, "s"),
            Row("  image in memory", [restored.read for restored in cold], "s"),
            Row("  read of what is stored", read, "s"),
            Row("  read of what is stored, O_DIRECT", direct, "s"),
            Row("  first instruction / read of what is stored", _ratios(total, read), "ratio"),
        ]
        if codec == "lz4" and len(cells.seconds["raw: read"]) == len(total):
            plain = _ratios(total, cells.seconds["raw: read"])
            rows.append(Row("  first instruction / read of the image", plain, "ratio", 1.2))
    return rows


def _start_rows(cells: Cells) -> list[Row]:
    """Whole cold starts, from the exec to the first token."""
    fresh, restored, slow = (cells.starts[name] for name in ("fresh", "restored", "slow"))
    rows = [
        Row("mapped: TTFT fresh", [c["ttft_s"] for c in fresh], "s"),
        Row("mapped: TTFT restored", [c["ttft_s"] for c in restored], "s"),
        Row(
            "  restored / fresh",
            [a["ttft_s"] / b["ttft_s"] for a, b in zip(restored, fresh, strict=True)],
            "ratio",
            0.45,
        ),
        Row("  until the restorer is started", [_restore(c)[0] for c in restored], "s"),
        Row("  restore, the restorer's start included", [_restore_s(c) for c in restored], "s"),
        Row("  prefill's compute", [_prefill_s(c) for c in restored], "s"),
        Row(
            "  TTFT - restore - prefill",
            [c["ttft_s"] - _restore_s(c) - _prefill_s(c) for c in restored],
            "s",
            0.06,
        ),
        Row(
            f"{SLOW}: TTFT restored / last stage ready",
            [c["ttft_s"] / c["load_s"] for c in slow],
            "ratio",
            1.03,
        ),
    ]
    same = [a["token_ids"] == b["token_ids"] for a, b in zip(restored, fresh, strict=True)]
    return [*rows, Row("  same tokens", [float(s) for s in same], "of 1", 1.0, at_least=True)]


def _many_rows(cells: Cells) -> list[Row]:
    """Many clones at once, beside as many fresh workers."""
    fresh, clones = cells.many["off"], cells.many["require"]
    count = float(cells.clones)
    right = [
        sum(a == b for a, b in zip(c.answers, f.answers, strict=True)) / len(f.answers)
        for c, f in zip(clones, fresh, strict=True)
    ]
    return [
        Row(f"{cells.clones} fresh workers: last one up", [f.up_s for f in fresh], "s"),
        Row(f"{cells.clones} clones: last one up", [c.up_s for c in clones], "s"),
        Row("  took part in answers", [float(c.worked) for c in clones], "", count, at_least=True),
        Row("  answers as of fresh workers", right, "of 1", 1.0, at_least=True),
        Row("  PSS of a clone", [_mean(c.pss) / 1e6 for c in clones], "MB"),
        Row("    in no file", [_mean(c.pss_anon) / 1e6 for c in clones], "MB"),
        Row("  PSS of a fresh worker", [_mean(f.pss) / 1e6 for f in fresh], "MB"),
        Row("    in no file", [_mean(f.pss_anon) / 1e6 for f in fresh], "MB"),
    ]


def _totals(restored: list[Restored], fresh: list[float]) -> list[float]:
    return _ratios([r.total for r in restored], fresh)


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _spans(cell: dict[str, Any], process: str, name: str) -> list[dict[str, Any]]:
    mine = [span for span in cell["stages"] if span["process"].startswith(process)]
    return [span for span in mine if span["name"].startswith(name)]


def _restore(cell: dict[str, Any]) -> tuple[float, float]:
    """When the process that restores was started, and the first worker's first instruction."""
    (started,) = _spans(cell, "snapshot", "interpreter")
    restored = _spans(cell, "prefill", "snapshot_restore")[0]
    return started["start_s"], restored["end_s"]


def _restore_s(cell: dict[str, Any]) -> float:
    started, restored = _restore(cell)
    return restored - started


def _prefill_s(cell: dict[str, Any]) -> float:
    return float(
        sum(span["end_s"] - span["start_s"] for span in _spans(cell, "prefill", "prefill["))
    )
