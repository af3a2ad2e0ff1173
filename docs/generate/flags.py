"""Every flag of every command, with its twin in the environment, its default and its help.

Read from the parsers that the commands themselves use.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from coldframe.benchmarks import command as bench
from coldframe.runtime import cli
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.units import byte_count
from docs.generate.markdown import cell, code, table

__all__ = ["benchmarks", "commands", "parsers", "twins"]

_HEADS = ("", "variable", "default", "")
_BINARY = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def parsers() -> Iterator[tuple[str, str, Parser]]:
    """Each command as it is called, what it is for, and what reads its arguments."""
    for name, (_, summary) in cli.COMMANDS.items():
        yield f"coldframe {name}", summary, cli.parser_of(name)[1]
    for name, (_, summary) in sorted(bench.BENCHMARKS.items()):
        yield f"coldframe bench {name}", summary, bench.parser_of(name)[1]


def twins() -> set[str]:
    """All variables that stand for a flag."""
    return {twin for _, _, parser in parsers() for twin in parser.twins().values()}


def commands() -> str:
    """A section for each command but the benchmarks."""
    return "\n".join(_section(*found) for found in parsers() if not _is_benchmark(found[0]))


def benchmarks() -> str:
    """A section for each benchmark."""
    return "\n".join(_section(*found) for found in parsers() if _is_benchmark(found[0]))


def _is_benchmark(name: str) -> bool:
    return name.startswith("coldframe bench ")


def _section(name: str, summary: str, parser: Parser) -> str:
    parts = [f"## {name}\n", f"{cell(summary[0].upper() + summary[1:])}.\n"]
    # The first two groups are argparse's own, and need no names.
    positional, optional, *named = parser._action_groups
    plain = [*positional._group_actions, *optional._group_actions]
    parts.append(table(_HEADS, _rows(parser, [action for action in plain if _told(action)])))
    for group in named:
        actions = [action for action in group._group_actions if _told(action)]
        if not actions:
            continue
        title = group.title or ""
        if title:
            parts.append(f"*{cell(title[0].upper() + title[1:])}*\n")
        if group.description:
            parts.append(f"{cell(group.description)}\n")
        parts.append(table(_HEADS, _rows(parser, actions)))
    return "\n".join(parts)


def _told(action: argparse.Action) -> bool:
    hidden = action.help == argparse.SUPPRESS
    return not hidden and not isinstance(action, argparse._HelpAction)


def _rows(parser: Parser, actions: list[argparse.Action]) -> Iterator[list[str]]:
    found = parser.twins()
    for action in actions:
        twin = found.get(action.dest, "")
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        said = text.removesuffix(f"[{twin}]").strip() if twin else text
        choices = action.choices
        if choices is not None and action.option_strings:
            one_of = "one of " + ", ".join(map(str, choices))
            said = f"{said}; {one_of}" if said else one_of
        yield [code(_call(action)), code(twin), code(_default(action)), cell(said)]


def _call(action: argparse.Action) -> str:
    """How it is written on a command line."""
    if not action.option_strings:
        shown = action.metavar if isinstance(action.metavar, str) else action.dest
        return {"?": f"[{shown}]", "*": f"[{shown} ...]", "+": f"{shown} ...", "...": "..."}.get(
            str(action.nargs), shown
        )
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    many = {"+": " ...", "*": " ..."}.get(str(action.nargs), "")
    return f"{names} {shown}{many}"


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value is False or value is argparse.SUPPRESS or not action.option_strings:
        return ""
    if isinstance(value, int) and action.type is byte_count:
        for unit, size in _BINARY:
            if value >= size and value % size == 0:
                return f"{value // size}{unit}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
