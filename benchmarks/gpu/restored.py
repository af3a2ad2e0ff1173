"""A cold container whose workers come out of an image, with their contexts and captured steps.

Beside the same start with fresh workers, in turn. The image is made as anybody makes one; its
bytes come from the page cache, and once from the disk. Nobody knows yet what a restore takes, so
these are figures without an aim.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.cold import same_answers, split, start, worker_ready_s
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.probes import Probe, answer
from coldframe.benchmarks.gpu.report import Check, Report, Setting
from coldframe.benchmarks.harness import Row, coldframe_command, evict_files, warm_page_cache
from coldframe.benchmarks.within import run_within
from coldframe.loader.errors import PlatformError
from coldframe.snapshot.store import open_store

__all__ = ["ABLE", "create", "measure", "rows"]

ABLE = (
    Probe("CRIU", "criu", module="coldframe.benchmarks.gpu.criu_questions"),
    Probe("checkpoint", "checkpoints", module="coldframe.benchmarks.gpu.checkpoint_questions"),
)
"""What has to be possible here at all; where it is, and there is no image, something has failed."""

_RUNS = 2
_ABLE_S = 20.0
_CREATE_S = 45.0
_STAGES = (
    *("snapshot_check", "snapshot_read", "snapshot_restore", "cuda_restore", "hooks"),
    *("attach", "graph_restore", "graph_capture", "cuda_context", "imports"),
)


def measure(report: Report, setting: Setting) -> None:
    """Makes an image, and starts from it.

    Raises:
        LeftOut: CRIU or the driver cannot do that here.
        PlatformError: They can, and there is no image, or no clone of it.
    """
    for probe in ABLE:
        answer(probe, setting.device, _ABLE_S)
    model, store = Path(report.earlier.need(MODEL)), Path(setting.scratch, "images")
    started = time.monotonic()
    create(model, store, setting.device, _CREATE_S)
    report.figure(Row("image: made", [time.monotonic() - started], "s"))
    manifests, _ = open_store(str(store)).manifests()
    report.figure(Row("image: of a worker", [manifests[0].image_bytes / 1e6], "MB"))
    report.figure(Row("  image: as it is stored", [manifests[0].stored_bytes / 1e6], "MB"))
    report.answer("codec", sorted({item.codec for item in manifests[0].objects}))
    clones = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_SNAPSHOT_STORE": str(store)}
    warm_page_cache(model)
    fresh: list[dict[str, Any]] = []
    warm: list[dict[str, Any]] = []
    for _ in range(_RUNS):
        warm.append(start(model, setting, clones))
        fresh.append(start(model, setting))
        for row in rows("from an image", warm, fresh):
            report.figure(row)
    report.answer("what the first token waited for, fresh", split(fresh[-1]))
    report.answer("what the first token waited for, from an image", split(warm[-1]))
    cold = _cold(report, setting, model, store, clones)
    name = "all starts from an image answer the same"
    same = same_answers([*warm, *cold])
    report.check(Check(name, same.outcome, same.reason))
    equal = fresh[-1]["token_ids"] == warm[-1]["token_ids"]
    report.answer("and the same as fresh workers", "yes" if equal else "no")


def create(model: Path, store: Path, device: str, seconds: float) -> dict[str, Any]:
    """Makes an image: the document of `snapshot create`.

    Args:
        model: The checkpoint's directory.
        store: Where it is put.
        device: What the worker computes on.
        seconds: How long that may take.

    Raises:
        PlatformError: There is none.
    """
    command = [
        *(*coldframe_command(), "snapshot", "create", str(model), "--device", device),
        *("--snapshot-store", str(store), "--json"),
    ]
    try:
        done = run_within(command, seconds)
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "an image was not made in time",
            where=" ".join(command),
            expected=f"within {seconds:.0f} s",
        ) from error
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise PlatformError("an image cannot be made", where=" ".join(command), got=said)
    return dict(json.loads(done.stdout))


def _cold(
    report: Report, setting: Setting, model: Path, store: Path, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """One start for which the image is read from the disk; none where it stays in memory."""
    what = "from an image on a cold disk: TTFT"
    try:
        evict_files(sorted(file for file in store.rglob("*") if file.is_file()))
    except PlatformError as error:
        report.left_out(what, str(error))
        return []
    found = start(model, setting, environment)
    report.figure(Row(what, [found["ttft_s"]], "s"))
    report.figure(Row("  its worker up, but for the weights", [worker_ready_s(found)], "s"))
    return [found]


def rows(
    which: str, clones: Sequence[dict[str, Any]], fresh: Sequence[dict[str, Any]]
) -> list[Row]:
    """The figures of starts from an image beside those with fresh workers.

    Args:
        which: What the former have in common.
        clones: Their documents.
        fresh: As many.
    """
    ours, theirs = ([one["ttft_s"] for one in starts] for starts in (clones, fresh))
    found = [
        Row(f"{which}: TTFT", ours, "s"),
        Row("fresh: TTFT", theirs, "s"),
        Row(f"{which} / fresh", [a / b for a, b in zip(ours, theirs, strict=True)], "ratio"),
        Row(f"  {which}: worker up, but for the weights", list(map(worker_ready_s, clones)), "s"),
        Row("  fresh: worker up, but for the weights", list(map(worker_ready_s, fresh)), "s"),
        Row(f"  {which}: last stage in", [one["load_s"] for one in clones], "s"),
    ]
    for stage in _STAGES:
        seconds = [_stage_s(one, stage) for one in clones]
        if any(seconds):
            found.append(Row(f"  {which}: {stage}", seconds, "s"))
    return found


def _stage_s(document: dict[str, Any], stage: str) -> float:
    """What a stage took on the first token's way: the prefill worker's, or what was done for it."""
    took = [
        span["end_s"] - span["start_s"]
        for span in document["stages"]
        if span["name"] == stage and not span["process"].startswith("decode")
    ]
    return max(took, default=0.0)
