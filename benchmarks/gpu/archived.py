"""Captured steps kept in an archive, and put together again in another process: what that saves.

One process captures all steps of the model and writes them to a file; a second one, which has
captured nothing but the smallest of them, to have the libraries' kernels, makes the others of the
file. Both have memory for the weights, and nobody reads those: what a step computes with does not
matter here (`tests/gpu` looks at what comes out).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row

__all__ = ["CAPTURED", "REBUILT", "capture", "measure", "rebuild", "rows"]

CAPTURED = "all steps captured"
REBUILT = "steps made of the archive"

_SHARE = 0.2
_BLOCKS = 256
"""Of KV: enough that no step is left out for want of them."""


def measure(report: Report, setting: Setting) -> None:
    """Captures, and makes again.

    Raises:
        RuntimeError: One of the processes failed.
        LeftOut: No step could be captured, or kept.
    """
    model = str(report.earlier.need(MODEL))
    file = str(Path(setting.scratch, "steps.archive"))
    captured = _run("capture", model, setting.device, file)
    for key, why in captured["refused"].items():
        report.left_out(f"step {key}", why)
    rebuilt = _run("rebuild", model, setting.device, file)
    for key, why in rebuilt["refused"].items():
        report.left_out(f"step {key}, from the archive", why)
    report.answer("steps", {"captured": captured["steps"], "from the archive": rebuilt["steps"]})
    for row in rows(captured, rebuilt):
        report.figure(row)


def rows(captured: dict[str, Any], rebuilt: dict[str, Any]) -> list[Row]:
    """The figures.

    Args:
        captured: What the first process says: `steps`, `kept`, `seconds`, `bytes`.
        rebuilt: What the second one says: `steps`, `seconds`, and of these `learnt_s` until it had
            the libraries' kernels.

    Raises:
        LeftOut: There is nothing to compare.
    """
    if not captured["kept"] or not rebuilt["steps"]:
        raise LeftOut(
            f"{captured['steps']} steps were captured, {captured['kept']} of them could be kept, "
            f"and {rebuilt['steps']} were made of the archive"
        )
    # Where not all could be kept, for as many as could.
    each = captured["seconds"] / captured["steps"]
    share = rebuilt["seconds"] / (each * rebuilt["steps"])
    return [
        Row(CAPTURED, [captured["seconds"]], "s"),
        Row("  kept in an archive", [captured["bytes"] / 1e6], "MB"),
        Row(REBUILT, [rebuilt["seconds"]], "s"),
        Row("  of that, one step captured for its kernels", [rebuilt["learnt_s"]], "s"),
        Row("archive / capture of as many", [share], "ratio", _SHARE),
    ]


def _run(what: str, model: str, device: str, file: str) -> Any:
    command = [sys.executable, "-P", "-m", __name__, what, model, device, file, str(_BLOCKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise RuntimeError(f"steps could not be had by {what}: {said[-1]}")
    return json.loads(lines[-1])


def capture(model: str, device: str, file: str, blocks: str) -> dict[str, Any]:
    """Captures all steps of a model and writes them to a file."""
    from coldframe.benchmarks.gpu.archiving import kept
    from coldframe.benchmarks.gpu.engine import Engine

    engine = Engine.open(model, device, int(blocks), fill=False)
    engine.greedy([[5, 6, 7]], 2, captured=False)  # the libraries' start is not the captures'
    started = time.perf_counter()
    steps = engine.graphs.capture_all()
    seconds = time.perf_counter() - started
    raw, refused = kept(engine)
    Path(file).write_bytes(raw)
    refused |= {str(bucket): str(error) for bucket, error in engine.graphs.refused.items()}
    return {
        "steps": steps,
        "kept": steps - len(refused),
        "seconds": seconds,
        "bytes": len(raw),
        "refused": refused,
    }


def rebuild(model: str, device: str, file: str, blocks: str) -> dict[str, Any]:
    """Makes steps of what that has written."""
    from coldframe.benchmarks.gpu.archiving import made
    from coldframe.benchmarks.gpu.engine import Engine

    engine = Engine.open(model, device, int(blocks), fill=False, limit=1)
    engine.greedy([[5, 6, 7]], 2, captured=False)
    started = time.perf_counter()
    engine.graphs.capture_all()
    learnt_s = time.perf_counter() - started
    rebuilt = made(engine, Path(file).read_bytes())
    return {
        "steps": len(rebuilt.graphs),
        "seconds": time.perf_counter() - started,
        "learnt_s": learnt_s,
        "refused": rebuilt.refused,
    }


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    print(json.dumps({"capture": capture, "rebuild": rebuild}[name](*arguments)), flush=True)
    # Not through what torch and the driver do at exit.
    os._exit(0)
