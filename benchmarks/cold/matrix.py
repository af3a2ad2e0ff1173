"""The matrix: which cells there are, which of them make sense, and why the others do not.

A cell is a tier, a state of the page cache, a source at its own rate or at a limited one, an
engine, and a way to ask. A matrix is a list of blocks; each names some values of each axis and
stands for all their combinations. Those that mean nothing are left out by a rule with a reason.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from coldframe.loader.errors import RequestError
from coldframe.runtime.units import byte_rate

__all__ = ["AXES", "DEFAULT", "QUICK", "Block", "Cell", "blocks_of", "cells_of", "read_matrix"]

AXES: Mapping[str, tuple[str, ...]] = {
    "tier": ("fresh", "template", "restored", "parked", "warm"),
    "cache": ("cold", "warm"),
    "source": ("disk", "s3", "http", "peer"),
    "engine": ("native", "vllm", "bridge"),
    "through": ("http", "run"),
}
"""What there is on each axis; a throttle is a rate, or `none`."""

Block = Mapping[str, Sequence[str]]
"""Values by axis, and those of `throttle`."""

_REST = {
    "tier": AXES["tier"],
    "cache": AXES["cache"],
    "source": ("disk",),
    "throttle": ("none",),
    "engine": ("native",),
    "through": ("http",),
}
"""What an axis has where a block does not name it."""

DEFAULT: Sequence[Block] = (
    {"tier": AXES["tier"], "cache": AXES["cache"], "through": AXES["through"]},
    {"tier": ("fresh", "restored"), "cache": ("warm",), "source": ("http", "s3", "peer")},
    {"tier": ("fresh", "restored"), "cache": ("cold",), "throttle": ("200MB/s",)},
)
QUICK: Sequence[Block] = (
    {"tier": ("fresh",), "cache": AXES["cache"]},
    {"tier": ("restored", "warm"), "cache": ("warm",)},
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Args:
        tier: How workers come up.
        cache: What the page cache has of the weight files, and of the image's for `restored`.
        source: Where the weights come from.
        throttle: A limit on the load, in bytes a second, or None.
        engine: Who decodes.
        through: Who is asked: the endpoint, or `coldframe run`.
    """

    tier: str
    cache: str
    source: str
    throttle: float | None
    engine: str
    through: str

    @property
    def id(self) -> str:
        rate = "" if self.throttle is None else f"@{self.throttle / 1e6:g}MB/s"
        return f"{self.tier}/{self.cache}/{self.source}{rate}/{self.engine}/{self.through}"

    @property
    def rests(self) -> bool:
        """Whether the replica is there already, and the clock starts with the request."""
        return self.tier in ("parked", "warm")


class _Rule(NamedTuple):
    what: str
    why: str
    fits: Callable[[Cell], bool]


_RULES = (
    _Rule(
        "parked and warm through run",
        "`coldframe run` ends with its answer: nothing of it stays parked or warm",
        lambda cell: cell.rests and cell.through == "run",
    ),
    _Rule(
        "parked and warm with a cold page cache, from other sources or throttled",
        "their weights are in memory: no file is read, and nothing comes over a link",
        lambda cell: (
            cell.rests
            and (cell.cache != "warm" or cell.source != "disk" or cell.throttle is not None)
        ),
    ),
    _Rule(
        "s3, http and peer with a cold page cache",
        "the files are the server's: it has them in memory, so that the link is what is measured",
        lambda cell: cell.source != "disk" and cell.cache == "cold",
    ),
    _Rule(
        "template from s3, http and peer",
        "a template forks workers for one MODEL as it was written: the directory",
        lambda cell: cell.tier == "template" and cell.source != "disk",
    ),
    _Rule(
        "template with a vLLM engine",
        "a template forks native workers alone: the engine would start fresh",
        lambda cell: cell.tier == "template" and cell.engine != "native",
    ),
)


def blocks_of(chosen: Mapping[str, str | None]) -> list[Block]:
    """The one block that flags stand for.

    Args:
        chosen: By axis, values with commas between them, or None where the flag is not given.

    Raises:
        RequestError: A value is none that there is.
    """
    named = {
        axis: [word.strip() for word in text.split(",") if word.strip()]
        for axis, text in chosen.items()
        if text is not None
    }
    for axis, values in named.items():
        if not values:
            raise RequestError("there is nothing to measure", where=f"--{axis}", got=repr(""))
    _check(named, "--")
    return [named]


def read_matrix(path: Path) -> list[Block]:
    """The blocks of a file: JSON, or TOML where its name ends so.

    It is an object whose `matrix` is a list of blocks; each value is a text or a list of texts.

    Raises:
        RequestError: It cannot be read, or is no such file.
    """
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise RequestError("the matrix cannot be read", where=path, got=error) from error
    blocks = found.get("matrix") if isinstance(found, dict) else None
    if not isinstance(blocks, list) or not blocks:
        raise RequestError(
            "this is no matrix",
            where=path,
            expected='{"matrix": [{"tier": ["fresh"], "cache": ["cold", "warm"]}]}',
            got="no list `matrix`",
        )
    made: list[Block] = []
    for number, block in enumerate(blocks):
        where = f"{path}, block {number + 1}: "
        if not isinstance(block, dict) or not all(map(_words, block.values())):
            raise RequestError("a block has texts by axis", where=where, got=block)
        named = {
            axis: [value] if isinstance(value, str) else list(value)
            for axis, value in block.items()
        }
        _check(named, where)
        made.append(named)
    return made


def _words(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _check(block: Block, where: str) -> None:
    for axis, values in block.items():
        if axis == "throttle":
            for value in values:
                _rate(value)
            continue
        known = AXES.get(axis)
        if known is None:
            raise RequestError(
                "there is no such axis",
                where=where,
                expected=", ".join([*AXES, "throttle"]),
                got=axis,
            )
        for value in values:
            if value not in known:
                raise RequestError(
                    f"there is no such {axis}",
                    where=f"{where}{axis}",
                    expected=", ".join(known),
                    got=value,
                )


def _rate(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return byte_rate(text)
    except argparse.ArgumentTypeError as error:
        raise RequestError(
            "this is no rate", where="throttle", expected="none, 200MB/s", got=text
        ) from error


def cells_of(blocks: Iterable[Block]) -> tuple[list[Cell], list[dict[str, str]]]:
    """All cells of some blocks, each once, in their order.

    Returns:
        Those that make sense; and what is left out by which rule, for the document.
    """
    cells: dict[Cell, None] = {}
    against: dict[_Rule, set[Cell]] = {}
    for block in blocks:
        values = {**_REST, **block}
        for tier, cache, source, throttle, engine, through in product(
            *(values[axis] for axis in ("tier", "cache", "source", "throttle", "engine", "through"))
        ):
            cell = Cell(tier, cache, source, _rate(throttle), engine, through)
            rule = next((rule for rule in _RULES if rule.fits(cell)), None)
            if rule is None:
                cells[cell] = None
            else:
                against.setdefault(rule, set()).add(cell)
    left_out = [
        {"what": f"{rule.what} ({_count(len(refused))})", "why": rule.why}
        for rule, refused in against.items()
    ]
    return list(cells), left_out


def _count(cells: int) -> str:
    return "one cell" if cells == 1 else f"{cells} cells"
