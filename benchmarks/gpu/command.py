"""`make gpu`, `coldframe bench gpu`: what a machine with a GPU can tell in less than 560 s.

Correctness first, then figures, each part within its own deadline. What has been found is written
after every part, so that a run that is cut off leaves what it had. What is left out or fails is
printed with its reason, and is in the results file with it.

The exit status is 0 where nothing failed and every aim was met, and also where there is no GPU,
which is said; 3 in that case with `--require`; 1 otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.budget import Outcome, Part, output_of, run_parts
from coldframe.benchmarks.gpu.document import build, file_name, read, succeeded, write
from coldframe.benchmarks.gpu.machine import FINGERPRINT
from coldframe.benchmarks.gpu.model import DIRECTORY, SHAPES
from coldframe.benchmarks.gpu.parts import BUDGET_S, MACHINE, PARTS
from coldframe.benchmarks.gpu.report import Setting
from coldframe.benchmarks.gpu.table import into_log, render
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["NO_GPU", "add_arguments", "run"]

NO_GPU = 3
"""The exit status of `--require` where there is no GPU."""

_ROOT = Path(__file__).resolve().parent.parent.parent
_RESULTS = _ROOT / "benchmarks" / "results"
_LOG = _ROOT / "docs" / "LOG.md"
_OUTPUT = _ROOT / "build" / "gpu.log"


def add_arguments(parser: Parser) -> None:
    parser.flag("--device", default="cuda:0", help="the GPU (cuda:0)")
    parser.add_argument(
        "--only",
        metavar="PARTS",
        help=f"some of {', '.join(part.name for part in PARTS)}, with commas between them",
    )
    parser.flag(
        "--budget", type=float, default=BUDGET_S, help=f"seconds for all of it ({BUDGET_S:.0f})"
    )
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        help="the model that is loaded and started (the largest there is room for)",
    )
    parser.flag("--results", type=Path, default=_RESULTS, help="where the results file goes")
    parser.flag(
        "--output",
        type=Path,
        default=_OUTPUT,
        help=f"where all that the parts print goes ({_OUTPUT.relative_to(_ROOT)})",
    )
    parser.flag("--scratch", type=Path, help="a directory on the disk that is measured")
    parser.add_argument(
        "--log",
        nargs="?",
        type=Path,
        const=_LOG,
        metavar="FILE",
        help="put the tables into a log, too (docs/LOG.md)",
    )
    parser.add_argument(
        "--from", dest="file", type=Path, help="measure nothing: show, or log, a results file"
    )
    parser.add_argument(
        "--require", action="store_true", help=f"end with status {NO_GPU} where there is no GPU"
    )


def run(args: argparse.Namespace) -> int:
    """Runs all of it; see above for the exit status.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: The results make no document.
    """
    if args.file is not None:
        return _show(read(args.file), args.file.name, args.log)
    wanted = _wanted(args.only)
    started, day = time.monotonic(), date.today().isoformat()
    # Short, since the sockets of replicas lie below it.
    scratch = Path(tempfile.mkdtemp(prefix="cfgpu-", dir=args.scratch))
    environment = {
        "COLDFRAME_RUN_DIR": str(scratch),
        "COLDFRAME_SNAPSHOT": "off",
        "TMPDIR": str(scratch),
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
    setting = Setting(args.device, str(scratch), 0.0, shape=args.shape or "")
    outcomes: list[Outcome] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(b"")

    def document() -> dict[str, Any]:
        machine = outcomes[0].found.need(FINGERPRINT)
        return build(machine, day, time.monotonic() - started, outcomes[1:])

    def ended(outcome: Outcome) -> bool:
        outcomes.append(outcome)
        _tell(outcome)
        _keep_output(outcome, setting.scratch, args.output)
        if outcome.part is MACHINE:
            return outcome.status == "done"
        write(document(), args.results)
        return True

    try:
        run_parts([MACHINE, *wanted], setting, args.budget, ended, environment)
        machine = outcomes[0]
        if machine.status == "left out":
            print(f"There is no GPU to measure, and so no results: {machine.reason}")
            return NO_GPU if args.require else 0
        if machine.status != "done":
            print(f"The GPU cannot be used, and so there are no results: {machine.reason}")
            return 1
    finally:
        for outcome in outcomes:
            if DIRECTORY in outcome.found.kept:
                shutil.rmtree(outcome.found.kept[DIRECTORY], ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    found = document()
    print(f"{args.results / file_name(found)}\n", file=sys.stderr)
    return _show(found, file_name(found), args.log)


def _wanted(only: str | None) -> list[Part]:
    if only is None:
        return list(PARTS)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {part.name: part for part in PARTS}
    for name in names:
        if name not in known:
            raise RequestError(
                "there is no such part", where="--only", expected=", ".join(known), got=name
            )
    return [part for part in PARTS if part.name in names]


def _show(document: dict[str, Any], name: str, log: Path | None) -> int:
    print(render(document))
    if log is not None:
        into_log(log, name, document)
    return 0 if succeeded(document) else 1


def _keep_output(outcome: Outcome, scratch: str, target: Path) -> None:
    """Adds what a part has printed to that of the others: tracebacks, what workers have said."""
    printed = output_of(outcome.part, scratch)
    with target.open("ab") as file:
        file.write(f"== {outcome.part.name}: {outcome.status}\n".encode())
        if printed.exists():
            file.write(printed.read_bytes())


def _tell(outcome: Outcome) -> None:
    """A line for whoever watches, and one for each thing that was left out."""
    part, why = outcome.part, f": {outcome.reason}" if outcome.reason else ""
    print(f"{part.name}: {outcome.status} in {outcome.seconds:.1f} s{why}", file=sys.stderr)
    for what, reason in outcome.found.left_out.items():
        print(f"  left out: {what}: {reason}", file=sys.stderr)
    for check in outcome.found.checks:
        if check.outcome != "passed":
            print(f"  {check.outcome}: {check.name}: {check.reason}", file=sys.stderr)
