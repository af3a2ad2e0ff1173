"""`coldframe bench NAME`: benchmarks found by name and imported when called."""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.device_choice import CPU, choose_device

__all__ = ["BENCHMARKS", "add_arguments", "parser_of", "run"]

BENCHMARKS = {
    "batching": ("coldframe.benchmarks.batching", "how large a batch of prompts should be"),
    "cold": (
        "coldframe.benchmarks.cold.command",
        "from the exec to the first token, by tier, page cache, source and engine",
    ),
    "dynamo": ("coldframe.benchmarks.dynamo", "what Dynamo's front end adds to a warm request"),
    "gpu": ("coldframe.benchmarks.gpu.command", "all that a machine with a GPU can tell"),
    "image": (
        "coldframe.benchmarks.image.command",
        "the files that a cold start opens, for images that are pulled lazily",
    ),
    "graphs": ("coldframe.benchmarks.graph_archive", "captured steps saved and rebuilt, no GPU"),
    "interference": (
        "coldframe.benchmarks.interference",
        "what running decodes feel of prompts that arrive, apart and together",
    ),
    "load": ("coldframe.benchmarks.load", "loading alone, beside other loaders and the disk"),
    "prefix": ("coldframe.benchmarks.prefix", "a prompt whose beginning is in KV already"),
    "kills": ("coldframe.benchmarks.kills", "an hour of arrivals, while processes are killed"),
    "replay": (
        "coldframe.benchmarks.traffic.replay",
        "a trace live on a server that scales to zero, and by simulation",
    ),
    "report": ("coldframe.benchmarks.report.command", "pictures of what benchmarks have printed"),
    "rest": ("coldframe.benchmarks.rest", "the first token from zero, from parked and warm"),
    "serve": (
        "coldframe.benchmarks.traffic.serve",
        "a warm server under load: TTFT, ITL, goodput; prefill and decode apart and together",
    ),
    "handoff": (
        "coldframe.benchmarks.handoff",
        "from the first token to the second: KV handed over, to whom, or computed again",
    ),
    "endpoint": ("coldframe.benchmarks.endpoint", "over HTTP: cold, warm, crowded, beside vLLM's"),
    "peers": ("coldframe.benchmarks.fan_out", "replicas that feed one another when several start"),
    "snapshot": ("coldframe.benchmarks.snapshot", "images of warm workers, made and restored"),
    "swap": ("coldframe.benchmarks.swap", "two models that share a device's memory, in turn"),
    "spine": ("coldframe.benchmarks.spine", "one cold start and its decode, against their limits"),
    "vllm-load": ("coldframe.benchmarks.vllm_load", "vLLM's weights from us and by its own loader"),
    "vllm-bridge": ("coldframe.benchmarks.vllm_bridge", "native decode until vLLM takes over"),
    "turns": ("coldframe.benchmarks.turns", "a chat's next turn while a long prompt is prefilled"),
    "vllm-handoff": ("coldframe.benchmarks.vllm_handoff", "KV from outside in vLLM, and out of it"),
    "vllm-gated": ("coldframe.benchmarks.vllm_gated", "vLLM's first token before its last weight"),
}

_ON_DEVICE = {
    "cold",
    "endpoint",
    "handoff",
    "kills",
    "prefix",
    "replay",
    "rest",
    "serve",
    "swap",
    "turns",
}
"""Those that start replicas wherever they are asked to; the others are about the CPU, or none."""


def add_arguments(parser: Parser) -> None:
    names = "; ".join(f"{name}: {summary}" for name, (_, summary) in BENCHMARKS.items())
    parser.add_argument("bench", choices=list(BENCHMARKS), help=names)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments; try --help")


def parser_of(name: str) -> tuple[ModuleType, Parser]:
    """A benchmark's module, and what reads its arguments.

    Args:
        name: One of `BENCHMARKS`.
    """
    module_name, summary = BENCHMARKS[name]
    module = import_module(module_name)
    parser = Parser(prog=f"coldframe bench {name}", description=summary)
    module.add_arguments(parser)
    if name in _ON_DEVICE:
        parser.flag("--device", default=CPU, help="what replicas compute on: cpu or cuda:N (cpu)")
    return module, parser


def run(args: argparse.Namespace) -> int:
    """Runs one benchmark.

    Returns:
        Its own exit status; 143 where SIGTERM has ended it.

    Raises:
        ColdframeError: It cannot be run.
        KeyboardInterrupt: Ctrl-C has ended it.
    """
    module, parser = parser_of(args.bench)
    on_device = args.bench in _ON_DEVICE
    wanted = parser.parse(args.rest)
    if on_device:
        # For the commands that it starts, too.
        os.environ["COLDFRAME_DEVICE"] = wanted.device = choose_device(wanted.device).device
    from coldframe.benchmarks.interruption import Terminated, terminable
    from coldframe.benchmarks.machine import settings_forgotten

    # The settings only now: they have been the flags' own defaults.
    forgotten = settings_forgotten() if on_device else nullcontext()
    try:
        with terminable(), forgotten:
            return int(module.run(wanted))
    except Terminated:
        return 128 + signal.SIGTERM
