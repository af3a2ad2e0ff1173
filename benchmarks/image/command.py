"""`coldframe bench image MODEL`: what a cold start opens of its image, for who pulls it lazily.

Run it in the container whose image is meant, as root with CAP_SYS_ADMIN. `coldframe serve` is
started twice. The first start says which files there are; they are dropped from the page cache, and
the second says in which order they are opened and how much of them is read, up to the first token.
The weights are no part of the list, be they in the image or not: the loader streams them anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coldframe.benchmarks.document import document
from coldframe.benchmarks.harness import fingerprint
from coldframe.benchmarks.http_client import Connection, completion
from coldframe.benchmarks.image.fanotify import Watch
from coldframe.benchmarks.image.lists import FORMATS, File, cached, drop_from_cache, kept
from coldframe.benchmarks.output import (
    add_output_arguments,
    check_output,
    columns,
    deliver,
    described,
)
from coldframe.benchmarks.servers import coldframe_server, knock_at
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 90 for i in range(16)]
_WAIT_S = 300.0
_SHOWN = 12


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    # Without twins: there the same names are settings of a replica, or each would write there.
    parser.add_argument(
        "--snapshot",
        metavar="off|auto|require|PLACE",
        default="off",
        help="how workers start, as `coldframe serve` has it (off)",
    )
    for name, what in (
        ("plain", "a path a line"),
        ("estargz", "a record for nerdctl image convert --estargz-record-in"),
        ("soci", "for soci convert --prefetch-files-json"),
    ):
        help = f"write the list there, {what}"
        parser.add_argument(f"--{name}", metavar="FILE", type=Path, help=help)
    add_output_arguments(parser)


@dataclass(frozen=True, slots=True)
class _Start:
    """One start that was watched.

    Args:
        ttft_s: From the exec to the first token.
        tier: How its workers came to be.
        files: Of the image, in the order of their first opening.
        unknown: Openings by processes that are not known any more.
    """

    ttft_s: float
    tier: str | None
    files: list[File]
    unknown: int


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its table and the document.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: Files cannot be watched here, or a start failed.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    for name in ("output", *FORMATS):
        check_output(getattr(args, name))
    places = _places()
    Watch(places).close()  # or it says why not, before anything is started
    facts = ModelFacts(str(args.model))
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as scratch:
        starts = _Starts(args.model, args.snapshot, places, Path(scratch))
        print("the first start: which files there are", file=sys.stderr)
        first = starts.watch("first")
        gone = drop_from_cache(first.files)
        print(f"the second, with {len(gone)} files out of the page cache", file=sys.stderr)
        second = starts.watch("second")
    files = [
        replace(file, read=cached(file.path)) if file.path in gone else file
        for file in second.files
    ]
    paths, total = [file.path for file in files], _total(files)
    found = document(
        "image",
        model=described(args.model, facts),
        tier=second.tier,
        ttft_s={"first": first.ttft_s, "evicted": second.ttft_s},
        files=[asdict(file) for file in files],
        total=total,
        unknown_openings=second.unknown,
        prefetch={"plain": paths, "estargz": [{"path": path.lstrip("/")} for path in paths]},
        fingerprint=fingerprint(model=args.model),
    )
    for name, form in FORMATS.items():
        place: Path | None = getattr(args, name)
        if place is not None:
            _write(place, form(paths), name)
    deliver(found, _table(files, second, total), args.output, alone=args.json)
    return 0


def _places() -> list[str]:
    """A path on each file system that the image may be on: its root, and Python's packages."""
    by_device: dict[int, str] = {}
    for path in ("/", sys.base_prefix, sys.prefix, str(Path(__file__).parent)):
        by_device.setdefault(os.stat(path).st_dev, path)
    return list(by_device.values())


class _Starts:
    """Cold starts of a model's server, each of them watched.

    Args:
        model: The checkpoint.
        snapshot: How workers start.
        places: What is watched.
        scratch: A folder for the runs.
    """

    def __init__(self, model: Path, snapshot: str, places: Sequence[str], scratch: Path) -> None:
        self._model = model
        self._snapshot = snapshot
        self._places = places
        self._scratch = scratch

    def watch(self, name: str) -> _Start:
        """Starts it, asks for a token, and ends it.

        Args:
            name: Of its files in the scratch folder.

        Raises:
            PlatformError: It failed, or events were lost.
        """
        out, mark, runs = (self._scratch / f"{name}.{kind}" for kind in ("json", "mark", "run"))
        runs.mkdir()
        mark.touch()
        under = [sys.executable, "-P", "-m", "coldframe.benchmarks.image.watching"]
        environment = {
            "COLDFRAME_SNAPSHOT": self._snapshot,
            "COLDFRAME_NO_SNAPSHOT_CREATE": "1",
            "COLDFRAME_RUN_DIR": str(runs),
        }
        with coldframe_server(
            self._model,
            environment=environment,
            under=[*under, str(out), ",".join(self._places)],
        ) as server:
            sock = knock_at(server, server.started_ns + int(_WAIT_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                body = completion("m", _PROMPT, 2, stream=True)
                answer = connection.post("/v1/completions", body)
                tier = json.loads(connection.get("/startup").body)["tier"]
        said = json.loads(out.read_text())
        if said["overflown"]:
            raise PlatformError(
                "not all openings of files were seen",
                where="fanotify",
                hint="Measure again while the machine does less.",
            )
        files = kept(
            dict(said["opened"]),
            server.started_ns,
            answer.first_ns,
            mark.stat().st_ctime,
            (self._model, self._scratch),
        )
        ttft = (answer.first_ns - server.started_ns) / 1e9
        return _Start(ttft, tier, files, said["unknown"])


def _total(files: Sequence[File]) -> dict[str, int]:
    measured = [file for file in files if file.read is not None]
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "measured_files": len(measured),
        "measured_bytes": sum(file.size for file in measured),
        "read_bytes": sum(file.read or 0 for file in measured),
    }


def _write(path: Path, text: str, name: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(
            "the list cannot be written there", where=f"--{name}", got=str(error)
        ) from error


def _table(files: Sequence[File], start: _Start, total: Mapping[str, int]) -> list[str]:
    largest = sorted(files, key=lambda file: file.size, reverse=True)[:_SHOWN]
    rows = [("file", "size", "read", "opened after")]
    for file in sorted(largest, key=lambda file: file.at_s):
        read = "" if file.read is None else human_bytes(file.read)
        rows.append((file.path, human_bytes(file.size), read, human_seconds(file.at_s)))
    share = total["read_bytes"] / total["measured_bytes"] if total["measured_bytes"] else 0.0
    return [
        *columns(rows),
        "",
        f"{total['files']} files of {human_bytes(total['bytes'])} until the first token after "
        f"{human_seconds(start.ttft_s)} ({start.tier}); of the {total['measured_files']} that had "
        f"left the page cache {human_bytes(total['read_bytes'])} were read, {share:.0%}",
    ]
