"""`coldframe bench vllm-load MODEL`: vLLM's start with its weights from us, beside its own loader.

Each start is a process of its own that makes vLLM's whole engine; runs of all loaders are
interleaved. Two figures of each: what vLLM calls "loading weights", and all of `load_model`, with
the model made before and the post-processing behind. From memory that is full already, parameters
being the arena or copies of it; from the page cache; and from disk, with the weight files evicted
from the page cache, which is proven before each. With `--speed` the same runs tell what computing
with weights in place costs; what it saves they tell in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import Row, chosen, print_rows, warm_page_cache
from coldframe.benchmarks.load import evict
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.loader.loads.options import LoadOptions
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.integrations.vllm.attached import OwnMemory
from coldframe.runtime.integrations.vllm.environment import ENGINE_ENVIRONMENT, own_places

__all__ = ["add_arguments", "run"]

_START_S = 300.0
_LOADED_S = 300.0
_ENVIRONMENT = {**ENGINE_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}

_SPEEDS = ("prefill", "decode")

_START = """
import json, os, sys, time
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from coldframe.runtime.integrations.vllm.filling import Filling
from coldframe.runtime.integrations.vllm.loader import ColdframeModelLoader
took = {}
def timed(owner, name, key):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            took[key] = time.perf_counter() - started
    setattr(owner, name, outer)
for owner in (DefaultModelLoader, ColdframeModelLoader):
    timed(owner, "load_model", "load_model")
timed(DefaultModelLoader, "load_weights", "weights")
timed(Filling, "fill_all", "weights")
model, arguments = sys.argv[1], json.loads(sys.argv[2])
started = time.perf_counter()
engine = LLMEngine.from_engine_args(EngineArgs(
    model=model, disable_log_stats=True, enforce_eager=True, max_model_len=1024,
    skip_tokenizer_init=True, **arguments))
took["engine"] = time.perf_counter() - started
def run(tokens, count):
    began = time.perf_counter()
    engine.add_request(str(began), {"prompt_token_ids": tokens}, SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False))
    answer = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            answer = list(output.outputs[0].token_ids)
    return time.perf_counter() - began, answer
tokens = [[(17 * i + 31 * n) % 900 + 2 for i in range(256)] for n in range(4)]
run(tokens[0][:8], 4)
if sys.argv[3] == "speed":
  took["prefill"] = 256 / min(run(prompt, 1)[0] for prompt in tokens)
seconds, took["answer"] = run(tokens[0][:8], 24)
if sys.argv[3] == "speed":
  took["decode"] = 23 / min(seconds, *(run(tokens[n][:8], 24)[0] for n in (1, 2)))
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("Private_Dirty:"):
        took["private"] = int(line.split()[1]) * 1024
print(json.dumps(took), flush=True)
os._exit(0)  # an engine's threads would keep it
"""

_KINDS = {
    "vLLM's own": (None, "warm"),
    "in place": ({"alias": "on"}, "memory"),
    "packed": ({"alias": "auto"}, "memory"),
    "copied": ({"alias": "off"}, "memory"),
    "page cache": ({}, "warm"),
    "vLLM's own cold": (None, "cold"),
    "cold": ({}, "cold"),
}
"""Our settings, or None for vLLM's own loader, and where the weights are before."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag(
        "--vllm-python",
        type=Path,
        default=Path(sys.executable),
        help="an interpreter that has vLLM and coldframe (make test-vllm)",
    )
    parser.flag("--runs", type=int, default=3, help="runs of each (3)")
    # Without a twin in the environment: what is chosen is another benchmark's, too.
    parser.add_argument("--only", help=f"some of {', '.join(_KINDS)} (all)")
    parser.flag("--dtype", default="auto", help="what vLLM computes in (auto: as stored)")
    parser.flag("--speed", action="store_true", help="measure prefill and decode, too")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        RequestError: There is no such directory, interpreter or kind.
        PlatformError: A start failed, or a file cannot be evicted.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if not os.access(args.vllm_python, os.X_OK):
        raise RequestError(
            "there is no such interpreter",
            where="--vllm-python",
            got=args.vllm_python,
            hint="make bench-vllm installs one: build/vllm/bin/python",
        )
    if args.runs < 1:
        raise RequestError("there must be a run", where="--runs", got=args.runs)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen(args.only, list(_KINDS))}
    for number in range(args.runs):
        print(f"run {number + 1} of {args.runs}", file=sys.stderr)
        for name, starts in found.items():
            starts.append(_start(args, *_KINDS[name]))
    same = len({tuple(start["answer"]) for starts in found.values() for start in starts}) == 1
    print_rows(_rows(found), {"model": str(args.model), "same_tokens": same}, table=not args.json)
    return 0


def _start(args: argparse.Namespace, extra: dict[str, Any] | None, place: str) -> dict[str, Any]:
    (evict if place == "cold" else warm_page_cache)(args.model)
    if place != "memory":
        return _engine(args, extra)
    memory = OwnMemory(LoadOptions(str(args.model), layout="aligned"))
    try:
        if memory.report(_LOADED_S).get("type") != "loaded":
            raise PlatformError("the memory service has not loaded the model", where=args.model)
        return _engine(args, {**(extra or {}), "memory_service": memory.path})
    finally:
        memory.close()


def _engine(args: argparse.Namespace, extra: dict[str, Any] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"dtype": args.dtype}
    if extra is not None:
        # Behind gates nobody waits for weights, and there would be nothing to measure here.
        extra = {"gated": False, **extra}
        arguments |= {"load_format": "coldframe", "model_loader_extra_config": extra}
    command = [str(args.vllm_python), "-W", "ignore", "-c", _START]
    with own_places(os.environ) as places:
        done = subprocess.run(
            [*command, str(args.model), json.dumps(arguments), "speed" if args.speed else ""],
            env={**os.environ, **_ENVIRONMENT, **places},
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_S,
        )
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PlatformError("a start of vLLM failed", where=json.dumps(arguments), got=last)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    rows = []
    for name, starts in found.items():
        rows.append(Row(f"{name}: loading weights", [s["weights"] for s in starts], "s"))
        rows.append(Row("  load_model", [s["load_model"] for s in starts], "s"))
        rows.append(Row("  private memory", [s["private"] / 1e6 for s in starts], "MB"))
        for what in _SPEEDS:
            if what in starts[0]:
                rows.append(Row(f"  {what}", [s[what] for s in starts], "tok/s"))

    def ratio(what: str, name: str, theirs: str, limit: float | None = None) -> None:
        if name in found and theirs in found and what in found[theirs][0]:
            pairs = zip(found[name], found[theirs], strict=True)
            title = f"{name} / {theirs}: {what.replace('_', ' ')}"
            rows.append(Row(title, [a[what] / b[what] for a, b in pairs], "ratio", limit))

    own, own_cold = "vLLM's own", "vLLM's own cold"
    ratio("weights", "in place", own, 0.3)
    ratio("weights", "packed", own, 0.3)
    ratio("weights", "copied", own, 0.7)
    ratio("weights", "page cache", own)
    ratio("weights", "cold", own_cold, 0.6)
    pairs = [("in place", own), ("packed", own), ("copied", own), ("page cache", own)]
    for pair in [*pairs, ("cold", own_cold)]:
        ratio("load_model", *pair)
    for what in _SPEEDS:
        ratio(what, "in place", own)
    if own in found and "in place" in found:
        saved = zip(found[own], found["in place"], strict=True)
        less = [(a["private"] - b["private"]) / 1e6 for a, b in saved]
        rows.append(Row("in place: private memory less", less, "MB"))
    return rows
