"""`coldframe bench vllm-gated MODEL`: vLLM's first token from a link, with and without gates.

Each run is an engine in a process of its own, timed from its exec. The weights come over a link of
a given rate. What differs is when they are waited for:

    gated           before each layer, in the first request's prefill
    gated early     the same, and the bytes come from the exec on, as in a replica
    whole           before the engine starts: our loader without gates
    vLLM's own      fetched into a directory first, at the same rate, then loaded by vLLM
    at hand         gated, and no link: what a start takes for itself

Cells are interleaved. All must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import Row, chosen, print_rows, warm_page_cache
from coldframe.benchmarks.within import run_within
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.throttle import Throttle
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.integrations.vllm.attached import OwnMemory
from coldframe.runtime.integrations.vllm.environment import own_places
from coldframe.runtime.integrations.vllm.lean import lean_engine_args
from coldframe.runtime.units import byte_rate

__all__ = ["add_arguments", "run"]

_LIMIT_S = 300.0
_KV_BYTES = 128 << 20
_PIECE = 1 << 20


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--rate", type=byte_rate, default=byte_rate("100MB/s"), help="the link (100MB/s)")
    parser.flag("--runs", type=int, default=3, help="runs of each cell (3)")
    # Without a twin in the environment: what is chosen is another benchmark's, too.
    parser.add_argument("--only", help=f"some of {', '.join(_CELLS)} (all)")
    parser.flag("--tokens", type=int, default=128, help="of the prompt (128)")
    parser.flag("--dtype", default="auto", help="what vLLM computes in (auto)")
    parser.flag("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


@dataclass(frozen=True, slots=True)
class _Cell:
    """A way to the first token.

    Attributes:
        name: For the table.
        gated: The loader's setting; None is vLLM's own loader.
        linked: Whether the weights come over the link.
        early: Whether they come from the exec on.
    """

    name: str
    gated: bool | None
    linked: bool = True
    early: bool = False


_GATED = _Cell("gated", True)
_EARLY = _Cell("gated early", True, early=True)
_WHOLE = _Cell("whole", False)
_OWN = _Cell("vLLM's own", None)
_AT_HAND = _Cell("at hand", True, linked=False)
_CELLS = {cell.name: cell for cell in (_GATED, _EARLY, _WHOLE, _OWN, _AT_HAND)}


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        RequestError: There is no such model or cell, or no run.
        PlatformError: An engine failed, or made other tokens than another.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.runs < 1:
        raise RequestError("there must be a run", where="--runs", got=args.runs)
    weights = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    found: dict[_Cell, list[dict[str, Any]]]
    found = {_CELLS[name]: [] for name in chosen(args.only, list(_CELLS))}
    for number in range(args.runs):
        print(f"run {number + 1} of {args.runs}", file=sys.stderr)
        for cell, starts in found.items():
            warm_page_cache(args.model)  # the link is the only limit
            starts.append(_start(cell, args))
    _check_same({cell.name: runs for cell, runs in found.items()})
    rows = _rows(found, weights / args.rate)
    more = {"model": str(args.model), "rate": args.rate, "weights_bytes": weights}
    print_rows(rows, more, table=not args.json)
    return 0


def _start(cell: _Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One engine's times, in seconds since the start of its cell."""
    with ExitStack() as stack:
        began = time.monotonic_ns()
        model, extra = args.model, {"gated": cell.gated}
        engine = lean_engine_args(str(model), _KV_BYTES, dtype=args.dtype, max_model_len=1024)
        link: dict[str, Any] = {"throttle": args.rate} if cell.linked else {}
        if cell.gated is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coldframe-")))
            _fetch(args.model, model, args.rate)
            engine |= {"model": str(model), "load_format": "auto"}
        elif cell.early:
            memory = OwnMemory(LoadOptions(model=str(model), **link))
            stack.callback(memory.close)
            engine["model_loader_extra_config"] = {**extra, "memory_service": memory.path}
        else:
            engine["model_loader_extra_config"] = {**extra, **link}
        prompt = [2 + index * 7 % 1000 for index in range(args.tokens)]
        asked = {"engine": engine, "prompt": prompt, "tokens": 4}
        return _ask(args.vllm_python, asked, began)


def _fetch(source: Path, target: Path, rate: float) -> None:
    throttle = Throttle(rate)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
            continue
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while piece := reader.read(_PIECE):
                time.sleep(max(0.0, throttle.book(len(piece)) - time.monotonic()))
                writer.write(piece)


def _ask(python: str, asked: dict[str, Any], began: int) -> dict[str, Any]:
    command = [python, "-P", "-m", "coldframe.runtime.integrations.vllm.cold_start"]
    try:
        with own_places(os.environ) as places:
            environment = {**os.environ, **places, "COLDFRAME_EXEC_NS": str(began)}
            done = run_within([*command, json.dumps(asked)], _LIMIT_S, environment)
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "an engine did not end", where=python, expected=f"within {_LIMIT_S:g} s"
        ) from error
    if done.returncode:
        raise PlatformError("an engine failed", where=python, got=done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _check_same(found: dict[str, list[dict[str, Any]]]) -> None:
    tokens = {(name, tuple(run["tokens"])) for name, runs in found.items() for run in runs}
    if len({made for _, made in tokens}) > 1:
        raise PlatformError("the tokens differ", got=sorted(tokens))


def _rows(found: dict[_Cell, list[dict[str, Any]]], link_s: float) -> list[Row]:
    rows = [Row("the weights on the link", [link_s], "s")]
    for cell, runs in found.items():
        rows.append(Row(f"{cell.name}: first token", [r["first_token_s"] for r in runs], "s"))
        rows.append(Row("  engine up", [r["up_s"] for r in runs], "s"))
    first = {cell: [run["first_token_s"] for run in runs] for cell, runs in found.items()}

    def ratio(name: str, one: _Cell, other: _Cell, most: float) -> None:
        if one in first and other in first:
            pairs = zip(first[one], first[other], strict=True)
            rows.append(Row(name, [a / b for a, b in pairs], "ratio", most))

    ratio("first token: gated / whole", _GATED, _WHOLE, 0.95)
    ratio("first token: gated early / whole", _EARLY, _WHOLE, 0.9)
    ratio("first token: gated / vLLM's own", _GATED, _OWN, 0.9)
    for cell, least in ((_GATED, 0.25), (_EARLY, 0.75)):
        if cell not in first or _AT_HAND not in first:
            continue
        pairs = zip(first[cell], first[_AT_HAND], strict=True)
        hidden = [1 - (there - alone) / link_s for there, alone in pairs]
        rows.append(Row(f"hidden of the link's time: {cell.name}", hidden, "of 1", least, True))
    return rows
