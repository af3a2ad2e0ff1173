"""What benchmarks share: cold starts as real processes, medians, a table and a JSON document."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.machine import fingerprint
from coldframe.benchmarks.within import run_within
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.commands.own import coldframe_command

__all__ = [
    "Row",
    "chosen",
    "cold_start",
    "coldframe_command",
    "evict_files",
    "fingerprint",
    "import_torch_s",
    "print_rows",
    "warm_page_cache",
    "words",
]

_EVICTIONS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Args:
        name: What was measured.
        runs: The values of the single runs.
        unit: Their unit; `ratio` for what has none.
        target: What it should be at most (or at least), or None for a figure that stands beside.
        at_least: Whether the target is a lower bound.
    """

    name: str
    runs: list[float]
    unit: str
    target: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.median >= self.target if self.at_least else self.median <= self.target


def words(text: str, known: Iterable[str]) -> list[str]:
    """What a flag names of that which can be measured.

    Args:
        text: Names with commas between them.
        known: Those that there are.

    Raises:
        RequestError: One is none of them.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    known = set(known)
    for word in found:
        if word not in known:
            raise RequestError(
                "there is no such thing to measure",
                expected=", ".join(sorted(known)),
                got=word,
                hint="Give one or several of these, with commas between them.",
            )
    return found


def chosen(text: str | None, known: Sequence[str]) -> list[str]:
    """What `--only` leaves of that which can be measured, in the order of what there is.

    Args:
        text: Names with commas between them, or None for all.
        known: Those that there are.

    Raises:
        RequestError: One is none of them, or there is none.
    """
    if text is None:
        return list(known)
    found = words(text, known)
    if not found:
        raise RequestError(
            "there is nothing to measure", where="--only", expected=", ".join(known), got=repr(text)
        )
    return [name for name in known if name in found]


def cold_start(
    model: Path | str,
    *arguments: str,
    prompt_ids: Sequence[int],
    tokens: int,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> Any:
    """Runs `coldframe run` once, as a process of its own, and returns its JSON document.

    Args:
        model: A checkpoint's directory, or where else it is.
        arguments: More flags.
        prompt_ids: The prompt.
        tokens: How many to generate.
        environment: What to change in this process's; workers start fresh where it says nothing.
        limit_s: How long it may take, in seconds.

    Raises:
        PlatformError: It failed, or was not done by then.
    """
    command = [
        *coldframe_command(),
        "run",
        str(model),
        "--prompt-ids",
        ",".join(map(str, prompt_ids)),
        "-n",
        str(tokens),
        "--ignore-eos",
        "--json",
        *arguments,
    ]
    changed = {**os.environ, "COLDFRAME_SNAPSHOT": "off", **(environment or {})}
    changed["COLDFRAME_EXEC_NS"] = str(time.monotonic_ns())
    try:
        done = run_within(command, limit_s, changed)
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "a cold start did not end", where=" ".join(command), expected=f"within {limit_s:g} s"
        ) from error
    if done.returncode:
        raise PlatformError("a cold start failed", where=" ".join(command), got=done.stderr.strip())
    return json.loads(done.stdout)


def import_torch_s() -> float:
    """Seconds from the exec of a fresh interpreter until it has imported torch, and nothing else.

    Not until its end: taking torch down again takes another quarter of a second.
    """
    code = "import torch, time; print(time.monotonic_ns())"
    started = time.monotonic_ns()
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return (int(done.stdout) - started) / 1e9


def warm_page_cache(model: Path) -> None:
    """Reads all weight files, so that the next start finds them in the page cache."""
    buffer = bytearray(8 << 20)
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def print_rows(rows: Sequence[Row], more: dict[str, Any], *, table: bool = True) -> None:
    """A table for people, where it is wanted, then one JSON document as the last line."""
    if table:
        _print_table(rows)
    document = {
        "rows": [{**asdict(row), "median": row.median, "met": row.met} for row in rows],
        **more,
        "fingerprint": fingerprint(),
    }
    print(json.dumps(document))


def _print_table(rows: Sequence[Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'':<{width}}  {'median':>9}  {'min':>9}  {'max':>9}  {'unit':<8}{'target':>10}")
    for row in rows:
        target = ""
        if row.target is not None:
            sign = ">=" if row.at_least else "<="
            target = f"{sign} {row.target:.4g}"
        verdict = {None: "", True: "  met", False: "  MISSED"}[row.met]
        print(
            f"{row.name:<{width}}  {row.median:>9.4g}  {min(row.runs):>9.4g}"
            f"  {max(row.runs):>9.4g}  {row.unit:<8}{target:>10}{verdict}"
        )


def evict_files(files: Iterable[Path]) -> None:
    """Drops files from the page cache, and proves it.

    Raises:
        PlatformError: Some of it stays: somebody else has it mapped, or it is a tmpfs.
    """
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            # A page that somebody looks at just then stays; not so the next time.
            for _ in range(_EVICTIONS):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                left = cached_bytes(fd, 0, os.fstat(fd).st_size)
                if not left:
                    break
                time.sleep(0.05)
        finally:
            os.close(fd)
        if left:
            raise PlatformError(
                "a file cannot be evicted from the page cache",
                where=file,
                got=f"{left} bytes left",
                hint="Give a store on a disk with --snapshot-store.",
            )
