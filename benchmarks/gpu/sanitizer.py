"""compute-sanitizer over one run: a tiny model, all of whose processes are watched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from coldframe.benchmarks.gpu.replicas import PROMPT
from coldframe.benchmarks.gpu.report import Check, LeftOut, Report, Setting
from coldframe.benchmarks.harness import coldframe_command
from coldframe.benchmarks.within import run_within
from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model

__all__ = ["errors_in", "measure"]

_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia", "/usr/local/nvidia/bin")
_NAME = "compute-sanitizer"
_SPARE_S = 4.0
_CHECK = "compute-sanitizer (memcheck) finds nothing in one run"


def measure(report: Report, setting: Setting) -> None:
    """Runs it once.

    Raises:
        LeftOut: There is no compute-sanitizer, or it does not work here.
    """
    tool = _find()
    if tool is None:
        raise LeftOut(f"there is no {_NAME} on this machine")
    model = Path(setting.scratch, "tiny")
    write_demo_model(model, DemoModel("tiny", "llama", dtype="bfloat16"))
    log = Path(setting.scratch, "sanitizer")
    log.mkdir()
    command = [
        # Calls that fail are no errors of memory: torch tries some to see whether it may.
        *(tool, "--target-processes", "all", "--report-api-errors", "no"),
        *("--log-file", f"{log}/%p.log", *coldframe_command(), "run", str(model)),
        *("--device", setting.device, "--prompt-ids", ",".join(map(str, PROMPT))),
        *("-n", "4", "--ignore-eos", "--json"),
    ]
    limit = setting.seconds - _SPARE_S
    try:
        done = run_within(command, limit)
    except subprocess.TimeoutExpired as error:
        raise LeftOut(f"the run under {_NAME} did not end within {limit:.0f} s") from error
    told = "\n".join(file.read_text(errors="replace") for file in sorted(log.iterdir()))
    watched, errors = errors_in(told)
    report.answer("processes watched", watched)
    if done.returncode or not watched:
        said = (done.stderr.strip() or told.strip()).splitlines()
        why = said[-1] if said else "it says nothing"
        raise LeftOut(f"the run under {_NAME} ended with status {done.returncode}: {why}")
    report.check(Check(_CHECK, "failed" if errors else "passed", errors))


def errors_in(log: str) -> tuple[int, str | None]:
    """How many processes a log is of, and what was found in them."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    if not any(map(int, summaries)):
        return len(summaries), None
    first = re.search(r"========= (?!COMPUTE|ERROR|Target|$)(.+)", log)
    return len(summaries), f"{sum(map(int, summaries))} errors: {first[1] if first else 'see it'}"


def _find() -> str | None:
    found = shutil.which(_NAME)
    if found is not None:
        return found
    for place in map(Path, _PLACES):
        if place.is_dir():
            for file in place.rglob(_NAME):
                if os.access(file, os.X_OK) and file.is_file():
                    return str(file)
    return None
