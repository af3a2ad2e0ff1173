"""The command line: subcommands are found by name and imported when called.

That keeps `--help` instant, and lets this floor call commands of the floor above it without
importing it.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from argparse import Namespace
    from types import ModuleType

    from coldframe.runtime.flags.parser import Parser

__all__ = ["COMMANDS", "main", "parser_of"]

COMMANDS = {
    "serve": ("coldframe.runtime.commands.serve", "the container entrypoint and HTTP endpoint"),
    "worker": (
        "coldframe.runtime.commands.worker",
        "a replica behind Dynamo or others' fronts",
    ),
    "run": ("coldframe.runtime.commands.run", "one cold start, one answer, the timeline"),
    "batch": (
        "coldframe.runtime.commands.batch",
        "one cold start, a file of requests, back to zero",
    ),
    "plan": ("coldframe.runtime.commands.plan", "stages, bytes, predicted memory and TTFT"),
    "advise": ("coldframe.benchmarks.traffic.advise", "which policy pays for a trace of requests"),
    "seal": ("coldframe.runtime.commands.seal", "hash a model, so that every load can check it"),
    "pack": ("coldframe.runtime.commands.pack", "write a model anew, in the order of its load"),
    "snapshot": ("coldframe.runtime.commands.snapshot", "freeze a warm worker; see what is frozen"),
    "demo-model": (
        "coldframe.runtime.commands.demo_model",
        "make a local checkpoint to try things on",
    ),
    "doctor": ("coldframe.runtime.commands.doctor", "what this machine can do, and what it lacks"),
    "bench": ("coldframe.benchmarks.command", "measure; a table, then one JSON document"),
}
_COLD_STARTS = {"run", "serve", "worker", "batch"}
"""Commands that load a model: the memory service starts before their arguments are read."""
_SERVERS = {"serve", "worker"}
"""Those of them that listen: their port is bound first of all."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 for an error of coldframe's, 2 for wrong usage, 130 after Ctrl-C.
    """
    _fill_standard_streams()
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has seen enough; the interpreter's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"coldframe: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _fill_standard_streams() -> None:
    """Makes sure that descriptors 0 to 2 are taken, where whoever started us closed some.

    A socket would get their numbers otherwise, and what is printed would go into it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"coldframe {version('coldframe')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"coldframe: unknown command {name!r}; known are {known}", file=sys.stderr)
        return 2
    return _call(name, rest)


def _call(name: str, arguments: list[str]) -> int:
    # The bytes first: nothing that is done here makes them come sooner. But for the port: from
    # the moment that it is bound whoever asks waits instead of being refused.
    cold = name in _COLD_STARTS and not {"-h", "--help"} & set(arguments)
    from coldframe.loader.errors import ColdframeError

    started: dict[str, object] = {}
    try:
        if cold and name in _SERVERS:
            from coldframe.runtime.gateway.listen import bind_early, take_secrets
            from coldframe.runtime.start.ending import Ending

            started["profile"], started["listeners"] = bind_early(arguments)
            started["listening_ns"] = time.monotonic_ns()
            started["ending"] = Ending()
            started["secrets"] = take_secrets()
        if cold:
            from coldframe.runtime.start.early import (
                MemoryProcess,
                likely_gateway,
                likely_peers,
                likely_restorer,
            )

            if name == "worker":  # before the rest: a load may have to wait for what it finds
                started["peers_process"] = likely_peers(arguments)
            started["memory"] = MemoryProcess()
            started["restorer"] = likely_restorer(arguments)
            if name in _SERVERS:
                started["gateway"] = likely_gateway(name, arguments)
        module, args = _parse(name, arguments)
        for key, value in started.items():
            setattr(args, key, value)
        return int(module.run(args))
    except ColdframeError as error:
        print(f"coldframe: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(name: str, arguments: list[str]) -> tuple[ModuleType, Namespace]:
    module, parser = parser_of(name)
    return module, parser.parse(arguments)


def parser_of(name: str) -> tuple[ModuleType, Parser]:
    """A command's module, and what reads its arguments.

    Args:
        name: One of `COMMANDS`.
    """
    from importlib import import_module

    from coldframe.runtime.flags.parser import Parser

    module_name, summary = COMMANDS[name]
    module = import_module(module_name)
    parser = Parser(prog=f"coldframe {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    module.add_arguments(parser)
    return module, parser


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: coldframe COMMAND [...]",
            "",
            "A scale-to-zero runtime for large language models.",
            "",
            *lines,
            "",
            "coldframe COMMAND --help says more. Every flag but the prompt's has a twin in the",
            "environment: --throttle is also COLDFRAME_THROTTLE; the flag wins.",
        ]
    )
