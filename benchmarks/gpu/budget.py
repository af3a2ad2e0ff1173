"""Parts one after the other, each with a deadline, all of them within one budget.

A part that is over its time is ended with all that it has started, and what it has found by then
counts. A part that cannot end in what is left of the budget is not begun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coldframe.benchmarks.gpu.part import DONE, LEFT_OUT
from coldframe.benchmarks.gpu.report import Found, Setting

__all__ = ["Outcome", "Part", "output_of", "run_parts"]

_PATIENCE_S = 5.0
"""How long a part that is told to end may take to clear up."""
_LAST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the run.

    Args:
        name: What it is called in results.
        what: What it looks at, for people.
        module: Has `measure(report, setting)`.
        seconds: How long it may take.
        least: What must be left of the budget for it to be worth beginning, in seconds.
    """

    name: str
    what: str
    module: str
    seconds: float
    least: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended.

    Args:
        part: Which.
        status: `done`, `left out`, `failed` or `out of time`.
        reason: Why it is not `done`.
        seconds: How long it took.
        found: What it has found, also where it did not come to its end.
    """

    part: Part
    status: str
    reason: str | None
    seconds: float
    found: Found


def run_parts(
    parts: Sequence[Part],
    setting: Setting,
    budget_s: float,
    ended: Callable[[Outcome], bool],
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Runs parts, one after the other.

    Args:
        parts: In their order.
        setting: What they are told; `seconds` is set for each.
        budget_s: What all of them may take.
        ended: Called with each outcome; whether to go on.
        environment: What to change in this process's for them.

    Returns:
        The outcomes, one for each part that was come to.
    """
    deadline = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    files: list[str] = []
    for part in parts:
        left = deadline - time.monotonic()
        if left < part.least:
            why = f"{left:.0f} s of the budget are left, and it takes {part.least:.0f} s at least"
            outcome = Outcome(part, "left out", why, 0.0, Found())
        else:
            file = Path(setting.scratch, f"{part.name}.jsonl")
            told = replace(setting, seconds=min(part.seconds, left))
            outcome = _run(part, told, file, files, {**os.environ, **(environment or {})})
            files.append(str(file))
        outcomes.append(outcome)
        if not ended(outcome):
            break
    return outcomes


def output_of(part: Part, scratch: str) -> Path:
    """Where all that a part and its children print is."""
    return Path(scratch, f"{part.name}.log")


def _run(
    part: Part, setting: Setting, file: Path, earlier: list[str], environment: dict[str, str]
) -> Outcome:
    command = [
        *(sys.executable, "-P", "-m", "coldframe.benchmarks.gpu.part"),
        *(part.module, str(file), json.dumps(earlier), json.dumps(asdict(setting))),
    ]
    words = output_of(part, setting.scratch)
    started = time.monotonic()
    with words.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(setting.seconds)
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGTERM)
        finally:
            _end(process, signal.SIGKILL)
    status = {DONE: "done", LEFT_OUT: "left out", None: "out of time"}.get(code, "failed")
    reason = None
    if code is None:
        reason = f"it was not done within {setting.seconds:g} s"
    elif code != DONE:
        reason = _last_line(words) or f"exit status {code}"
        if code < 0:
            reason = f"ended by {signal.Signals(-code).name}; said last: {reason}"
    return Outcome(part, status, reason, time.monotonic() - started, Found.read(file))


def _end(process: subprocess.Popen[bytes], by: signal.Signals) -> None:
    """Ends a part, and whatever is left of its session."""
    left = _session(process.pid)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, by)
    if not left:
        return
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return  # the next signal is one that it cannot ignore


def _session(number: int) -> list[int]:
    """The processes of a session: some have groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.getsid(pid := int(entry.name)) == number:
                found.append(pid)
    return found


def _last_line(words: Path) -> str:
    lines = words.read_bytes()[-_LAST_WORDS:].decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else ""
