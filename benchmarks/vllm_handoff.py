"""`coldframe bench vllm-handoff MODEL`: KV from outside in vLLM, beside a plain copy of its bytes.

Measured inside vLLM's own process (`kv_trial`), layered and beside steps, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from coldframe.benchmarks.harness import Row, chosen, print_rows
from coldframe.loader.errors import PlatformError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.integrations.vllm.environment import ENGINE_ENVIRONMENT, own_places

__all__ = ["add_arguments", "run"]

LOADS = ("layered", "async")
_BESIDE_MS = 20.0
_TIMES = 1.5
_MOST_S = 600
_CODE = "import sys; from coldframe.runtime.integrations.vllm.kv_trial import main; "
_ENVIRONMENT = {
    **ENGINE_ENVIRONMENT,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--tokens", type=int, default=300, help="tokens of the prompts (300)")
    parser.flag("--runs", type=int, default=10, help="runs of each cell (10)")
    # Without a twin in the environment: what is chosen is another benchmark's, too.
    parser.add_argument("--only", help=f"some of {', '.join(LOADS)} (all)")
    parser.flag("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        RequestError: There is no such way to load.
        PlatformError: vLLM does not run there.
    """
    rows = []
    for load in chosen(args.only, LOADS):
        runs = _measure(args, load)

        def figures(what: str, runs: list[dict[str, float]] = runs) -> list[float]:
            return [run[what] for run in runs]

        over = [run["ready"] / (_TIMES * run["copy"] + _BESIDE_MS) for run in runs]
        saved = [run["save"] / (_TIMES * run["copy"] + _BESIDE_MS) for run in runs]
        rows += [
            Row(f"{load}: KV ready, from the request on", figures("ready"), "ms"),
            Row(f"{load}: of that, the copy", figures("load"), "ms"),
            Row(f"{load}: plain copy of {runs[0]['bytes'] / 1e6:.1f} MB", figures("copy"), "ms"),
            Row(f"{load}: KV ready / (1.5 plain copies + 20 ms)", over, "ratio", 1.0),
            Row(f"{load}: first token", figures("first"), "ms"),
            Row(f"{load}: first token without KV", figures("first_plain"), "ms"),
            Row(f"{load}: a decode step", figures("step"), "ms"),
            Row(f"{load}: KV of a prefill put into the arena", figures("save"), "ms"),
            Row(f"{load}: that / (1.5 plain copies + 20 ms)", saved, "ratio", 1.0),
        ]
    print_rows(rows, {"tokens": args.tokens}, table=not args.json)
    return 0


def _measure(args: argparse.Namespace, load: str) -> list[dict[str, float]]:
    numbers = ("--tokens", str(args.tokens), "--runs", str(args.runs), "--load", load)
    command = [
        args.vllm_python,
        "-P",
        "-c",
        _CODE + "main(sys.argv[1:])",
        str(args.model),
        *numbers,
    ]
    try:
        with own_places(os.environ) as places:
            done = subprocess.run(
                command,
                env={**os.environ, **_ENVIRONMENT, **places},
                capture_output=True,
                text=True,
                timeout=_MOST_S,
                check=False,
            )
    except OSError as error:
        raise PlatformError("no such interpreter", where=args.vllm_python) from error
    if done.returncode:
        raise PlatformError(
            "the trial inside vLLM failed",
            where=args.vllm_python,
            got=done.stderr.strip().splitlines()[-1:],
            hint="Name the interpreter that has vLLM and coldframe with --vllm-python.",
        )
    found: list[dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
